"""One instance directory being served: its lock, its database, its backend."""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
from pathlib import Path
from typing import Callable

from oz_worker import rows
from oz_worker.backends.base import Backend
from oz_worker.errors import StoreError
from oz_worker.rows import TaskRow
from oz_worker.slots import Slot
from oz_worker.store import Store, peek

Work = Callable[["sqlite3.Connection | None"], object]
Then = Callable[[bool], None]

logger = logging.getLogger(__name__)


def misfit(path: Path, *, worker_id: str, backend: str, uid: int, endpoint: str = "") -> str:
    """Why a worker with these facts cannot serve the instance in *path*, "" when it can (design 12, rule 2).

    Other workers' tasks would be reported under our name; another backend's units would not be understood. Reports
    that only wait to be sent do not matter.
    """

    def look(db: sqlite3.Connection) -> str:
        worker = json.loads(rows.facts(db).get("worker", "{}")).get("worker_id", worker_id)
        if worker != worker_id:
            return f"it belongs to the worker {worker}"
        for row in rows.open_tasks(db):
            if (row.backend, row.uid) != (backend, uid):
                return f"its task {row.key.task_id} runs with the {row.backend} backend as user {row.uid}"
            if row.endpoint != endpoint:
                return f"its task {row.key.task_id} runs on {row.endpoint or 'this host'}, not on {endpoint or 'it'}"
        return ""

    return peek(path / "state.db", look) or ""


class Instance:
    """What tasks of one instance share. Rows are changed on the store's thread only, by `change`."""

    def __init__(self, slot: Slot, store: Store, backend: Backend) -> None:
        self.slot = slot
        self.id = slot.id
        self.path: Path = slot.path
        self.store = store
        self.backend = backend
        self._lock = threading.Lock()
        self._unsaved: dict[str, TaskRow] = {}  # guarded by _lock, as is the next; rows whose last write failed
        self._unreleased: set[int] = set()  # held reports whose release failed

    def change(self, row: TaskRow, change: Callable[[TaskRow], object], then: Then | None = None) -> None:
        """Change *row* in memory and in the database in one transaction; *then(saved)* is called on the store's thread.

        On a disk that cannot be written the memory leads: the change stands, *then(False)* is called, and the row is
        written again by `save_unsaved`. Safe from any thread; changes apply in the order in which they are posted.
        """
        self.transact(row, lambda _db: change(row), then)

    def transact(self, row: TaskRow, work: Work, then: Then | None = None) -> None:
        """Like `change`, for work that also writes other rows. *work* runs exactly once, even on a full disk.

        It is called with None instead of a connection when no transaction could be begun.
        """
        ran: list[bool] = []

        def whole(db: sqlite3.Connection) -> None:
            ran.append(True)
            work(db)
            rows.save_task(db, row)

        def done(_result: object, error: StoreError | None) -> None:
            if error is not None:
                if not ran:
                    work(None)
                self._remember(row, error)
            if then is not None:
                then(error is None)

        self.store.post(whole, done)

    def save_unsaved(self) -> None:
        """Try again to write what a full disk refused. Safe from any thread."""
        with self._lock:
            late = list(self._unsaved.values())
            held = list(self._unreleased)
        if not late and not held:
            return

        def work(db: sqlite3.Connection) -> None:
            for row in late:
                rows.save_task(db, row)
            for report_id in held:
                rows.release_report(db, report_id)

        def done(_result: object, error: StoreError | None) -> None:
            if error is None:
                with self._lock:
                    self._unreleased.difference_update(held)
                    for row in late:
                        self._unsaved.pop(row.unit, None)
                logger.info("the state database can be written again; %d tasks made good", len(late))

        self.store.post(work, done)

    def release_later(self, report_id: int) -> None:
        """The release of a held report could not be written: `save_unsaved` does it."""
        with self._lock:
            self._unreleased.add(report_id)

    def _remember(self, row: TaskRow, error: StoreError) -> None:
        with self._lock:
            first = not self._unsaved
            self._unsaved[row.unit] = row
        if first:
            logger.error("%s; reports are kept in memory and still delivered", error)
