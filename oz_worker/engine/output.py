"""A task's output as people get to see it: a redacted tail in the report, a redacted bounded copy for a while."""

from __future__ import annotations

import codecs
import dataclasses
import logging
import os
import time
from pathlib import Path
from typing import BinaryIO

from oz_worker.backends.base import Backend, Unit
from oz_worker.model import ExitFacts
from oz_worker.redact import RedactedStream, Redactor
from oz_worker.rows import TaskRow

logger = logging.getLogger(__name__)

TAIL_LINES, TAIL_BYTES = 20, 2048
CHUNK = 256 * 1024


class Output:
    """Reads the raw output of units and shows it redacted. Safe from any thread; holds no state of a task.

    When a task's secrets are no longer known (it ended while the worker was away), there is no tail and no copy.
    """

    def __init__(self, *, own_secrets: tuple[str, ...], longest_copy: int, retention: float) -> None:
        self._own_secrets = own_secrets
        self._longest_copy = longest_copy
        self._retention = retention

    def tail(self, backend: Backend, unit: Unit) -> str:
        """The last lines of the unit's output, redacted, at most 20 lines and 2 KiB."""
        if unit.secrets is None:
            return ""
        redact = Redactor((*self._own_secrets, *unit.secrets))
        # A secret may begin before what is shown: read more by the longest one, redact, then cut.
        raw = backend.tail(unit, TAIL_BYTES * 4 + redact.longest)
        text = redact(raw.decode("utf-8", "replace").replace("\0", "")).strip()
        lines = "\n".join(text.splitlines()[-TAIL_LINES:])
        return lines.encode()[-TAIL_BYTES:].decode("utf-8", "ignore")

    def shown(self, unit: Unit, facts: ExitFacts) -> ExitFacts:
        """*facts* without the secrets that an engine, a cluster or its policies may repeat in their words."""
        if not facts.detail and not facts.remains:
            return facts
        redact = Redactor((*self._own_secrets, *(unit.secrets or ())))
        return dataclasses.replace(facts, detail=redact(facts.detail), remains=redact(facts.remains))

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
            with raw.open("rb") as source, open(copy, "wb", opener=_private) as target:
                _copy_redacted(source, target, Redactor((*self._own_secrets, *unit.secrets)), self._longest_copy)
        except OSError as error:
            logger.warning("no copy of the output of task %s was kept: %s", row.key.task_id, error)

    def expire(self, instance: Path) -> None:
        """Delete copies older than the retention."""
        try:
            copies = list((instance / "logs").iterdir())
        except OSError:
            return
        for copy in copies:
            try:
                if copy.stat().st_mtime + self._retention < time.time():
                    copy.unlink()
            except OSError as error:
                logger.debug("expiring %s: %s", copy, error)


def copy_name(row: TaskRow) -> str:
    """The file name of a kept copy: readable, and unique by its unit."""
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in row.key.task_id)[:40]
    return f"{safe}-{row.unit[:8]}.log"


def _holds_something(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _copy_redacted(source: BinaryIO, target: BinaryIO, redact: Redactor, limit: int) -> None:
    stream = RedactedStream(redact)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    written = 0
    while written < limit and (chunk := source.read(CHUNK)):
        written += target.write(stream.feed(decoder.decode(chunk)).encode())
    if written < limit:
        target.write(stream.flush().encode())
