"""The output files of units: bounded while they grow, and their ends for reports."""

from __future__ import annotations

import logging
import os
import re
import threading
from pathlib import Path

logger = logging.getLogger(__name__)

_KEPT = 256 * 1024
_PIECE = 64 * 1024
_LOOKS = 3
"""How often a cut looks for what was written meanwhile: one who floods the file always writes."""


CUT = b"[oz_worker: output over "
"""How the one line begins that says that something is missing."""
LONGEST_NOTICE = 128
HEADING = re.compile(rb"(?m)^(--- container [^\n]* ---\n)")
"""Begins what one of several containers has printed."""


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
        notice = _notice(self._limit, "before")
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            seen = os.fstat(descriptor).st_size
            wanted = min(_KEPT, self._limit // 2)
            kept = _read_at(descriptor, max(0, seen - wanted), wanted)
            head = notice + _from_line(kept)
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


def keep_end(path: Path, limit: int) -> None:
    """Cut a file that nobody writes to any more: its end stays, below one notice. Raises OSError."""
    with open(path, "r+b", opener=_not_followed) as file:
        size = os.fstat(file.fileno()).st_size
        if not limit or size <= limit:
            return
        notice = _notice(limit, "before")
        place = size - max(0, limit - len(notice))
        place += len(piece := _read_at(file.fileno(), place, _PIECE)) - len(_from_line(piece))
        _write_at(file.fileno(), notice, 0)
        end = len(notice)
        while piece := _read_at(file.fileno(), max(place, end), _KEPT):
            place = max(place, end) + len(piece)
            _write_at(file.fileno(), piece, end)
            end += len(piece)
        os.ftruncate(file.fileno(), end)


def end_with_notice(descriptor: int, limit: int) -> None:
    """Of a file that was written up to its limit, perhaps with more to come: the last line becomes the notice."""
    size = os.fstat(descriptor).st_size
    notice = _notice(limit, "after")
    if not limit or size < limit or limit < 2 * len(notice):
        return
    place = max(0, limit - len(notice) - _PIECE)
    end = place + _read_at(descriptor, place, limit - len(notice) - place).rfind(b"\n") + 1
    end = end if end > place else limit - len(notice)
    os.ftruncate(descriptor, end)
    _write_at(descriptor, notice, end)


def notice_of(head: bytes) -> bytes:
    """The notice at the beginning of an output of which the beginning is gone, b"" when there is none."""
    line = head[:LONGEST_NOTICE].partition(b"\n")[0]
    return line + b"\n" if line.startswith(CUT) and line.endswith(b"before is gone]") else b""


def split_from_end_notice(end: bytes) -> tuple[bytes, bytes]:
    """What stands before the notice with which an output ends of which the rest is gone, and that notice or b""."""
    place = end.rfind(CUT)
    if place < 0 or not end.endswith(b"what came after is gone]\n"):
        return end, b""
    return end[:place], end[place:]


def _notice(limit: int, which: str) -> bytes:
    return CUT + f"{limit} bytes; what came {which} is gone]\n".encode()


def _from_line(data: bytes) -> bytes:
    """From the first whole line; all of it when it has no end of a line, nor what a progress bar has instead."""
    for end in (b"\n", b"\r"):
        if end in data:
            return data[data.find(end) + 1 :]
    return data


def _not_followed(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW)


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
