"""What the server must hear, in order, until it has heard it.

A report is durable before it is sent, sent in order, and deleted when the peer has proven to have read it. Claims and
rejections are in memory, in the same order: a claim is sent again while its task's row says that it is not
acknowledged, a rejection dies with its connection (late it could refuse a task that was assigned anew).
"""

from __future__ import annotations

import functools
import itertools
import logging
import threading
import time
from collections import deque
from typing import Callable, Iterable

from oz_worker import rows
from oz_worker.errors import StoreError
from oz_worker.model import Key, ReportKind
from oz_worker.rows import OutboxRow
from oz_worker.store import Store

logger = logging.getLogger(__name__)


class Entry:
    """One frame on its way. `store` is None for what is not durable by nature (claims, rejections)."""

    __slots__ = ("connection", "on_ack", "row", "serial", "store")

    def __init__(self, row: OutboxRow, store: Store | None, on_ack: Callable[[], None] | None, connection: int) -> None:
        self.row = row
        self.store = store
        self.on_ack = on_ack
        self.connection = connection  # a rejection's only connection; 0 for everything else
        self.serial = 0


class Outbox:
    """All undelivered frames of all instances served. The lock guards every field below it.

    `take`, `acknowledged`, `opened`, `closed` are called by the main thread, the rest by the store's and the tasks'
    threads; nothing blocks and nothing is called back while the lock is held, except that *wake* only writes a byte.
    """

    def __init__(self, origin: str, wake: Callable[[], None]) -> None:
        self.origin = origin
        self._wake = wake
        self._lock = threading.Lock()
        self._serials = itertools.count(1)
        self._waiting: dict[int, Entry] = {}  # everything released and unacknowledged, in order
        self._claims: dict[str, list[int]] = {}  # serials of the claims in there, by unit; may name some that are gone
        self._unsent: deque[Entry] = deque()  # what this connection has not been given yet
        self._sent: deque[tuple[int, Entry]] = deque()  # (count on this connection, entry)
        self._count = 0
        self._connection = 0  # how many connections there have been; the number of the present one
        self._connected = False

    # -- the link's side

    def opened(self) -> None:
        """A new connection: everything undelivered is to be handed out again."""
        with self._lock:
            self._connection += 1
            self._connected = True
            self._count = 0
            self._sent.clear()
            self._drop_repeats()
            self._unsent = deque(entry for entry in self._waiting.values() if entry.row.origin == self.origin)

    def _drop_repeats(self) -> None:
        """A redelivery was answered once more on the last connection; on this one once is enough. Holds the lock."""
        seen: set[str] = set()
        for serial, entry in list(self._waiting.items()):
            if entry.store is None and entry.row.frame in seen:
                del self._waiting[serial]
            seen.add(entry.row.frame)

    def closed(self) -> None:
        """The connection is over: rejections die with it."""
        with self._lock:
            self._connected = False
            self._unsent.clear()
            self._sent.clear()
            for serial in [s for s, entry in self._waiting.items() if entry.connection]:
                del self._waiting[serial]

    def take(self, limit: int) -> list[str]:
        """The next frames for this connection, at most *limit*."""
        frames: list[str] = []
        with self._lock:
            while self._unsent and len(frames) < limit:
                entry = self._unsent.popleft()
                if entry.serial not in self._waiting:
                    continue  # withdrawn
                self._count += 1
                self._sent.append((self._count, entry))
                frames.append(entry.row.frame)
        return frames

    def acknowledged(self, count: int) -> None:
        """The peer has read the first *count* frames of this connection."""
        done: list[Entry] = []
        with self._lock:
            while self._sent and self._sent[0][0] <= count:
                entry = self._sent.popleft()[1]
                if self._waiting.pop(entry.serial, None) is not None:
                    done.append(entry)
                    if self._claims.get(entry.row.unit) == [entry.serial]:
                        del self._claims[entry.row.unit]
        self._forget(done)

    def unfinished(self) -> bool:
        """Whether anything meant for our server is undelivered."""
        with self._lock:
            return any(entry.row.origin == self.origin for entry in self._waiting.values())

    def undelivered(self) -> int:
        """How many reports meant for our server are undelivered."""
        with self._lock:
            return sum(1 for e in self._waiting.values() if e.row.origin == self.origin and e.store is not None)

    def age(self) -> float:
        """For how many seconds the oldest of them has been waiting, over restarts too; 0 when there is none."""
        with self._lock:
            made = [
                e.row.created_at for e in self._waiting.values() if e.row.origin == self.origin and e.store is not None
            ]
        return max(0.0, time.time() - min(made)) if made else 0.0

    @property
    def connection(self) -> int:
        """The number of the present connection, for `reject`."""
        return self._connection

    # -- the engine's side

    def claim(self, key: Key, unit: str, origin: str, frame: str, on_ack: Callable[[], None]) -> None:
        """Say that a task is ours; *on_ack* is called on the main thread once the server has read it."""
        row = OutboxRow(unit, key, ReportKind.CLAIMED, origin, frame, False, time.time())
        self._add(Entry(row, None, on_ack, 0))

    def reject(self, key: Key, frame: str, connection: int) -> None:
        """Refuse an assignment that came in on *connection*."""
        row = OutboxRow("", key, ReportKind.REJECTED, self.origin, frame, False, time.time())
        self._add(Entry(row, None, None, connection))

    def send(self, row: OutboxRow, store: Store, on_ack: Callable[[], None] | None = None) -> None:
        """A report that is durable (`row.id`) or could not be made so (0): on its way until acknowledged."""
        self._add(Entry(row, store, on_ack, 0))

    def send_durably(self, row: OutboxRow, store: Store, then: Callable[[], None]) -> None:
        """Put a report that needs no task's row into the database, then on its way, then call *then*. Blocks never."""

        def done(report_id: int | None, error: object) -> None:
            row.id = report_id or 0 if error is None else 0
            self.send(row, store)
            then()

        store.post(functools.partial(rows.add_report, row=row), done)

    def withdraw_claims(self, unit: str) -> None:
        """Claims of a unit about which nothing is left to say: its report is acknowledged."""
        with self._lock:
            for serial in self._claims.pop(unit, ()):
                self._waiting.pop(serial, None)

    def repeat(self, row: OutboxRow) -> None:
        """Send once more what the database has already; the server asked for it again."""
        self._add(Entry(row, None, None, 0))

    def store_late(self) -> None:
        """Try again to make durable what exists in memory only, because the disk was full."""
        with self._lock:
            late = [entry for entry in self._waiting.values() if entry.store is not None and entry.row.id == 0]
        for entry in late:
            assert entry.store is not None
            entry.store.post(functools.partial(rows.add_report, row=entry.row), functools.partial(self._stored, entry))

    def _stored(self, entry: Entry, report_id: int | None, error: StoreError | None) -> None:
        if error is not None or report_id is None or entry.store is None:
            return
        entry.row.id = report_id
        with self._lock:
            gone = entry.serial not in self._waiting
        if gone:  # acknowledged while it was being written
            entry.store.post(functools.partial(rows.delete_reports, report_ids=[report_id]))

    def stores_in_use(self) -> set[Store]:
        """The databases that still hold undelivered reports."""
        with self._lock:
            return {entry.store for entry in self._waiting.values() if entry.store is not None}

    def _add(self, entry: Entry) -> None:
        with self._lock:
            if entry.connection and (entry.connection != self._connection or not self._connected):
                return  # its connection is gone
            entry.serial = next(self._serials)
            self._waiting[entry.serial] = entry
            if entry.row.kind is ReportKind.CLAIMED:
                self._claims.setdefault(entry.row.unit, []).append(entry.serial)
            if self._connected and entry.row.origin == self.origin:
                self._unsent.append(entry)
        self._wake()

    def _forget(self, done: Iterable[Entry]) -> None:
        """Delete acknowledged rows and tell their owners. A crash before the commit only sends them once more."""
        by_store: dict[Store, list[int]] = {}
        for entry in done:
            if entry.on_ack is not None:
                entry.on_ack()
            if entry.store is not None and entry.row.id:
                by_store.setdefault(entry.store, []).append(entry.row.id)
        for store, ids in by_store.items():
            store.post(functools.partial(rows.delete_reports, report_ids=ids), _log_failure)


def _log_failure(_result: object, error: StoreError | None) -> None:
    if error is not None:
        logger.warning("acknowledged reports stay in the database for now: %s", error)
