"""What cannot be read is not taken for absent: the error that says so, and asking again for a moment."""

from __future__ import annotations

import time
from typing import Callable, TypeVar

from oz_worker.errors import OzWorkerError

_TRIES, _PAUSE = 10, 0.05
T = TypeVar("T")


class Unreadable(OzWorkerError):
    """What may well exist could not be read (no descriptor left, no memory, no /proc): it proves nothing."""


def unreadable(path: str, error: OSError) -> Unreadable:
    """The sentence about *path*."""
    return Unreadable(f"{path} cannot be read: {error.strerror or error}; free descriptors or mend its file system")


def patiently(look: Callable[[], T], wait: Callable[[float], object] = time.sleep, tries: int = _TRIES) -> T:
    """What *look* finds, asked again for half a second while it raises Unreadable; then raises that."""
    for left in range(tries - 1, -1, -1):
        try:
            return look()
        except Unreadable:
            if not left:
                raise
        wait(_PAUSE)
    raise AssertionError("unreachable")
