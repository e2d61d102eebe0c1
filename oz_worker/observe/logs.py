"""Log lines on stderr or in a file, written by a thread of their own.

A reader of stderr that stops, or a disk that is full, must not stop the link or a task: lines go through a bounded
queue, what does not fit is counted, and the count is written once there is room again (design 12, rule 20).
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import re
import sys
import threading
import time
import traceback
from datetime import datetime
from types import TracebackType

from oz_worker import about, threads, vitals
from oz_worker.model import Key
from oz_worker.observe.log_file import LogFile
from oz_worker.observe.repeats import Line, Repeats
from oz_worker.redact import Redactor

logger = logging.getLogger(__name__)

MOST_LINES = 10_000
MOST_CHARACTERS = 16 * 1024 * 1024
"""What may wait for a reader of the log that has stopped."""
CLOSE_SECONDS = 1.0
SLOW = "the reader of the log did not keep up"
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warn": logging.WARNING, "warning": logging.WARNING}
LEVELS["error"] = logging.ERROR

_OF_CONNECTIONS = ("oz_worker.link", "oz_worker.daemon")
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
        redact: Redactor,
        on_death: threads.OnDeath = lambda _name, _error: None,
    ) -> None:
        super().__init__(LEVELS[level])
        self._on_death = on_death
        self._json = form == "json"
        self._file = LogFile(file)
        self._redact = redact
        self._repeats = Repeats(lambda: self._queue.put(""))
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._counts = threading.Lock()  # guards the five fields below
        self._waiting = 0
        self._characters = 0
        self._dropped = 0  # and not yet told
        self.dropped_total = 0
        self._why = ""  # the last of them was dropped
        self._losing = False  # the line before could not be written; its thread's
        self._finished = False  # set by its thread as the last thing it does
        self._level_before = logging.WARNING
        self._thread: threading.Thread | None = None
        self._colour = not self._json and not file and sys.stderr.isatty()

    def __enter__(self) -> Logs:
        """Raises NotUsable when the log file cannot be opened."""
        self._file.open()
        root = logging.getLogger()
        root.addHandler(self)
        self._level_before = root.level
        root.setLevel(self.level)
        self._thread = threads.start("log", self._write_lines, self._on_death)
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        logging.getLogger().removeHandler(self)
        logging.getLogger().setLevel(self._level_before)
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
        self._file.reopen()

    def emit(self, record: logging.LogRecord) -> None:
        """Format and mask here, because arguments may change and secrets be forgotten; write elsewhere."""
        if self._waiting >= MOST_LINES:  # so that a flood costs little
            self._drop(SLOW)
            return
        try:
            line = self._line(record)
            if self._repeats.held(record, line):
                return
            text = self._shaped(line)
        except Exception:  # a bad format string must not hurt who logs
            text = self._own("ERROR", f"a line of the log could not be made ({record.pathname}:{record.lineno})")
        with self._counts:
            full = self._waiting >= MOST_LINES or self._characters + len(text) > MOST_CHARACTERS
            if not full:
                self._waiting += 1
                self._characters += len(text)
        if full:
            self._drop(SLOW)
        else:
            self._queue.put(text)

    def lost(self) -> dict[str, object]:
        """How many lines were lost so far, and why the last of them, for `status`."""
        with self._counts:
            return {"dropped": self.dropped_total, "why": self._why}

    def stacks(self) -> None:
        """All threads' stacks with their names, as one log record."""
        frames = sys._current_frames()
        parts = []
        for thread in threading.enumerate():
            frame = frames.get(thread.ident or 0)
            if frame is not None:
                parts.append(f"--- {thread.name}\n" + "".join(traceback.format_stack(frame)))
        logger.warning("stacks of %d threads\n%s", len(parts), "".join(parts), extra=about.EVERY)

    @vitals.essential("log")
    def _write_lines(self) -> None:
        while True:
            with contextlib.suppress(queue.Empty):
                text = self._queue.get(timeout=vitals.wait(self._repeats.due()))
                if text is None:
                    break
                self._take(text)
            self._sum_up()
        self._sum_up(now=True)
        self._finished = True

    def _take(self, text: str) -> None:
        """Write a line of the queue; before it, what was lost. An empty one only woke us."""
        if not text:
            return
        with self._counts:
            self._waiting -= 1
            self._characters -= len(text)
            dropped = self._dropped if self._waiting < MOST_LINES // 2 else 0
        if dropped:
            why = self._file.trouble or SLOW
            if self._file.write(self._own("WARNING", f"{dropped} log lines were dropped: {why}")):
                self._file.trouble = ""
                with self._counts:
                    self._dropped -= dropped
        self._write(text)

    def _sum_up(self, *, now: bool = False) -> None:
        for count, line in self._repeats.summaries(now=now):
            words = f"{count} more lines of this kind within a minute, the last: {line.message}"
            self._write(self._shaped(line._replace(message=words, trace="")))

    def _write(self, text: str) -> None:
        if not self._file.write(text):
            self._drop(self._file.trouble)
            if not self._losing:  # who starts to look for the reason has only stderr and `status`
                self._losing = True
                self._file.aside(self._own("ERROR", f"lines of the log are lost: {self._file.trouble}"))
            return
        self._losing = False
        if self._file.trouble and not self._dropped:  # it goes on into the old file
            trouble, self._file.trouble = self._file.trouble, ""
            self._file.write(self._own("ERROR", trouble))

    def _drop(self, why: str) -> None:
        with self._counts:
            self._dropped += 1
            self.dropped_total += 1
            self._why = why

    def _own(self, level: str, message: str) -> str:
        return self._shaped(Line(time.time(), level, logger.name, "log", message, "", None, ""))

    def _line(self, record: logging.LogRecord) -> Line:
        """Ids come from the arguments, else from the thread: what it is busy with (`oz_worker.about`)."""
        given = record.args if isinstance(record.args, tuple) else ()
        named = next((one for one in given if isinstance(one, Key)), None)
        return Line(
            record.created,
            record.levelname,
            record.name,
            record.threadName or "",
            self._redact(record.getMessage()),
            self._redact(_trace(record)),
            named or about.TASK.get(),
            about.CONNECTION.get(),
        )

    def _shaped(self, line: Line) -> str:
        return (self._as_json(line) if self._json else self._as_text(line)) + "\n"

    def _as_text(self, line: Line) -> str:
        level = line.level
        if self._colour:
            level = (
                {"WARNING": "\x1b[33m", "ERROR": "\x1b[31m", "CRITICAL": "\x1b[31m"}.get(level, "") + level + "\x1b[0m"
            )
        message = line.message
        if line.task is not None and line.task.task_id not in line.message:
            message += f" (task {line.task})"
        elif line.task is None and line.connection and line.connection not in line.message:
            message += f" (connection {line.connection})" if line.logger.startswith(_OF_CONNECTIONS) else ""
        return f"{_now(line.created)} {level} {lines_of(message + line.trace)}"

    def _as_json(self, line: Line) -> str:
        fields: dict[str, object] = {
            "time": _now(line.created),
            "level": line.level.lower(),
            "logger": line.logger,
            "thread": line.thread,
            "message": line.message,
        }
        if line.task is not None:
            fields["task"] = line.task.task_id
            if line.task.execution_id:
                fields["execution"] = line.task.execution_id
        if line.connection:
            fields["connection"] = line.connection
        if line.trace:
            fields["traceback"] = line.trace.lstrip("\n")
        # What JSON lets stand and terminals obey, or readers take for the end of a line.
        return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(fields, ensure_ascii=False))


def _now(at: float) -> str:
    return datetime.fromtimestamp(at).astimezone().isoformat(timespec="milliseconds")


def _trace(record: logging.LogRecord) -> str:
    if not record.exc_info or record.exc_info[1] is None:
        return ""
    return "\n" + "".join(traceback.format_exception(record.exc_info[1])).rstrip()
