"""Lines that repeat: the first ones of a minute are written, the others are counted."""

from __future__ import annotations

import logging
import threading
import time
from typing import Callable, NamedTuple

FIRST = 20
PERIOD = 60.0

Kind = tuple[int, str, int, str, str]


class Summary(NamedTuple):
    """How many lines of one kind were held back, and the last of them."""

    held: int
    last: logging.LogRecord


class Repeats:
    """Lines of one kind have the same level, place in the source, template and task. Safe from any thread.

    So what tells of another task is never held back. Neither are lines at debug level, which somebody asked for, and
    lines with `extra=EVERY`. The lock guards all fields; they are emptied every minute, which bounds them. *wake* is
    called when there is something to sum up later.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._lock = threading.Lock()
        self._seen: dict[Kind, int] = {}
        self._held: dict[Kind, Summary] = {}
        self._until = 0.0

    def held(self, record: logging.LogRecord, task: str) -> bool:
        """Whether *record* is one too many; then it is counted."""
        if record.levelno <= logging.DEBUG or getattr(record, "every", False):
            return False
        kind = (record.levelno, record.pathname, record.lineno, str(record.msg), task)
        with self._lock:
            if not self._seen:
                self._until = time.monotonic() + PERIOD
            self._seen[kind] = self._seen.get(kind, 0) + 1
            if self._seen[kind] <= FIRST:
                return False
            first = not self._held
            self._held[kind] = Summary(self._seen[kind] - FIRST, record)
        if first:
            self._wake()
        return True

    def due(self) -> float | None:
        """In how many seconds summaries are due; None when there is nothing to sum up."""
        with self._lock:
            return max(0.0, self._until - time.monotonic()) if self._held else None

    def summaries(self, *, now: bool = False) -> list[Summary]:
        """What was held back, once the minute is over or, at the end of the log, *now*. A new minute begins."""
        with self._lock:
            if not self._seen or (time.monotonic() < self._until and not now):
                return []
            found, self._held, self._seen = list(self._held.values()), {}, {}
            return found
