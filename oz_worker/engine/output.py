"""A task's output as people get to see it: a redacted tail in the report, a redacted bounded copy for a while."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from oz_worker.backends.base import Backend, Unit
from oz_worker.backends.output import HEADING, LONGEST_NOTICE, keep_end, notice_of, split_from_end_notice
from oz_worker.known import Known
from oz_worker.model import ExitFacts
from oz_worker.redact import RedactedStream, Redactor
from oz_worker.rows import TaskRow

logger = logging.getLogger(__name__)

TAIL_LINES, TAIL_BYTES = 20, 2048
CHUNK = 256 * 1024
MOST_BYTES = 1024 * 1024 * 1024
"""What the kept copies of an instance may take together; the oldest go first, whatever their age."""
BYTES_OF_A_FILE = 16 * 1024
"""What a file counts for besides its content, so that their number is bounded too (65,536 empty ones)."""


class Output:
    """Reads the raw output of units and shows it redacted. Safe from any thread; holds nothing of a task but secrets.

    When a task's secrets are no longer known (it ended while the worker was away), there is no tail and no copy.
    """

    def __init__(self, *, known: Known, longest_copy: int, retention: float, most: int = MOST_BYTES) -> None:
        self._known = known
        self._longest_copy = longest_copy
        self._retention = retention
        self._most = most
        self._copied = 0  # bytes since the last look at all copies; a race makes that look a little late at worst

    def learn(self, unit: Unit) -> None:
        """The log masks what is known of the unit's secrets now."""
        self._known.learn_of(unit.name, unit.secrets or (), shown=unit.key)

    def forget(self, unit: Unit) -> None:
        """The task is over."""
        self._known.learn_of(unit.name, ())

    def without_secrets(self, unit: Unit, facts: ExitFacts) -> ExitFacts:
        """*facts* whose sentences, which quote programs, engines and policies, can be shown; ids stay."""
        if not facts.detail and not facts.remains and not facts.uncancelled:
            return facts
        redact = self._redactor(unit)
        detail, remains, uncancelled = map(redact, (facts.detail, facts.remains, facts.uncancelled))
        return replace(facts, detail=detail, remains=remains, uncancelled=uncancelled)

    def tail(self, backend: Backend, unit: Unit) -> str:
        """The last lines of the unit's output, redacted, at most 20 lines and 2 KiB."""
        if unit.secrets is None:
            return ""
        wanted = TAIL_BYTES * 4
        raw, redactor = backend.tail(unit, wanted), self._redactor(unit)
        first, *others = HEADING.split(raw)
        masked = _masked_end(first, redactor, between_lines=len(raw) < wanted)
        masked += b"".join(_masked_end(part, redactor, between_lines=True) for part in others)
        text = masked.decode("utf-8", "replace").replace("\0", "").strip()
        lines = "\n".join(text.splitlines()[-TAIL_LINES:])
        return lines.encode()[-TAIL_BYTES:].decode("utf-8", "ignore")

    def hide(self, text: str) -> str:
        """*text* without any secret that is known now."""
        return self._known.everywhere(text)

    def copies(self, unit: Unit) -> bool:
        """Whether `keep_copy` would keep one."""
        return unit.secrets is not None and self._retention > 0

    def keep_copy(self, instance: Path, unit: Unit, row: TaskRow) -> None:
        """Copy the raw output, redacted, to the instance's `logs/`; it is deleted after the retention."""
        raw = instance / "units" / unit.name / "output.log"
        if unit.secrets is None or not self.copies(unit) or not _holds_something(raw):
            return
        copy = instance / "logs" / copy_name(row)
        try:
            copy.parent.mkdir(mode=0o700, exist_ok=True)
            keep_end(raw, self._longest_copy)
            with raw.open("rb") as source, open(copy, "wb", opener=_private) as target:
                _copy_redacted(source, target, self._redactor(unit))
                self._copied += target.tell() + BYTES_OF_A_FILE
        except OSError as error:
            logger.warning("no copy of the output of task %s was kept: %s", row.key, error)
        if self._copied > self._most // 8:
            self.expire(instance)

    def expire(self, instance: Path) -> None:
        """Delete copies older than the retention, and the oldest ones beyond what all together may take."""
        self._copied = 0
        left = self._most
        for age, size, copy in _copies(instance / "logs"):
            left -= size
            if age > self._retention or (left < 0 and left + size < self._most):  # the newest one stays
                with contextlib.suppress(OSError):
                    copy.unlink()

    def _redactor(self, unit: Unit) -> Redactor:
        return self._known.redactor_of(unit, unit.secrets or (), shown=unit.key)


def copy_name(row: TaskRow) -> str:
    """The file name of a kept copy: readable, and unique by its unit."""
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in row.key.task_id)[:40]
    return f"{safe}-{row.unit[:8]}.log"


def _masked_end(raw: bytes, redactor: Redactor, *, between_lines: bool) -> bytes:
    """The end of one output, cut off in front, perhaps between the lines of a secret that is wrapped over several."""
    stream = RedactedStream(redactor, torn=True, between_lines=between_lines)
    return stream.feed(raw) + stream.flush()


def _holds_something(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _copies(directory: Path) -> list[tuple[float, int, Path]]:
    """Age, size and path of each copy, the newest first."""
    found = []
    now = time.time()
    try:
        for entry in os.scandir(directory):
            with contextlib.suppress(OSError):
                about = entry.stat(follow_symlinks=False)
                found.append((now - about.st_mtime, about.st_size + BYTES_OF_A_FILE, Path(entry.path)))
    except OSError:
        return []  # there is none yet
    return sorted(found)


def _copy_redacted(source: BinaryIO, target: BinaryIO, redactor: Redactor) -> None:
    notice = notice_of(source.read(CHUNK))
    source.seek(len(notice))
    target.write(notice)
    # An engine may have cut it too, without a word, but not in a line.
    stream = RedactedStream(redactor, torn=True, between_lines=not notice)
    last = b""
    while chunk := source.read(CHUNK):
        whole = last + chunk
        target.write(stream.feed(whole[:-LONGEST_NOTICE]))
        last = whole[-LONGEST_NOTICE:]
    before, end = split_from_end_notice(last)
    target.write(stream.feed(before) + stream.flush(torn=bool(end)) + end)
