"""Whether there is room for another task: on the disks, and in the table of open files."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

CHECK_SECONDS = 1.0
OWN_DESCRIPTORS, DESCRIPTORS_OF_A_START = 32, 8
"""What the worker itself has open, and what a task needs for a moment while it starts or is removed; then it is one."""


FULL_BYTES = 64 * 1024
"""With less than that the database cannot be written, and what is left is for the ends of tasks."""


def full(path: Path) -> bool:
    """Whether nothing more can be written on the disk of *path*. May hang with that disk.

    One that counts no blocks (a tmpfs without limit, some of FUSE) does not say, and is not taken for full.
    """
    try:
        fs = os.statvfs(path)
    except OSError:
        return False  # not for want of room
    return fs.f_blocks > 0 and (fs.f_bavail if os.geteuid() else fs.f_bfree) * fs.f_frsize < FULL_BYTES


def most_by_descriptors(most: int) -> int:
    """How many tasks at once, at most *most*, the limit of open files carries even if all start together."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return most
    return max(1, min(most, (limit - OWN_DESCRIPTORS) // DESCRIPTORS_OF_A_START))


class DiskGuard:
    """Looks at the file systems that tasks fill, once a second at most. Safe from any thread: two may look at once."""

    def __init__(self, paths: tuple[Path, ...], *, min_free: int, min_inodes: int) -> None:
        self._paths = paths
        self._min_free = min_free
        self._min_inodes = min_inodes
        self._next_check = 0.0
        self._answer = ""

    def trouble(self) -> str:
        """One sentence about the first file system that is too full, "" when there is none."""
        if time.monotonic() >= self._next_check:
            self._answer = next(filter(None, map(self._low, self._paths)), "")
            self._next_check = time.monotonic() + CHECK_SECONDS
        return self._answer

    def _low(self, path: Path) -> str:
        try:
            fs = os.statvfs(path)
        except OSError:
            return ""  # the backend says what is wrong with its directory
        free = fs.f_bavail * fs.f_frsize
        if self._min_free and fs.f_blocks and free < self._min_free:
            return f"{path} has {free // 2**20} MiB free, min_free_disk asks for {self._min_free // 2**20}"
        if self._min_inodes and fs.f_files and fs.f_favail < self._min_inodes:
            return f"{path} has {fs.f_favail} inodes free, min_free_inodes asks for {self._min_inodes}"
        return ""
