"""The output files of units: bounded while they grow, and their ends for reports."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

logger = logging.getLogger(__name__)

_KEPT = 256 * 1024
_PIECE = 64 * 1024
_LOOKS = 3
"""How often a cut looks for what was written meanwhile: one who floods the file always writes."""


class OutputFiles:
    """Keeps files that others append to below a limit. Safe from any thread; the lock guards the set of files.

    The writers opened them with O_APPEND, so that they go on from its new end when it is cut.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._paths: set[Path] = set()

    def add(self, path: Path) -> None:
        """Keep an eye on *path*."""
        with self._lock:
            self._paths.add(path)

    def discard(self, path: Path) -> None:
        """Leave *path* alone from now on."""
        with self._lock:
            self._paths.discard(path)

    def sweep(self) -> None:
        """Cut what has grown beyond the limit: its end stays, below one notice. Called about every second."""
        if not self._limit:
            return
        with self._lock:
            paths = list(self._paths)
        for path in paths:
            try:
                if os.stat(path).st_size > self._limit:
                    self._cut(path)
            except OSError as error:
                logger.debug("output %s: %s", path, error)

    def _cut(self, path: Path) -> None:
        """Put the notice and the end at the beginning, then cut behind them, in one step for whoever writes on.

        What a writer adds between the last look and the cut is lost: microseconds, and only in a file over the limit.
        """
        notice = f"[oz_worker: output over {self._limit} bytes; what came before is gone]\n".encode()
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            seen = os.fstat(descriptor).st_size
            wanted = min(_KEPT, self._limit // 2)
            kept = _read_at(descriptor, max(0, seen - wanted), wanted)
            head = notice + (kept[kept.find(b"\n") + 1 :] if b"\n" in kept else kept)
            if len(head) >= seen:
                return  # so small a limit that the notice itself breaks it
            _write_at(descriptor, head, 0)
            end = len(head)
            for _look in range(_LOOKS):
                fresh = _read_at(descriptor, seen, wanted)
                if not fresh or end + len(fresh) >= seen:
                    break
                _write_at(descriptor, fresh, end)
                seen, end = seen + len(fresh), end + len(fresh)
            os.ftruncate(descriptor, end)
        finally:
            os.close(descriptor)


def _read_at(descriptor: int, place: int, limit: int) -> bytes:
    pieces = []
    while limit > 0 and (piece := os.pread(descriptor, min(limit, _PIECE), place)):
        pieces.append(piece)
        place, limit = place + len(piece), limit - len(piece)
    return b"".join(pieces)


def _write_at(descriptor: int, data: bytes, place: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, place)
        data, place = data[written:], place + written


def tail(path: Path, limit: int) -> bytes:
    """The last *limit* bytes of a file, b"" when there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return b""
    try:
        return _read_at(descriptor, max(0, os.fstat(descriptor).st_size - limit), limit)
    except OSError:
        return b""
    finally:
        os.close(descriptor)
