"""Instance directories below the state directory: one for each running worker, held by a kernel lock.

Several workers with one id on one host each take a directory of their own; one that was left behind (its worker died
and nobody restarted it) is served in place by another, with its own store, until it is empty (design 5 and 12, rule 2).
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import secrets
import shutil
import socket
import time
from pathlib import Path
from typing import Callable, NamedTuple

from oz_worker.errors import NotUsable
from oz_worker.process import Identity, identify

logger = logging.getLogger(__name__)

INSTANCE_ID = re.compile(r"[a-z0-9-]{1,40}")
TRIES, PAUSE = 6, 0.05
"""A look at somebody's lock holds it for an instant; whoever wants it tries again before it believes it taken."""


class Holder(NamedTuple):
    """Who holds a lock: enough to signal the right process, or to know that it cannot be reached from here."""

    pid: int
    start_ticks: int
    boot_id: str
    pid_namespace: int


class Slot:
    """A held instance directory. The lock is the kernel's and dies with the process, however that dies."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.id = path.name
        self._descriptor = descriptor

    def release(self) -> None:
        """Give the directory up."""
        os.close(self._descriptor)

    def remove(self) -> None:
        """Delete the directory while still holding it, then give it up: nobody can take it in between."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.release()


def prepare(state_dir: Path) -> None:
    """Make *state_dir* with mode 0700. Raises NotUsable naming the path and the cure."""
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        probe = state_dir / f".probe-{os.getpid()}"
        probe.touch(mode=0o600)
        probe.unlink()
    except OSError as error:
        raise unusable(state_dir, error) from None


def unusable(state_dir: Path, error: OSError) -> NotUsable:
    """What is said of a state directory in which nothing can be made."""
    return NotUsable(
        f"the state directory {state_dir} cannot be used ({error.strerror}); make it a directory that this user"
        f" can write, or name another one with state_dir or --state-dir"
    )


def take(state_dir: Path, pinned: str = "", misfit: Callable[[Path], str] = lambda path: "") -> Slot:
    """Hold *pinned*, or the first unlocked directory of this machine that fits, or a new one. Raises NotUsable.

    *misfit* says of a held directory why it cannot be ours, "" when it can.
    """
    prepare(state_dir)
    if pinned:
        slot = _hold(state_dir / pinned)
        if slot is None:
            raise NotUsable(_taken(state_dir / pinned))
        if why := misfit(slot.path):
            slot.release()
            raise NotUsable(f"the instance {pinned} in {state_dir} cannot be used: {why}; choose another instance_id")
        return slot
    for path in instances(state_dir):
        if not unlocked(path):
            continue
        if not _same_machine(path):
            logger.warning("the instance %s was made on another machine or hostname: it is left alone", path)
            continue
        slot = _hold(path)
        if slot is None:
            continue
        if why := misfit(path):
            logger.warning("the instance %s is left alone: %s", path, why)
            slot.release()
            continue
        return slot
    while True:
        slot = _hold(state_dir / secrets.token_hex(6))
        if slot is not None:
            return slot


def instances(state_dir: Path) -> list[Path]:
    """The instance directories below *state_dir*, in a fixed order. Raises NotUsable where we may not look."""
    try:
        names = sorted(entry.name for entry in os.scandir(state_dir) if entry.is_dir(follow_symlinks=False))
        names = [name for name in names if INSTANCE_ID.fullmatch(name) and (state_dir / name / "lock").exists()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise NotUsable(
            f"{error.filename} cannot be read ({error.strerror}); ask as the user who runs the worker, or name another"
            " directory with --state-dir"
        ) from None
    return [state_dir / name for name in names]


def hold(path: Path) -> Slot | None:
    """Hold an existing directory if it is unlocked and was made on this machine; None otherwise."""
    return _hold(path) if _same_machine(path) else None


def unlocked(path: Path) -> bool:
    """Whether nobody holds the directory just now."""
    try:
        return holder(path) is None
    except (ValueError, KeyError, OSError):
        return False


def holder(path: Path) -> Holder | None:
    """Who holds the directory, None when nobody does. Raises ValueError for a lock file that cannot be read."""
    try:
        descriptor = os.open(path / "lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        found = json.loads(os.pread(descriptor, 4096, 0) or b"null")
        if not isinstance(found, dict):
            raise ValueError(f"{path}/lock is held but does not say by whom") from None
        return Holder(int(found["pid"]), int(found["start_ticks"]), str(found["boot_id"]), int(found["pid_namespace"]))
    finally:
        os.close(descriptor)
    return None


def reachable(found: Holder) -> bool:
    """Whether *found* is a process of our own pid namespace and still the same one (design 12, rule 4)."""
    alive = Identity(found.pid, found.start_ticks, found.boot_id).alive()
    return alive and found.pid_namespace == pid_namespace()


def pid_namespace() -> int:
    """The inode of our pid namespace; 0 where there is none."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


INITIAL_PID_NAMESPACE = 0xEFFFFFFC
"""The kernel's fixed inode number of the host's pid namespace (PROC_PID_INIT_INO)."""


def in_container() -> bool:
    """Whether this process lives in a container or pod: its processes die with it, its hostname changes.

    The pid namespace decides and not a file like /.dockerenv, which also stands in virtual machines made from images.
    """
    return pid_namespace() not in (0, INITIAL_PID_NAMESPACE)


def _hold(path: Path) -> Slot | None:
    """Lock *path* (made if missing) and write who we are; None when it is locked or vanished meanwhile."""
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(path / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise NotUsable(
            f"the instance directory {path} cannot be used ({error.strerror}); make it writable for this user"
        ) from None
    if not _lock(descriptor):
        os.close(descriptor)
        return None
    try:
        if not _still(path / "lock", descriptor):  # removed by its last holder between our open and our lock
            os.close(descriptor)
            return None
        _write_holder(descriptor)
        _write_machine(path)
    except OSError as error:
        os.close(descriptor)
        raise NotUsable(
            f"the instance directory {path} cannot be written ({error.strerror}); free space or make it writable"
        ) from None
    return Slot(path, descriptor)


def _lock(descriptor: int) -> bool:
    for _try in range(TRIES):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(PAUSE)
    return False


def _still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _write_holder(descriptor: int) -> None:
    identity = identify(os.getpid())
    assert identity is not None, "this process exists"
    me = Holder(*identity, pid_namespace())
    text = json.dumps(me._asdict()).encode()
    os.pwrite(descriptor, text, 0)
    os.ftruncate(descriptor, len(text))


def _machine() -> dict[str, str]:
    try:
        machine_id = Path("/etc/machine-id").read_text(encoding="ascii").strip()
    except OSError:
        machine_id = ""
    return {"machine_id": machine_id, "hostname": socket.gethostname()}


def _write_machine(path: Path) -> None:
    file = path / "machine"
    if not file.exists():
        file.write_text(json.dumps(_machine()), encoding="utf-8")


def _same_machine(path: Path) -> bool:
    """Rule 1: a cloned machine must not take over the original's units. Not asked in containers."""
    if in_container():
        return True
    try:
        return bool(json.loads((path / "machine").read_text(encoding="utf-8")) == _machine())
    except (OSError, ValueError):
        return True  # a directory of before the file was written is ours


def _taken(path: Path) -> str:
    try:
        found = holder(path)
    except (ValueError, KeyError):
        found = None
    who = f"by process {found.pid}" if found else "by another process"
    cure = "stop that worker, or give this one another instance_id"
    return f"the instance {path.name} in {path.parent} is held {who}; {cure}"
