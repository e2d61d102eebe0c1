"""What `status` reads: facts in the database that nothing else needs.

Nothing here is on a task's way: facts of the daemon and rejections are kept in memory until they are written, the
latter at most once a second; what tasks wait for and why none is taken is looked at by upkeep, every few seconds, and
written when it has changed. While the database cannot be written nothing of this is tried: a commit is shared, and the
last bytes of a disk are for tasks. Once its disk has room again upkeep writes what is owed, and so ends that state.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
import threading
import time
from collections import deque
from typing import Any, Callable, Iterable, Mapping

from oz_worker import rows
from oz_worker.engine import disk
from oz_worker.errors import StoreError
from oz_worker.model import Key, Refusal
from oz_worker.rows import TaskRow
from oz_worker.store import Store

logger = logging.getLogger(__name__)

REJECTIONS, WAITS, INTAKE, REPAIRED = "rejections", "waits", "intake", "repaired"
"""The names of the facts."""
KEPT = 50
"""So many of the last rejections are kept, over restarts too."""
BEAT_SECONDS = 60.0
"""What is in the way of new tasks is written so often also when nothing has changed: it says that we can write."""
_PAUSE = 1.0
_MOST_WAITS = 500
_LONGEST = 600


class Notes:
    """The notes of one worker. `note` and `rejected` may be called from any thread and do not block; `look` belongs to
    upkeep, and waits for the disk where the database is in trouble.

    The lock guards `_fresh`, `_next` and `_owed`. *waits* says what each task waits for, *troubles* what is in the way
    of new ones, *full* how many there are when there is room for no more; *hide* takes secrets out of everything else.
    """

    def __init__(
        self,
        store: Store,
        waits: Callable[[], Iterable[tuple[TaskRow, str]]],
        troubles: Callable[[], Iterable[str]],
        full: Callable[[], str],
        hide: Callable[[str], str],
    ) -> None:
        self._store = store
        self._waits = waits
        self._troubles = troubles
        self._full = full
        self._hide = hide
        self._lock = threading.Lock()
        self._fresh: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._next = 0.0  # monotonic: not written again before then
        self._owed: dict[str, str] = {}  # facts that are not known to be written, by name
        self._asked: dict[str, Callable[[], Mapping[str, Any]]] = {}
        self._told: set[str] = set()  # the kinds of trouble that the log has told; upkeep's thread only
        self._written: dict[str, Any] = {}  # the facts as they were written last; upkeep's thread only
        self._beat = 0.0  # monotonic: the last sign that we write; upkeep's thread only

    def note(self, name: str, fact: Mapping[str, Any]) -> None:
        """A fact of the daemon: written at once, or as soon as that can be."""
        with self._lock:
            self._owed[name] = json.dumps(fact)
        if not self._store.trouble:
            self._store.post(self._write_owed, self._paid)

    def ask(self, name: str, fact: Callable[[], Mapping[str, Any]]) -> None:
        """*fact* is asked for at each look, and written when it has changed. Call it before any look."""
        self._asked[name] = fact

    def rejected(self, key: Key, refusal: Refusal, why: str) -> None:
        """A task was refused."""
        now = time.monotonic()
        ids = {name: rows.storable(text)[:_LONGEST] for name, text in key._asdict().items()}
        with self._lock:
            self._fresh.append({**ids, "reason": refusal.wire, "why": self._hide(why)[:_LONGEST], "at": time.time()})
            due = now >= self._next
        if due:
            self._write_rejections()

    def look(self) -> None:
        """Write what has changed since the last look, and log what has come into the way of new tasks, or gone."""
        self._repair()
        with self._lock:
            owed = bool(self._owed)
        if owed and not self._store.trouble:
            self._store.post(self._write_owed, self._paid)
        self._write_rejections()
        # With the state in which it waited: who reads this knows the present one.
        found = sorted(
            (row.unit, [row.state.value, self._hide(text)[:_LONGEST]]) for row, text in self._waits() if text
        )
        self._put(WAITS, {"units": dict(found[:_MOST_WAITS])})
        if time.monotonic() - self._beat >= BEAT_SECONDS:
            self._written.pop(INTAKE, None)
        troubles = [why[:_LONGEST] for why in self._troubles()]
        self._put(INTAKE, {"troubles": troubles, "full": self._full()})
        for name, fact in self._asked.items():
            self._put(name, fact())
        self._log(troubles)

    def _log(self, troubles: list[str]) -> None:
        """The edges: each kind (what stands before the colon) when it comes, and that there is none any more. Threads
        have none: they are the watchdog's to tell.
        """
        kinds = {kind: why for why in troubles for kind, colon, _what in (why.partition(": "),) if colon}
        if fresh := [why for kind, why in kinds.items() if kind not in self._told]:
            logger.warning("not ready for new tasks: %s", "; ".join(fresh))
        elif self._told and not kinds:
            was = "; ".join(sorted(self._told))
            logger.info("nothing here is in the way of new tasks any more (it was: %s)", was)
        self._told = set(kinds)

    def _repair(self) -> None:
        """Nothing but a change that is written shows that the database can be written again."""
        if self._store.trouble and not disk.full(self._store.path.parent):
            text = json.dumps({"at": time.time()})
            with contextlib.suppress(StoreError):
                self._store.do(lambda db: rows.put_fact(db, REPAIRED, text))

    def _write_owed(self, db: sqlite3.Connection) -> dict[str, str]:
        """The newest of each, whatever they were when this was asked for."""
        with self._lock:
            owed = dict(self._owed)
        for name, text in owed.items():
            rows.put_fact(db, name, text)
        return owed

    def _paid(self, owed: dict[str, str] | None, error: StoreError | None) -> None:
        """Where the disk refused them, a later look tries again; the disk has its own alarms."""
        if owed is not None and error is None:
            with self._lock:
                self._owed = {name: text for name, text in self._owed.items() if owed.get(name) != text}

    def _put(self, name: str, fact: Mapping[str, Any]) -> None:
        if self._written.get(name) == fact or self._store.trouble:
            return
        self._written[name] = fact
        self._beat = time.monotonic() if name == INTAKE else self._beat
        text = json.dumps({**fact, "at": time.time()})

        def done(_result: object, error: StoreError | None) -> None:
            if error is not None:
                self._written.pop(name, None)  # the next look tries again; the disk has its own alarms

        self._store.post(lambda db: rows.put_fact(db, name, text), done)

    def _write_rejections(self) -> None:
        if self._store.trouble:
            return
        with self._lock:
            fresh = list(self._fresh)
            self._fresh.clear()
            self._next = time.monotonic() + _PAUSE
        if not fresh:
            return

        def write(db: sqlite3.Connection) -> None:
            known = json.loads(rows.facts(db).get(REJECTIONS, "{}")).get("last", [])
            rows.put_fact(db, REJECTIONS, json.dumps({"last": [*known, *fresh][-KEPT:]}))

        def done(_result: object, error: StoreError | None) -> None:
            if error is not None:  # a full disk, which may be why they were rejected
                with self._lock:
                    self._fresh = deque(sorted([*fresh, *self._fresh], key=lambda one: one["at"]), maxlen=KEPT)

        self._store.post(write, done)
