"""Cgroups of version 2 for units: the kernel knows who belongs to one, and kills them all at once."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
from pathlib import Path

from oz_worker.process import Identity, Stat, boot_id, read_stat, signal_exactly
from oz_worker.unreadable import unreadable

logger = logging.getLogger(__name__)


class Cgroup:
    """A cgroup of our own for one unit. Any thread; the kernel serialises."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def make(cls, path: Path) -> Cgroup | None:
        """Make it, None where that is not allowed."""
        try:
            path.mkdir(exist_ok=True)
            return cls(path) if (path / "cgroup.kill").exists() else None
        except OSError:
            return None

    def add(self, pid: int) -> bool:
        """Move a process in; its children are born inside."""
        return self._write("cgroup.procs", str(pid))

    def pids(self) -> list[int]:
        """The live processes inside, also in groups that they made below."""
        found: list[int] = []
        for directory, _, _ in os.walk(self.path):
            try:
                found += map(int, (Path(directory) / "cgroup.procs").read_text().split())
            except (OSError, ValueError):
                continue  # removed meanwhile, or threaded
        return [pid for pid in found if pid > 0]

    def populated(self) -> bool:
        """Whether anything lives inside. Raises Unreadable when nobody can say."""
        path = self.path / "cgroup.events"
        try:
            return "populated 0" not in path.read_text()
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENODEV):  # the last: removed while it was open
                return False
            raise unreadable(str(path), error) from error

    def kill(self) -> None:
        """SIGKILL for everything inside, at once. Raises Unreadable."""
        if not self._write("cgroup.kill", "1") and self.populated():
            logger.warning("%s cannot be killed through cgroup.kill", self.path)

    def terminate(self) -> None:
        """SIGTERM for each process inside, once. Raises Unreadable."""
        found = [Identity(pid, (read_stat(pid) or _NOBODY).ticks, boot_id()) for pid in self.pids()]
        inside = set(self.pids())  # listed after their ticks were taken: those are the members' own
        for identity in found:
            if identity.pid in inside:
                signal_exactly(identity, signal.SIGTERM)

    def remove(self) -> None:
        """Remove it with all groups below, if nothing lives inside."""
        for directory, _, _ in os.walk(self.path, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(directory)

    def _write(self, name: str, text: str) -> bool:
        try:
            (self.path / name).write_text(text)
            return True
        except OSError:
            return False


_NOBODY = Stat(0, "X", 0, 0, 0, -1)


def cgroup_base() -> Path | None:
    """The directory below which this process may make cgroups of version 2, None where it may not."""
    try:
        own = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
        mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    except (OSError, StopIteration):
        return None
    for fields in mounts:
        if fields[fields.index("-") + 1] == "cgroup2" and fields[3] == "/":
            base = Path(fields[4]) / own[3:].lstrip("/")
            return base if os.access(base, os.W_OK) else None
    return None
