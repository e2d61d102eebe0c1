"""`status` and `check` where the database is odd, or nobody takes what they print: a sentence, never a traceback."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from oz_worker import rows, slots
from oz_worker.engine import disk
from oz_worker.model import Key, ReportKind
from oz_worker.process import identify
from oz_worker.rows import OutboxRow, TaskRow
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


def held(directory: Path, **facts: Any) -> slots.Slot:
    """The instance is held by this very process, which has written *facts*."""
    slot = slots.take(directory, "inst")
    me = identify(os.getpid())
    assert me is not None
    facts["worker"] = {"worker_id": "w", "pid": str(me.pid), "start_ticks": str(me.ticks), **facts.get("worker", {})}
    with contextlib.closing(sqlite3.connect(directory / "inst" / "state.db", isolation_level=None)) as db:
        for name, fact in facts.items():
            rows.put_fact(db, name, json.dumps(fact))
    return slot


def test_what_an_earlier_process_wrote_is_not_taken_for_the_state_of_one_that_starts(tmp_path: Path) -> None:
    directory = state(tmp_path)
    slot = held(directory, worker={"start_ticks": "1"}, stop={"step": "stopped"})
    shown = asked(directory, "--explain")
    slot.release()
    assert shown.returncode == 0
    assert re.findall("takes no task: (.*)", shown.stdout) == ["starting: the state and the backend are being opened"]
    assert "connected" not in shown.stdout


ON_A_FULL_DISK = """
import pathlib, sqlite3, sys, time
from oz_worker import cli
from tests.unit import test_status_odd as odd
disk = pathlib.Path(sys.argv[1])
directory = odd.state(disk)
slot = odd.held(directory, worker={"start_ticks": "1"}, intake={"troubles": [], "full": "", "at": time.time()})
db = sqlite3.connect(directory / "inst" / "state.db")  # a worker has it open
db.execute("SELECT * FROM facts").fetchall()
try:
    with (disk / "rest").open("wb", buffering=0) as rest:
        while rest.write(bytes(4096)):
            pass
except OSError:
    raise SystemExit(cli.main(["status", "--explain", "--state-dir", str(directory)]))
"""


def test_one_whose_start_fell_on_a_full_disk_is_not_called_starting(tmp_path: Path) -> None:
    """It may be connected for long: what is written down is that of the process before it."""
    script = f'mount -t tmpfs -o size=2m none {tmp_path} && exec "$0" -c "$1" {tmp_path}'
    alone = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    argv = [*alone, "/bin/sh", "-c", script, sys.executable, ON_A_FULL_DISK]
    shown = subprocess.run(argv, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert re.findall("takes no task: (.*)", shown.stdout) == [
        "its disk is full, so it could not write down how it is; free some space"
    ]


def test_a_disk_that_counts_no_blocks_is_not_full() -> None:
    """As a tmpfs without limit and some of FUSE; proc is one that is everywhere."""
    proc = Path("/proc")
    assert os.statvfs(proc).f_blocks == 0
    assert not disk.full(proc)
    assert disk.DiskGuard((proc,), min_free=1, min_inodes=1).trouble() == ""


def test_a_worker_that_cannot_write_or_hangs_is_told_by_its_silence(tmp_path: Path) -> None:
    directory = state(tmp_path)
    slot = held(directory, intake={"troubles": [], "full": "", "at": time.time() - 600})
    shown, brief = asked(directory, "--explain"), asked(directory)
    slot.release()
    assert (shown.returncode, brief.returncode) == (0, 0), "one runs"
    for answer, before in ((shown, "takes no task: "), (brief, "  ")):
        assert re.search(f"{before}it has written nothing down for 10m.*: its disk is full, ", answer.stdout)


def test_what_status_sees_itself_and_how_old_the_rest_is(tmp_path: Path) -> None:
    """A disk that the worker could not tell of, a link that has been down for long, a report that is held."""
    directory, now = state(tmp_path), time.time()
    row = OutboxRow("u" * 16, Key("t-1"), ReportKind.COMPLETED, "https://x", "{}", True, now - 500)
    with contextlib.closing(sqlite3.connect(directory / "inst" / "state.db", isolation_level=None)) as db:
        rows.add_report(db, row)
    slot = held(
        directory,
        worker={"disks": [str(tmp_path)], "min_free_disk": str(2**60), "min_free_inodes": "0"},
        intake={"troubles": [], "full": "", "at": now},
        link={"state": "refused", "at": now - 600, "why": "no", "tried_at": str(now - 5), "again_at": str(now - 1)},
    )
    shown, told = asked(directory, "--explain"), json.loads(asked(directory, "--json").stdout)
    slot.release()
    assert re.search(r"  link: refused for 10m\d*s? \(no\); tried \d+s ago; the next try is due\n", shown.stdout)
    assert re.search(r"takes no task: disk: \S+ has \d+ MiB free, min_free_disk asks for ", shown.stdout)
    assert told[0]["outbox"] == {"undelivered": 0, "oldest_seconds": 0.0}


def test_two_workers_one_of_them_with_a_damaged_database(tmp_path: Path) -> None:
    directory = state(tmp_path)
    slot = held(directory, intake={"troubles": ["disk: /x has no room"], "full": ""})
    other = slots.take(directory, "other")
    (directory / "other" / "state.db").write_bytes(b"no database" * 500)
    shown = asked(directory, "--explain")
    only = asked(directory, "--instance-id", "other")
    none = asked(directory, "--instance-id", "third")
    other.release()
    slot.release()
    assert shown.returncode == only.returncode == 0
    assert re.findall("takes no task: (.{12})", shown.stdout) == ["disk: /x has", "the database"]
    assert "that is damaged is set aside" in only.stdout
    assert "0 tasks" not in only.stdout
    assert "worker ?" not in only.stdout
    assert (none.returncode, none.stderr.count("\n")) == (3, 1)
    assert "no worker with the instance id third runs in" in none.stderr


AS_NOBODY = """
import contextlib, io, os, sys
from oz_worker import cli, rows, store
with contextlib.redirect_stderr(io.StringIO()):
    cli.main(["status", "--state-dir", "/nowhere"])  # whatever is imported late, also by the library, may be root's
