"""`task_output: log`: the output of running tasks, redacted, line by line in the worker's own log."""

from __future__ import annotations

import codecs
import logging
import os
import threading
from pathlib import Path
from typing import Callable, Iterable, NamedTuple

from oz_worker import threads, vitals
from oz_worker.about import EVERY
from oz_worker.backends.base import Unit
from oz_worker.backends.output import notice_of
from oz_worker.known import Known
from oz_worker.model import Key
from oz_worker.redact import RedactedStream, Redactor

logger = logging.getLogger("oz_worker.task")

PAUSE_SECONDS = 0.5
SHORT_PAUSE = 0.01
"""While there is more to show: whoever waits for the lock gets it."""
PIECE = 64 * 1024
"""Shown at a time of each task: one that never stops writing holds up neither the others nor the watchdog's stamp."""
LONGEST_LINE = 8 * 1024
MOST_LINES = 10_000
"""Of one piece; a task that prints nothing but ends of lines would cost a minute for each of its megabytes."""
MOST_BEHIND = 4 * 1024 * 1024
"""Of what is further behind only the end is shown: the log's queue has to hold the lines of others too."""
_HEAD = 1024
_LEFT_OUT = b"\n[oz_worker: %d bytes came too fast for the log and are left out]\n"


class Source(NamedTuple):
    """A unit whose output is followed."""

    key: Key
    unit: Unit
    file: Path


class _Reading:
    """How far one file has been shown."""

    def __init__(self, redactor: Redactor) -> None:
        self.offset = 0
        self.head = b""  # how the file begins, by which one that was cut and has grown again is told
        self.over = False  # the rest was shown
        self.line = ""
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.redactor = redactor
        self.stream = RedactedStream(redactor)

    def begin_at(self, offset: int) -> None:
        """Something is missing before *offset*: perhaps it is in the middle of a secret."""
        self.offset = offset
        self.stream = RedactedStream(self.redactor, torn=True)


class Follower:
    """Thread `output`: owned by the daemon, blocks in `Event.wait` (woken by `stop`) and in reads of local files.

    The lock guards the readings and is held while a piece of a file is shown, so that a task's own thread, which shows
    the rest before the file is removed, and this one never show a piece twice.
    """

    def __init__(self, sources: Callable[[], Iterable[Source]], known: Known) -> None:
        self._sources = sources
        self._known = known
        self._lock = threading.Lock()
        self._readings: dict[str, _Reading] = {}
        self._stop = threading.Event()

    def start(self, on_death: threads.OnDeath) -> None:
        """Start the thread."""
        threads.start("output", self._run, on_death)

    def stop(self) -> None:
        """End it; it needs no joining, it owns nothing."""
        self._stop.set()

    def finish(self, source: Source) -> None:
        """Show what is left of an ended task's output. Called by the task's thread before the file is removed."""
        for _ in range(MOST_BEHIND // PIECE + 2):  # not to its end: what it left running may write for ever
            with self._lock:
                if not self._show(source):
                    break
        with self._lock:
            reading = self._readings.get(source.unit.name)
            if reading is not None and not reading.over:
                reading.over = True
                self._log(source, reading, reading.stream.flush() + b"\n")

    @vitals.essential("output")
    def _run(self) -> None:
        more = False
        while not self._stop.wait(SHORT_PAUSE if more else PAUSE_SECONDS):
            more = False
            vitals.stamp()
            with self._lock:
                before = set(self._readings)
            sources = list(self._sources())
            for source in sources:
                with self._lock:
                    more = self._show(source) or more
                vitals.stamp()
            with self._lock:  # a task may be there for long after its end: only then it is not begun anew
                for name in before - {source.unit.name for source in sources}:
                    del self._readings[name]

    def _show(self, source: Source) -> bool:
        """Show the next piece; whether there may be more. Requires holding the lock."""
        if source.unit.secrets is None:
            return False  # no longer known: nothing can be redacted
        reading = self._readings.get(source.unit.name)
        if reading is None:
            redactor = self._known.redactor_of(source.unit, source.unit.secrets, shown=source.key)
            reading = self._readings[source.unit.name] = _Reading(redactor)
        if reading.over:
            return False
        try:
            with source.file.open("rb") as file:
                head = file.read(_HEAD)
                size = file.seek(0, os.SEEK_END)
                if size < reading.offset or not head.startswith(reading.head):  # it was cut at task_log_max
                    notice = notice_of(head)
                    self._log(source, reading, reading.stream.flush() + b"\n" + notice)
                    reading.begin_at(len(notice))
                if (left_out := size - reading.offset - MOST_BEHIND) > 0:
                    self._log(source, reading, reading.stream.flush() + _LEFT_OUT % left_out)
                    reading.begin_at(reading.offset + left_out)
                reading.head = head
                file.seek(reading.offset)
                piece = file.read(PIECE)
        except OSError:
            return False  # not there yet, or already removed
        reading.offset += len(piece)
        self._log(source, reading, reading.stream.feed(piece))
        return len(piece) == PIECE

    @staticmethod
    def _log(source: Source, reading: _Reading, shown: bytes) -> None:
        *lines, reading.line = (reading.line + reading.decoder.decode(shown)).split("\n")
        if len(reading.line) > LONGEST_LINE:
            lines, reading.line = [*lines, reading.line], ""
        if (left_out := len(lines) - MOST_LINES) > 0:
            lines[MOST_LINES // 2 : -MOST_LINES // 2] = [f"[oz_worker: {left_out} lines left out: too many at once]"]
        for line in lines:
            if line:
                more = f" [{len(line) - LONGEST_LINE} more characters]" if len(line) > LONGEST_LINE else ""
                logger.info("task %s | %s%s", source.key, line[:LONGEST_LINE], more, extra=EVERY)
