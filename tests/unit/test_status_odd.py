"""`status` and `check` where the database is odd, or nobody takes what they print: a sentence, never a traceback."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from oz_worker import rows
from oz_worker.model import Key
from oz_worker.rows import TaskRow
from oz_worker.store import Store

SECONDS = 60
ODD = {
    "no fact that parses": "UPDATE facts SET value = '{'",
    "a column is missing": "ALTER TABLE tasks DROP COLUMN remains",
    "a state of tomorrow": "UPDATE tasks SET state = 'hibernating'",
    "a table is missing": "DROP TABLE outbox",
}


def state(place: Path, task_id: str = "t-1") -> Path:
    """A state directory whose name means something in a URI, with one instance that has one task."""
    directory = place / "100% #1?"
    instance = directory / "inst"
    instance.mkdir(parents=True)
    (instance / "lock").touch()
    store = Store(instance / "state.db")
    store.start(lambda _name, _error: None)
    row = TaskRow(Key(task_id), 1, "u" * 16, "https://x", "direct", "", 0, time.time())
    store.do(lambda db: rows.save_task(db, row))
    store.do(lambda db: rows.put_fact(db, "link", '{"state": "connected"}'))
    store.close(SECONDS)
    return directory


def asked(directory: Path, *flags: str, out: int = subprocess.PIPE, **environ: str) -> subprocess.CompletedProcess[str]:
    """`status` in a process of its own."""
    words = [sys.executable, "-m", "oz_worker", "status", "--state-dir", str(directory), *flags]
    environment = {**os.environ, **environ}
    environment.pop("PYTHONUNBUFFERED", None)  # as everywhere else: what cannot be written is noticed at the end
    done = subprocess.run(
        words, stdout=out, stderr=subprocess.PIPE, text=True, env=environment, timeout=SECONDS, check=False
    )
    assert "Traceback" not in done.stderr
    return done


@pytest.mark.parametrize("odd", ODD)
def test_a_database_that_cannot_be_understood_is_said_so(tmp_path: Path, odd: str) -> None:
    directory = state(tmp_path)
    assert "it is accepted" in asked(directory, "--explain", "t-1").stdout
    with sqlite3.connect(directory / "inst" / "state.db") as db:
        db.execute(ODD[odd])
    db.close()
    assert "the database cannot be read" in asked(directory, "--all").stdout
    explained = asked(directory, "--explain", "t-1")
    assert explained.returncode == 3
    assert "cannot be read from" in explained.stderr


def test_nobody_takes_what_is_printed(tmp_path: Path) -> None:
    directory = state(tmp_path, "t-\u6f22")
    with open("/dev/full", "wb") as full:
        done = asked(directory, "--explain", "t-\u6f22", out=full.fileno())
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "No space left" in done.stderr
    assert "task t-\\u6f22" in asked(directory, "--explain", "t-\u6f22", PYTHONIOENCODING="ascii").stdout
