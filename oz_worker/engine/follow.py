"""`task_output: log`: the output of running tasks, redacted, line by line in the worker's own log."""

from __future__ import annotations

import codecs
import logging
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


class Source(NamedTuple):
    """A unit whose output is followed."""

    key: Key
    unit: Unit
    file: Path


class _Reading:
    """How far one file has been shown."""

    def __init__(self, redactor: Redactor) -> None:
        self.offset = 0
        self.line = ""
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.redactor = redactor
        self.stream = RedactedStream(redactor)

    def begin_behind(self, notice: bytes) -> None:
        """The file was cut, perhaps in the middle of a secret."""
        self.offset = len(notice)
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
        for _ in range(_size(source.file) // PIECE + 1):  # not to its end: what it left running may write for ever
            with self._lock:
                if not self._show(source):
                    break
        with self._lock:
            reading = self._readings.pop(source.unit.name, None)
        if reading is not None:
            self._log(source, reading, reading.stream.flush() + b"\n")

    @vitals.essential("output")
    def _run(self) -> None:
        more = False
        while not self._stop.wait(SHORT_PAUSE if more else PAUSE_SECONDS):
            more = False
            vitals.stamp()
            for source in self._sources():
                with self._lock:
                    more = self._show(source) or more
                vitals.stamp()

    def _show(self, source: Source) -> bool:
        """Show the next piece; whether there may be more. Requires holding the lock."""
        if source.unit.secrets is None:
            return False  # no longer known: nothing can be redacted
        reading = self._readings.get(source.unit.name)
        if reading is None:
            reading = self._readings[source.unit.name] = _Reading(self._known.redactor(source.unit.secrets))
        try:
            with source.file.open("rb") as file:
                if file.seek(0, 2) < reading.offset:  # it was cut at task_log_max
                    self._log(source, reading, reading.stream.flush() + b"\n")
                    file.seek(0)
                    notice = notice_of(file.read(PIECE))
                    self._log(source, reading, notice)
                    reading.begin_behind(notice)
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
        for line in lines:
            if line:
                more = f" [{len(line) - LONGEST_LINE} more characters]" if len(line) > LONGEST_LINE else ""
                logger.info("task %s | %s%s", source.key, line[:LONGEST_LINE], more, extra=EVERY)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0
