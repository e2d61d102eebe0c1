"""The first process of a private engine's namespaces: starts and signals dockerd, and takes everything with it.

usage: unshare --mount --pid --fork --kill-child --mount-proc python holder.py PLACE CGROUP DATA_MB

Reads one JSON object a line from stdin and answers with words on stdout. The end of stdin means that the test has
closed the engine or was killed: then everything in the namespace is killed and PLACE and the cgroups are removed. When
this process itself is killed the kernel ends the namespace; the files are left to `remove`, called by the other side.
Only the standard library: it is run as a program, outside the package.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_CGROUPS = Path("/sys/fs/cgroup")
_REMOVAL = 10.0
"""Seconds in which the kernel must have let go of emptied cgroups."""


def private_directories(place: Path) -> dict[str, Path]:
    """The machine's directories that dockerd writes to or reads names from, and what covers them for it alone."""
    return {"/etc": place / "etc", "/run": place / "run"}


def mount_private(place: Path, data_mb: int) -> None:
    """Cover the machine's directories, so that what the engine writes there is seen and kept nowhere else."""
    for directory, cover in private_directories(place).items():
        options = f"lowerdir={directory},upperdir={cover}/upper,workdir={cover}/work"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, directory], check=True)
    if data_mb:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={data_mb}m", "tmpfs", str(place / "data")], check=True)


def unmount(place: Path) -> None:
    """Take away every mount of this namespace that lies in *place* or covers a directory of the machine."""
    covered = [*private_directories(place), f"{place}/"]
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    ours = [point for point in reversed(points) if point in covered or point.startswith(covered[-1])]
    if ours:
        subprocess.run(["umount", "--lazy", *ours], check=False)


def cgroups_of(name: str) -> list[Path]:
    """An engine's own cgroup in every hierarchy, of version 1 or 2."""
    return [*_CGROUPS.glob(name), *_CGROUPS.glob(f"*/{name}")]


def thaw_cgroups(name: str) -> None:
    """Let paused containers go on: what is frozen cannot be killed, and would hold its namespace for ever."""
    thawed = {"freezer.state": "THAWED", "cgroup.freeze": "0"}
    for root in cgroups_of(name):
        for directory, _, files in os.walk(root):  # unlike glob it bears with what vanishes meanwhile
            for file in thawed.keys() & files:
                with contextlib.suppress(OSError):
                    Path(directory, file).write_text(thawed[file])


def remove(place: Path, cgroup: str) -> None:
    """Remove directory and cgroups once nothing uses them; what is gone already is no error."""
    shutil.rmtree(place, ignore_errors=True)
    limit = time.monotonic() + _REMOVAL
    while left := cgroups_of(cgroup):
        for root in left:
            for directory, _, _ in os.walk(root, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(directory)
        if time.monotonic() > limit:
            return
        time.sleep(0.01)


class Holder:
    """dockerd and its state; everything happens on one thread, between a line of stdin and a SIGCHLD."""

    def __init__(self, place: Path) -> None:
        self._log = str(place / "dockerd.log")
        self._dockerd = 0

    def obey(self, line: str) -> None:
        """Start dockerd or send it a signal. A signal for what has ended is lost, as its end has been told."""
        word = json.loads(line)
        if "start" in word:
            append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            files: list[tuple[Any, ...]] = [
                (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, self._log, append, 0o644),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ]
            argv = word["start"]
            self._dockerd = os.posix_spawn(argv[0], argv, word["env"], file_actions=files)
            print("started", flush=True)
        elif self._dockerd:
            os.kill(self._dockerd, word["signal"])

    def reap(self) -> None:
        """Bury every orphan of the namespace at once, and tell what became of dockerd."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
                if not pid:
                    return
                if pid != self._dockerd:
                    continue
                if os.WIFSTOPPED(status):
                    print("stopped", flush=True)
                elif os.WIFCONTINUED(status):
                    print("continued", flush=True)
                else:
                    self._dockerd = 0
                    print("ended", flush=True)

    def serve(self) -> None:
        """Until stdin ends."""
        woken, wakes = os.pipe()
        os.set_blocking(wakes, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
        print("ready", flush=True)
        pending = b""
        while True:
            readable, _, _ = select.select([0, woken], [], [])
            if woken in readable:
                os.read(woken, 4096)
            if 0 in readable:
                data = os.read(0, 1 << 16)
                if not data:
                    return
                *lines, pending = (pending + data).split(b"\n")
                for line in lines:
                    self.obey(line.decode())
            self.reap()


def kill_all(cgroup: str) -> None:
    """End everything else in the namespace, and wait until it is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)
    thaw_cgroups(cgroup)  # after the kill: nothing is left that could freeze anew
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


def main(place: Path, cgroup: str, data_mb: int) -> None:
    """Hold the namespace until stdin ends."""
    try:
        mount_private(place, data_mb)
        # The other side may be gone before it has read an answer.
        with contextlib.suppress(BrokenPipeError):
            Holder(place).serve()
    finally:
        kill_all(cgroup)
        unmount(place)
        remove(place, cgroup)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
