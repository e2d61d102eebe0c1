"""Log lines on stderr or in a file, written by a thread of their own.

A reader of stderr that stops, or a disk that is full, must not stop the link or a task: lines go through a bounded
queue, what does not fit is counted, and the count is written once there is room again (design 12, rule 20).
"""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import sys
import threading
import time
import traceback
from datetime import datetime
from types import TracebackType

from oz_worker import threads, vitals
from oz_worker.redact import Redactor

logger = logging.getLogger(__name__)

MOST_LINES = 10_000
CLOSE_SECONDS = 1.0
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warn": logging.WARNING, "warning": logging.WARNING}
LEVELS["error"] = logging.ERROR

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")


def lines_of(text: str) -> str:
    """*text* such that a reader of the log cannot take any of it for another line of ours, nor a terminal for orders.

    Lines after the first are indented; control characters (ESC too) and other ends of lines become `\\xNN`; tabs stay.
    """
    shown = _CONTROLS.sub(_escape, text.rstrip("\n"))
    return shown.replace("\n", "\n  ")


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("ascii", "backslashreplace").decode() if match[0] > "\x7f" else f"\\x{ord(match[0]):02x}"


class Logs(logging.Handler):
    """The root handler, and the thread `log` that writes. A context manager; safe from any thread.

    The thread is owned by this object, blocks in its queue (woken by a line, or by None: its stop) and in `write`
    (woken by nobody: a blocked reader holds it for ever, which is why nobody waits for it longer than a second).
    """

    def __init__(
        self,
        *,
        level: str,
        form: str,
        file: str,
        secrets: tuple[str, ...],
        on_death: threads.OnDeath = lambda _name, _error: None,
    ) -> None:
        super().__init__(LEVELS[level])
        self._on_death = on_death
        self._json = form == "json"
        self._file = file
        self._redact = Redactor(secrets)
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._counts = threading.Lock()  # guards the three numbers below
        self._waiting = 0
        self._dropped = 0
        self.dropped_total = 0
        self._descriptor = 2
        self._reopen = False
        self._finished = False  # set by its thread as the last thing it does
        self._thread: threading.Thread | None = None
        self._colour = not self._json and not file and sys.stderr.isatty()

    def __enter__(self) -> Logs:
        if self._file:
            self._descriptor = _open(self._file)
        root = logging.getLogger()
        root.addHandler(self)
        root.setLevel(self.level)
        self._thread = threads.start("log", self._write_lines, self._on_death)
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        logging.getLogger().removeHandler(self)
        self.finish()

    def finish(self) -> bool:
        """Write what is queued, waiting at most a second for a reader that has stopped; whether all was written."""
        self._queue.put(None)
        if self._thread is not None and not self._thread.is_alive():  # it died: what it left is tried once more
            self._thread = threads.start("log", self._write_lines, self._on_death)
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)
        return self._finished

    def reopen(self) -> None:
        """Open the log file anew (after rotation); takes effect with the next line."""
        self._reopen = True

    def emit(self, record: logging.LogRecord) -> None:
        """Format here, because arguments may change; write elsewhere."""
        try:
            line = self._as_json(record) if self._json else self._as_text(record)
        except Exception:  # a bad format string must not hurt who logs
            line = f"log line lost: {record.msg!r}"
        with self._counts:
            if self._waiting >= MOST_LINES:
                self._dropped += 1
                self.dropped_total += 1
                return
            self._waiting += 1
        self._queue.put(line + "\n")

    def stacks(self) -> None:
        """All threads' stacks with their names, as one log record."""
        frames = sys._current_frames()
        parts = []
        for thread in threading.enumerate():
            frame = frames.get(thread.ident or 0)
            if frame is not None:
                parts.append(f"--- {thread.name}\n" + "".join(traceback.format_stack(frame)))
        logger.warning("stacks of %d threads\n%s", len(parts), "".join(parts))

    @vitals.essential("log")
    def _write_lines(self) -> None:
        while (line := vitals.take(self._queue)) is not None:
            with self._counts:
                self._waiting -= 1
                dropped, self._dropped = (self._dropped, 0) if self._waiting < MOST_LINES // 2 else (0, self._dropped)
            if dropped:
                self._write(
                    f"{_now()} WARNING {dropped} log lines were dropped: the reader of the log did not keep up\n"
                )
            self._write(line)
        self._finished = True

    def _write(self, text: str) -> None:
        if self._reopen and self._file:
            self._reopen = False
            self._replace()
        raw = text.encode("utf-8", "backslashreplace")
        while raw:
            try:
                raw = raw[os.write(self._descriptor, raw) :]
            except BlockingIOError:  # somebody made our stderr non-blocking
                time.sleep(0.05)
            except OSError:  # closed, or its disk is full: the line is lost, the worker goes on
                with self._counts:
                    self.dropped_total += 1
                return

    def _replace(self) -> None:
        try:
            fresh = _open(self._file)
        except OSError as error:
            self._write(f"{_now()} ERROR the log file {self._file} cannot be opened anew ({error.strerror})\n")
            return
        os.close(self._descriptor)
        self._descriptor = fresh

    def _as_text(self, record: logging.LogRecord) -> str:
        level = record.levelname
        if self._colour:
            level = (
                {"WARNING": "\x1b[33m", "ERROR": "\x1b[31m", "CRITICAL": "\x1b[31m"}.get(level, "") + level + "\x1b[0m"
            )
        return f"{_now(record.created)} {level} {lines_of(self._redact(record.getMessage() + _trace(record)))}"

    def _as_json(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": _now(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "thread": record.threadName,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["traceback"] = _trace(record).lstrip("\n")
        return self._redact(json.dumps(fields, ensure_ascii=False))


def _now(at: float | None = None) -> str:
    moment = datetime.fromtimestamp(time.time() if at is None else at).astimezone()
    return moment.isoformat(timespec="milliseconds")


def _trace(record: logging.LogRecord) -> str:
    if not record.exc_info or record.exc_info[1] is None:
        return ""
    return "\n" + "".join(traceback.format_exception(record.exc_info[1])).rstrip()


def _open(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
