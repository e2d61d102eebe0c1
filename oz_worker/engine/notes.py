"""What `status --explain` reads: facts in the database that nothing else needs, written now and then.

Nothing here is on a task's way: a rejection is noted in memory and written at most once a second; what tasks wait for
and why none is taken is looked at by upkeep, every few seconds, and written when it has changed. While the database
cannot be written nothing of this is tried: a commit is shared, and the last bytes of a disk are for tasks.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections import deque
from typing import Any, Callable, Iterable, Mapping

from oz_worker import rows
from oz_worker.errors import StoreError
from oz_worker.model import Key, Refusal
from oz_worker.rows import TaskRow
from oz_worker.store import Store

REJECTIONS, WAITS, INTAKE = "rejections", "waits", "intake"
"""The names of the facts."""
KEPT = 50
"""So many of the last rejections are kept, over restarts too."""
BEAT_SECONDS = 60.0
"""What is in the way of new tasks is written so often also when nothing has changed: it says that we can write."""
_PAUSE = 1.0
_MOST_WAITS = 500
_LONGEST = 600


class Notes:
    """The notes of one worker. `rejected` may be called from any thread, `look` by upkeep's alone; neither blocks.

    The lock guards `_fresh` and `_next`. *waits* says what each task waits for, *troubles* what is in the way of new
    ones, *full* how many there are when there is room for no more; *hide* takes secrets out of everything else.
    """

    def __init__(
        self,
        store: Store,
        waits: Callable[[], Iterable[tuple[TaskRow, str]]],
        troubles: Callable[[], Iterable[str]],
        full: Callable[[], str],
        hide: Callable[[str], str] = str,
    ) -> None:
        self._store = store
        self._waits = waits
        self._troubles = troubles
        self._full = full
        self._hide = hide
        self._lock = threading.Lock()
        self._fresh: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._next = 0.0  # monotonic: not written again before then
        self._written: dict[str, Any] = {}  # the facts as they were written last; upkeep's thread only
        self._beat = 0.0  # monotonic: the last sign that we write; upkeep's thread only

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
        """Write what has changed since the last look."""
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
