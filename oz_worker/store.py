"""The one door to the database: a thread that owns it and commits in groups.

Why one writer: one connection with group commit does 6,600 durable inserts a second where sixteen connections do 900,
and a transaction is the place where races between threads are decided, in order of arrival.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any, Callable, TypeVar
from urllib.parse import quote

from oz_worker import rows, threads, vitals
from oz_worker.errors import NotUsable, StoreError, StoreFull

logger = logging.getLogger(__name__)

MIGRATIONS: tuple[tuple[str, ...], ...] = (rows.SCHEMA,)
"""Entry n leads from schema n to n + 1; forward only."""

GROUP = 256
RESERVE_BYTES = 1024 * 1024
"""Set aside beside the database for the day on which the disk is full."""
RESERVE_SECONDS = 60.0
T = TypeVar("T")
Work = Callable[[sqlite3.Connection], Any]
Done = Callable[[Any, "StoreError | None"], None]


class Store:
    """Runs functions inside transactions on a thread of its own. `post` and `do` are safe from any thread.

    Thread `store`: owner is whoever called `start`; it blocks only in its queue and in SQLite; its waker is the queue,
    and None in it is its stop. Functions posted from one thread run in that order. A function's *done* is called
    on the store's thread after the commit that makes it durable: it must be quick and must not call `do`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.salvaged = 0
        self._queue: queue.SimpleQueue[tuple[Work, Done] | None] = queue.SimpleQueue()
        self._reserve = path.with_name("reserve")
        self._next_reserve = 0.0  # monotonic time of the next attempt to make it
        self._thread: threading.Thread | None = None
        self._db: sqlite3.Connection | None = None
        self._ended = False  # nothing is run any more; set by the store's thread after its last batch
        self.trouble = ""  # why the last change was not committed, "" when it was; written by the store's thread only

    def start(self, on_death: Callable[[str, BaseException], None]) -> None:
        """Open the database (migrating it, or setting a damaged one aside) and start the thread.

        Raises NotUsable when the directory cannot be used or the schema is newer than this program.
        """
        opened: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

        def body() -> None:
            try:
                self._db, self.salvaged = _open(
                    self.path, self.use_reserve
                )  # on this thread: SQLite ties a connection to its maker
            except BaseException as error:  # told to the caller of start, who raises it
                opened.put(error)
                return
            opened.put(None)
            try:
                self._serve(self._db)
            finally:
                self._refuse_the_rest()

        self._thread = threads.start("store", body, on_death)
        if (error := opened.get()) is not None:
            raise error

    def post(self, work: Work, done: Done | None = None) -> None:
        """Run *work(db)* in a transaction; then *done(result, None)*, or *done(None, StoreError)* if it failed."""
        self._queue.put((work, done or _log_failure))
        if self._ended:  # it may have ended before it saw this one
            self._refuse_the_rest()

    def do(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run *work(db)* in a transaction and return its result once it is durable. Raises StoreError."""
        answer: queue.SimpleQueue[tuple[T, StoreError | None]] = queue.SimpleQueue()
        self.post(work, lambda result, error: answer.put((result, error)))
        result, error = vitals.take(answer)  # who waits is not stuck: that is judged of the store's thread alone
        if error is not None:
            raise error
        return result

    def close(self, timeout: float) -> bool:
        """Commit what is queued, close the database, end the thread; False if that took longer than *timeout* s."""
        if self._thread is None:
            return True
        self._queue.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @vitals.essential("store")
    def _serve(self, db: sqlite3.Connection) -> None:
        stopping = False
        while not stopping:
            batch = [vitals.take(self._queue)]
            while len(batch) < GROUP:
                try:
                    batch.append(self._queue.get_nowait())
                except queue.Empty:
                    break
            stopping = None in batch
            jobs = [job for job in batch if job is not None]
            if jobs:
                self._commit(db, jobs)
        try:
            db.close()
        except sqlite3.Error as error:
            logger.warning("closing %s: %s", self.path, error)

    def _commit(self, db: sqlite3.Connection, jobs: list[tuple[Work, Done]]) -> None:
        """One transaction over all *jobs*, each in a savepoint of its own: one that fails takes no other with it."""
        results: list[tuple[Any, StoreError | None]] = []
        try:
            changes = db.total_changes
            db.execute("BEGIN IMMEDIATE")
            for work, _done in jobs:
                results.append(_guarded(db, work))
            db.execute("COMMIT")
            if db.total_changes != changes:  # one that changes nothing works on a full disk too
                self.trouble = ""
            self._make_reserve()
        except sqlite3.Error as error:
            self.trouble = str(error)
            _roll_back(db)
            failure = _store_error(self.path, error)
            results = [(None, failure)] * len(jobs)
        for (_work, done), (result, failed) in zip(jobs, results, strict=True):
            _tell(done, result, failed)

    def use_reserve(self) -> bool:
        """Give the disk back what was set aside; whether there was any. For what must be written: ends of tasks."""
        try:
            self._reserve.unlink()
        except OSError:
            return False
        self._next_reserve = time.monotonic() + RESERVE_SECONDS
        logger.error("the disk of %s is full; the reserve is used, free some space", self.path)
        return True

    def _make_reserve(self) -> None:
        if time.monotonic() < self._next_reserve:
            return
        self._next_reserve = math.inf
        try:
            with self._reserve.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, RESERVE_BYTES)
        except (OSError, AttributeError):  # no space, or no such call on this system
            self._reserve.unlink(missing_ok=True)
            self._next_reserve = time.monotonic() + RESERVE_SECONDS

    def _refuse_the_rest(self) -> None:
        """Answer everything that nobody will run: whoever waits in `do` must not wait for ever. Any thread."""
        self._ended = True
        while True:
            try:
                job = self._queue.get_nowait()
            except queue.Empty:
                return
            if job is not None:
                _tell(job[1], None, StoreError(f"the state database {self.path} is closed"))


def _guarded(db: sqlite3.Connection, work: Work) -> tuple[Any, StoreError | None]:
    db.execute("SAVEPOINT job")
    try:
        result = work(db)
    except (sqlite3.OperationalError, sqlite3.InternalError):
        raise  # the disk or the file: nothing in this transaction will do
    except Exception as error:  # one job must take no other with it, and never the thread
        logger.exception("a change of the state database failed")
        db.execute("ROLLBACK TO job")
        db.execute("RELEASE job")
        return None, StoreError(f"the state database refused a row: {error}")
    db.execute("RELEASE job")
    return result, None


def _tell(done: Done, result: Any, failed: StoreError | None) -> None:
    try:
        done(result, failed)
    except Exception:  # foreign code on the store's thread, which everybody needs
        logger.exception("after a commit")


def peek(path: Path, look: Callable[[sqlite3.Connection], T]) -> T | None:
    """Read a database that another process may own; None when there is none or it cannot be read."""
    try:
        with contextlib.closing(
            sqlite3.connect(f"file:{quote(os.fsencode(path))}?mode=ro", uri=True, timeout=2.0)
        ) as db:
            return look(db)
    except (sqlite3.Error, ValueError):
        return None


def _roll_back(db: sqlite3.Connection) -> None:
    try:
        if db.in_transaction:
            db.execute("ROLLBACK")
    except sqlite3.Error as error:  # a full disk may already have rolled it back
        logger.debug("rollback: %s", error)


def _store_error(path: Path, error: sqlite3.Error) -> StoreError:
    return StoreFull(f"the state database {path} cannot be written ({error}); free space or make it writable")


def _log_failure(_result: Any, error: StoreError | None) -> None:
    if error is not None:
        logger.warning("%s", error)


def _open(path: Path, use_reserve: Callable[[], bool]) -> tuple[sqlite3.Connection, int]:
    """The database, migrated, and how many reports were salvaged from a damaged predecessor."""
    try:
        return _connect(path), 0
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError) and "malformed" not in str(error):
            if ("disk I/O" in str(error) or "full" in str(error)) and use_reserve():  # what runs must be looked after
                return _open(path, lambda: False)
            raise NotUsable(
                f"the state database {path} cannot be opened ({error}); make its directory writable and free some space"
            ) from None
        saved = _salvage(path)
        aside = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}")
        _set_aside(path, aside)
        db = _connect(path)
        db.execute("BEGIN IMMEDIATE")
        for row in saved:
            rows.add_report(db, row)
        db.execute("COMMIT")
        logger.error(
            "the state database %s was damaged (%s); it is set aside as %s, %d undelivered reports were saved from it,"
            " running tasks are found again by their labels",
            path,
            error,
            aside.name,
            len(saved),
        )
        return db, len(saved)


def _connect(path: Path) -> sqlite3.Connection:
    """Raises sqlite3.DatabaseError for a damaged file, NotUsable for a newer schema (which is left untouched)."""
    fresh = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    os.close(fresh)
    db = sqlite3.connect(path, isolation_level=None, timeout=5.0, cached_statements=64)
    try:
        version = int(db.execute("PRAGMA user_version").fetchone()[0])
        if version > len(MIGRATIONS):
            raise NotUsable(
                f"the state database {path} was written by a newer version (schema {version}, this one knows"
                f" {len(MIGRATIONS)}); start that version, or point state_dir elsewhere"
            )
        verdict = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)
        db.execute("PRAGMA journal_mode = WAL")  # a file system without shared memory answers "delete": as durable
        db.execute("PRAGMA synchronous = FULL")
        _migrate(db, version)
        rows.open_tasks(db)  # every row must be readable, or the file is as good as damaged
        rows.reports(db)
    except ValueError as error:
        db.close()
        raise sqlite3.DatabaseError(str(error)) from None
    except BaseException:
        db.close()
        raise
    return db


def _migrate(db: sqlite3.Connection, version: int) -> None:
    for number in range(version, len(MIGRATIONS)):
        db.execute("BEGIN IMMEDIATE")
        for statement in MIGRATIONS[number]:
            db.execute(statement)
        db.execute(f"PRAGMA user_version = {number + 1}")
        db.execute("COMMIT")


def _salvage(path: Path) -> list[rows.OutboxRow]:
    """The reports that can still be read from a damaged file, row by row."""
    saved: list[rows.OutboxRow] = []
    try:
        db = sqlite3.connect(f"file:{quote(os.fsencode(path))}?mode=ro", uri=True)
    except sqlite3.Error:
        return saved
    try:
        ids = [int(found[0]) for found in db.execute("SELECT id FROM outbox ORDER BY id")]
    except (sqlite3.Error, ValueError):
        ids = list(range(1, 1001))  # the index is gone: the rows may still be found by their ids
    for report_id in ids:
        try:
            row = rows.report_by_id(db, report_id)
        except (sqlite3.Error, ValueError, TypeError):
            continue
        if row is not None:
            saved.append(row)
    db.close()
    return saved


def _set_aside(path: Path, aside: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        part = path.with_name(path.name + suffix)
        if part.exists():
            part.replace(aside.with_name(aside.name + suffix))
