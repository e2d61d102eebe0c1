"""Lines that repeat: the first ones of a minute are written, the others are counted."""

from __future__ import annotations

import logging
import threading
import time
from typing import Callable, NamedTuple

from oz_worker.model import Key

FIRST = 20
PERIOD = 60.0
MOST_KINDS = 5000
"""So many are told apart: a log whose reader has stopped has no end of its minute."""

Kind = tuple[int, str, int, str, str]


class Line(NamedTuple):
    """One record as it will be written, without secrets, but for the date, its ids as fields and its shape."""

    created: float
    level: str
    logger: str
    thread: str
    message: str
    trace: str
    task: Key | None
    connection: str


class Summary(NamedTuple):
    """How many lines of one kind were held back, and the last of them."""

    held: int
    last: Line


class Repeats:
    """Lines of one kind have the same level, place in the source, template and task. Safe from any thread.

    So what tells of another task is never held back. Neither are lines at debug level, which somebody asked for, and
    lines with `extra=EVERY`. What is kept of a line has its secrets masked already: those of its task may be forgotten
    when it is summed up. The lock guards all fields. *wake* is called when there is something to sum up later.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._lock = threading.Lock()
        self._seen: dict[Kind, int] = {}
        self._held: dict[Kind, Summary] = {}
        self._until = 0.0

    def held(self, record: logging.LogRecord, line: Line) -> bool:
        """Whether *record* is one too many; then it is counted, and *line* is how it would look."""
        if record.levelno <= logging.DEBUG or getattr(record, "every", False):
            return False
        kind = (record.levelno, record.pathname, record.lineno, str(record.msg), str(line.task or ""))
        with self._lock:
            if len(self._seen) >= MOST_KINDS and kind not in self._seen:
                self._seen.clear()
            if not self._seen and not self._held:
                self._until = time.monotonic() + PERIOD
            self._seen[kind] = self._seen.get(kind, 0) + 1
            if self._seen[kind] <= FIRST or (len(self._held) >= MOST_KINDS and kind not in self._held):
                return False
            first = not self._held
            before = self._held.get(kind)
            self._held[kind] = Summary(before.held + 1 if before else 1, line)
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
            if not (self._seen or self._held) or (time.monotonic() < self._until and not now):
                return []
            found, self._held, self._seen = list(self._held.values()), {}, {}
            return found
