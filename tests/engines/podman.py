"""A throw-away Podman: its own images, containers and settings, chosen by environment variables alone.

Podman has no daemon; what outlives a test are containers, their conmon processes and mounts. So this file is a program,
too, that waits beside the test for the end of its stdin and removes them then, also when the test was killed:

    python -m tests.engines.podman PLACE
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.engines.client import PATH, PATIENCE, Client, EngineError, find_program
from tests.engines.holder import cgroups_of, remove, thaw_cgroups
from tests.memory import GIB, memory

_ROOT = Path(__file__).resolve().parents[2]

# runc, because crun refuses hybrid cgroups; low limits, because Podman's own ask for more than a root without
# CAP_SYS_RESOURCE may set; locks in files, because those in shared memory are one set for the whole machine.
_CONTAINERS = """
[containers]
default_ulimits = ["nofile=1024:4096", "nproc=4096:4096"]
netns = "none"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
image_copy_tmp_dir = "{place}/tmp"
lock_type = "file"
runtime = "runc"
tmp_dir = "{place}/tmp"
[network]
network_config_dir = "{place}/networks"
"""
_STORAGE = """
[storage]
driver = "overlay"
graphroot = "{place}/root"
runroot = "{place}/run"
"""


class Podman(Client):
    """A private Podman, as root. Any number of threads may call it; networks are `none` (the default) and `host`."""

    def __init__(self) -> None:
        self.place = Path(tempfile.mkdtemp(prefix="ozp-", dir=memory(4 * GIB)))
        for name in ("tmp", "networks"):
            (self.place / name).mkdir()
        (self.place / "containers.conf").write_text(_CONTAINERS.format(place=self.place))
        (self.place / "storage.conf").write_text(_STORAGE.format(place=self.place))
        (self.place / "registries.conf").write_text("")
        (self.place / "auth.json").write_text("{}")
        env = {
            "CONTAINERS_CONF": str(self.place / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(self.place / "storage.conf"),
            "CONTAINERS_REGISTRIES_CONF": str(self.place / "registries.conf"),
            "REGISTRY_AUTH_FILE": str(self.place / "auth.json"),
        }
        super().__init__(find_program("podman"), env, f"CONTAINERS_CONF={env['CONTAINERS_CONF']}")
        self._cleaner = subprocess.Popen(
            [sys.executable, "-S", "-m", "tests.engines.podman", str(self.place)],
            stdin=subprocess.PIPE,
            cwd=_ROOT,
            env={"PATH": PATH},
            start_new_session=True,
        )

    def allow_plain(self, address: str) -> None:
        """Let it speak plain HTTP to the registry at *address*; Docker does so by itself on 127.x."""
        with (self.place / "registries.conf").open("a") as file:
            file.write(f"[[registry]]\nlocation = {json.dumps(address)}\ninsecure = true\n")

    def close(self) -> None:
        """End and remove everything: containers, processes, mounts, cgroups, files. May be called twice."""
        assert self._cleaner.stdin
        self._cleaner.stdin.close()
        try:
            self._cleaner.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._cleaner.kill()
            self._cleaner.wait(PATIENCE)
            raise EngineError(f"Podman's containers below {self.place} cannot be ended") from None


def _processes(place: Path) -> list[int]:
    """The commands and conmons of this Podman, known by its directory; not what runs in the containers."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            with contextlib.suppress(OSError):
                if any(
                    f"{place}/".encode() in Path(f"/proc/{entry}/{file}").read_bytes()
                    for file in ("environ", "cmdline")
                ):
                    found.append(int(entry))
    return found


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _end_container(cgroup: str) -> None:
    """Kill what runs in a container; processes that fork meanwhile are seen the next time."""
    limit = time.monotonic() + PATIENCE / 2
    while time.monotonic() < limit:
        members = []
        for directory in cgroups_of(cgroup):
            with contextlib.suppress(OSError):
                members += [int(pid) for pid in (directory / "cgroup.procs").read_text().split()]
        if not members:
            return
        _kill(members)
        thaw_cgroups(cgroup)
        time.sleep(0.01)


def clean(place: Path) -> None:
    """Remove the Podman in *place*, without its help: it may hang, or hold a lock for ever."""
    _kill(_processes(place))  # conmon first, so that nobody tidies up beside us
    containers = place / "root" / "overlay-containers"
    cgroups = [f"libpod_parent/libpod-{entry.name}" for entry in containers.glob("?" * 64)]
    for cgroup in cgroups:
        _end_container(cgroup)
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    ours = [point for point in reversed(points) if point.startswith(f"{place}/")]
    if ours:
        subprocess.run(["umount", "--lazy", *ours], check=False)
    for cgroup in cgroups:
        remove(place, cgroup)
    remove(place, place.name)


if __name__ == "__main__":
    sys.stdin.buffer.read()
    clean(Path(sys.argv[1]))
