"""Where tests put what is made and removed a thousand times and is not about disks: a file system in memory."""

from __future__ import annotations

import os

_PLACE = "/dev/shm"
GIB = 1 << 30


def memory(room: int = GIB) -> str | None:
    """Its directory, for `tempfile`; None where there is none with *room* bytes from which programs may run."""
    try:
        found = os.statvfs(_PLACE)
    except OSError:
        return None
    return _PLACE if found.f_bavail * found.f_frsize > room and not found.f_flag & os.ST_NOEXEC else None