os.setgroups([]); os.setgid(65534); os.setuid(65534)
raise SystemExit(cli.main(sys.argv[1:]))
"""


TWICE = f"""
import contextlib, io, sys
from oz_worker import cli
with contextlib.redirect_stdout(io.StringIO()):
    cli.main(sys.argv[1:])  # whatever is imported late may be root's
{AS_NOBODY}"""


def test_the_services_directory_does_not_hide_the_users_own_worker() -> None:
    """Where others may list the service's state but not read its instances."""
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        own, service = state(Path(place) / "oz-worker"), state(Path(place) / "service", "t-2")
        service.chmod(0o755)
        for path in (own, *own.rglob("*")):
            os.chown(path, 65534, 65534)
        of_service = f"from oz_worker.config import paths; paths.SERVICE_STATE = {str(service)!r}"
        slot = held(own, intake={"troubles": [], "full": "", "at": time.time()})

        def said(home: str, *words: str) -> subprocess.CompletedProcess[str]:
            argv = [sys.executable, "-c", f"{of_service}{AS_NOBODY}", *words]
            environ = {**os.environ, "XDG_STATE_HOME": home}
            return subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=SECONDS, check=False)

        for closed, mode in ((service / "inst", 0o700), (service / "inst" / "lock", 0o600)):
            (service / "inst").chmod(0o755)
            closed.chmod(mode)
            shown, alone = said(place, "status"), said(f"{place}/none", "status")
            assert (shown.returncode, shown.stderr) == (0, "")
            assert shown.stdout.startswith("worker w (inst): ")
            assert (alone.returncode, alone.stderr.count("\n")) == (3, 1), "it is the only one"
            assert f"{service}/inst/lock cannot be read" in alone.stderr
        slot.release()


@pytest.mark.parametrize("closed", ["the directory", "an instance"])
def test_a_directory_of_another_user_is_one_sentence(closed: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        directory = state(Path(place))
        directory.chmod(0o755)
        (directory if closed == "the directory" else directory / "inst").chmod(0o700)
        for words in (("status",), ("status", "--explain", "t-1"), ("drain",), ("logs", "t-1")):
            argv = [sys.executable, "-c", AS_NOBODY, *words, "--state-dir", str(directory)]
            done = subprocess.run(argv, capture_output=True, text=True, timeout=SECONDS, check=False)
            assert (done.returncode, done.stdout, done.stderr.count("\n")) == (3, "", 1), done.stderr
            assert str(directory) in done.stderr
            assert "ask as the user who runs the worker" in done.stderr


def test_a_check_as_another_user_says_whose_the_state_is_and_does_not_dial() -> None:
    with tempfile.TemporaryDirectory() as place, socket.create_server(("127.0.0.1", 0)) as taken:
        os.chmod(place, 0o755)
        directory = state(Path(place))
        directory.chmod(0o700)
        config = Path(place) / "config.yaml"
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        text = {"worker_id": "w", "state_dir": str(directory), "backend": {"direct": {"oz_path": "/bin/true"}}}
        config.write_text(json.dumps(text | {"health_listen": listen, "web_socket_url": "ws://127.0.0.1:1/"}))
        argv = [sys.executable, "-c", TWICE, "check", "--json", "--config-file", str(config)]
        environ = {**os.environ, "WARP_API_KEY": "wk-1"}
        done = subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=SECONDS, check=False)
        tests = {test["name"]: test for test in json.loads(done.stdout)["tests"]}
        assert done.returncode == 3
        assert tests["ports"]["result"] == "warning"
        assert "ask as the user who runs the worker" in tests["ports"]["said"]
        assert (tests["state"]["result"], tests["server"]["result"]) == ("failed", "skipped")
        assert tests["server"]["said"] == "not tried, because of state"
        assert "as the user who runs the worker" in tests["state"]["cure"]


def test_nobody_takes_what_is_printed(tmp_path: Path) -> None:
    directory = state(tmp_path, "t-\u6f22")
    with open("/dev/full", "wb") as full:
        done = asked(directory, "--explain", "t-\u6f22", out=full.fileno())
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "No space left" in done.stderr
    assert "task t-\\u6f22" in asked(directory, "--explain", "t-\u6f22", PYTHONIOENCODING="ascii").stdout
