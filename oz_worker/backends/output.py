"""The output files of units: bounded while they grow, and their ends for reports."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

logger = logging.getLogger(__name__)

_KEPT = 256 * 1024
_PIECE = 64 * 1024


class OutputFiles:
    """Keeps files that others append to below a limit. Safe from any thread; the lock guards the set of files.

    The writers opened them with O_APPEND, so cutting a file to nothing makes them go on from its new end.
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
        kept = tail(path, min(_KEPT, self._limit // 2))
        kept = kept[kept.find(b"\n") + 1 :] if b"\n" in kept else kept
        notice = f"[oz_worker: output over {self._limit} bytes; what came before is gone]\n".encode()
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, notice + kept)
        finally:
            os.close(descriptor)


def tail(path: Path, limit: int) -> bytes:
    """The last *limit* bytes of a file, b"" when there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return b""
    try:
        size = os.fstat(descriptor).st_size
        os.lseek(descriptor, max(0, size - limit), os.SEEK_SET)
        pieces = []
        while limit > 0 and (piece := os.read(descriptor, min(limit, _PIECE))):
            pieces.append(piece)
            limit -= len(piece)
        return b"".join(pieces)
    except OSError:
        return b""
    finally:
        os.close(descriptor)
