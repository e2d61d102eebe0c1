"""The database: durable when it says so, honest when it cannot, never lost without a word."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import sqlite3
import subprocess
import threading
import time
from pathlib import Path
from typing import Iterator

import pytest

from oz_worker import rows
from oz_worker.errors import NotUsable, StoreError, StoreFull
from oz_worker.lifecycle import State
from oz_worker.model import Cause, Key, ReportKind
from oz_worker.rows import OutboxRow, TaskRow
from oz_worker.store import Store

KEY = Key("t", "e")


def opened(path: Path) -> Store:
    store = Store(path)
    store.start(lambda name, error: None)
    return store


def _append(order: list[int], number: int, _db: sqlite3.Connection) -> None:
    order.append(number)


def report(text: str, key: Key = KEY) -> OutboxRow:
    return OutboxRow("u", key, ReportKind.COMPLETED, "ws://h:1", text, False, time.time())


def task_row(unit: str = "u", key: Key = KEY, **changes: object) -> TaskRow:
    row = TaskRow(key, 1, unit, "ws://h:1", "direct", "", 0, 1000.0)
    for name, value in changes.items():
        setattr(row, name, value)
    return row


def test_a_row_comes_back_as_it_was_written(tmp_path: Path) -> None:
    row = task_row(
        cause=Cause.CANCEL,
        state=State.CANCELLING,
        deadline_at=1.5,
        started_at=2.5,
        keep_until=0.0,
        claim_acked=True,
        exit_code=137,
        result="failed",
        frame="{}",
        remains="pid 7",
    )
    store = opened(tmp_path / "state.db")
    store.do(lambda db: rows.save_task(db, row))
    store.close(10)
    store = opened(tmp_path / "state.db")
    assert store.do(rows.open_tasks) == [row]
    store.close(10)


def test_ids_with_lone_surrogates_and_nul_can_be_written(tmp_path: Path) -> None:
    store = opened(tmp_path / "state.db")
    key = Key("a\ud800\0b", "x")
    store.do(lambda db: rows.save_task(db, task_row(key=key)))
    found = store.do(lambda db: rows.latest_attempt(db, key))
    assert found is not None
    assert found.unit == "u"
    store.close(10)


def test_report_ids_are_never_used_again(tmp_path: Path) -> None:
    store = opened(tmp_path / "state.db")
    first = store.do(lambda db: rows.add_report(db, report("1")))
    store.do(lambda db: rows.delete_reports(db, [first]))
    assert store.do(lambda db: rows.add_report(db, report("2"))) > first
    store.close(10)


def test_posts_of_one_thread_run_in_order_and_all_callers_are_answered(tmp_path: Path) -> None:
    store = opened(tmp_path / "state.db")
    order: list[int] = []
    answered = threading.Semaphore(0)
    for number in range(2000):
        store.post(functools.partial(_append, order, number), lambda _r, _e: answered.release())
    for _number in range(2000):
        assert answered.acquire(timeout=20)
    assert order == list(range(2000))
    store.close(10)


def test_one_bad_row_takes_no_other_with_it(tmp_path: Path) -> None:
    store = opened(tmp_path / "state.db")
    errors: list[StoreError | None] = []
    gate = threading.Event()
    store.post(lambda db: gate.wait(20))  # so that the next three share a transaction
    store.post(lambda db: rows.put_fact(db, "a", "1"))
    store.post(lambda db: db.execute("INSERT INTO facts VALUES (NULL, NULL)"), lambda _r, e: errors.append(e))
    store.post(lambda db: rows.put_fact(db, "b", "2"))
    gate.set()
    assert store.do(rows.facts) == {"a": "1", "b": "2"}
    assert isinstance(errors[0], StoreError)
    store.close(10)


def test_a_newer_schema_is_refused_and_left_untouched(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE future (x)")
        db.execute("PRAGMA user_version = 99")
    db.close()
    before = path.read_bytes()
    with pytest.raises(NotUsable, match="newer version"):
        opened(path)
    assert path.read_bytes() == before


def test_a_damaged_database_is_set_aside_and_its_reports_are_saved(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    store = opened(path)
    for number in range(300):
        store.do(functools.partial(rows.add_report, row=report(f"frame {number} " + "x" * 500)))
        store.do(functools.partial(rows.save_task, row=task_row(unit=f"u{number}", key=Key(f"t{number}"))))
    store.close(10)
    data = bytearray(path.read_bytes())
    page = 4096
    damaged = 0
    for start in range(page * 3, len(data) - page, page * 5):  # every fifth page, never the first ones
        data[start : start + 64] = os.urandom(64)
        damaged += 1
    assert damaged > 5
    path.write_bytes(data)
    store = opened(path)
    saved = store.do(rows.reports)
    assert 0 < len(saved) == store.salvaged
    assert all(row.frame.startswith("frame ") for row in saved)
    assert list(tmp_path.glob("state.db.damaged-*"))
    store.close(10)


def test_a_database_cut_at_any_length_still_opens(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    store = opened(path)
    store.do(lambda db: rows.save_task(db, task_row()))
    store.do(lambda db: rows.add_report(db, report("frame")))
    store.close(10)
    whole = path.read_bytes()
    # Every byte of the header, then every 97th: beyond it the cut decides only which page is missing.
    for length in [*range(110), *range(110, len(whole), 997)]:
        place = tmp_path / f"cut-{length}"
        place.mkdir()
        (place / "state.db").write_bytes(whole[:length])
        store = opened(place / "state.db")
        store.do(lambda db: rows.put_fact(db, "alive", "yes"))
        store.close(10)


def fill(path: Path) -> None:
    """Write until the disk is full."""
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY)
    try:
        while os.write(descriptor, b"x" * 4096):
            pass
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
    os.close(descriptor)


@contextlib.contextmanager
def disk(place: Path, size: str) -> Iterator[Path]:
    """A file system of its own."""
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    with disk(tmp_path / "tiny", "512k") as place:
        yield place


def test_a_start_on_a_full_disk_has_the_reserve(tmp_path: Path) -> None:
    with disk(tmp_path / "small", "4m") as place:
        store = opened(place / "state.db")
        store.do(lambda db: rows.put_fact(db, "small", "1"))
        store.close(10)
        fill(place / "ballast")
        store = opened(place / "state.db")
        store.do(lambda db: rows.put_fact(db, "small", "2"))
        store.close(10)
        fill(place / "more")
        with pytest.raises(NotUsable, match=r"state\.db cannot be opened .* free some space"):
            opened(place / "state.db")


def test_the_end_of_a_task_is_written_on_a_full_disk_with_the_space_of_the_reserve(tmp_path: Path) -> None:
    with disk(tmp_path / "small", "4m") as place:
        store = opened(place / "state.db")
        store.do(lambda db: rows.put_fact(db, "small", "1"))
        assert (place / "reserve").stat().st_size > 0
        fill(place / "ballast")
        with pytest.raises(StoreFull):
            store.do(lambda db: rows.add_report(db, report("x" * 60_000)))
        assert store.use_reserve()
        store.do(lambda db: rows.add_report(db, report("x" * 60_000)))
        assert not store.use_reserve()
        store.close(10)


def test_a_full_disk_is_an_error_of_the_write_and_heals(tiny_disk: Path) -> None:
    store = opened(tiny_disk / "state.db")
    store.do(lambda db: rows.put_fact(db, "small", "1"))
    ballast = tiny_disk / "ballast"
    fill(ballast)
    with pytest.raises(StoreFull, match="cannot be written"):
        store.do(lambda db: rows.put_fact(db, "large", "y" * 200_000))
    assert store.trouble
    ballast.unlink()
    store.do(lambda db: rows.put_fact(db, "again", "1"))
    assert set(store.do(rows.facts)) == {"small", "again"}
    assert store.trouble == ""
    store.close(10)


def test_a_directory_that_cannot_be_written_is_said_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "state.db").mkdir()
    with pytest.raises((NotUsable, OSError)) as caught:
        opened(tmp_path / "state.db")
    assert "state.db" in str(caught.value)


def test_a_second_process_can_read_while_the_first_writes(tmp_path: Path) -> None:
    store = opened(tmp_path / "state.db")
    store.do(lambda db: rows.put_fact(db, "n", "0"))
    other = sqlite3.connect(f"file:{tmp_path / 'state.db'}?mode=ro", uri=True)
    for number in range(1, 20):
        store.do(functools.partial(rows.put_fact, name="n", value=str(number)))
        assert rows.facts(other) == {"n": str(number)}
    other.close()
    store.close(10)
