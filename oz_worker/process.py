"""The one door to child processes: starting, identifying, signalling and reaping them.

A child started here belongs to a `Child`, never to the `Popen` that made it: one owner decides when the process is
reaped, because a pid that has been reaped may already name a stranger. Identity is (pid, start ticks, boot id).
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Mapping, NamedTuple, Sequence

from oz_worker.errors import OzWorkerError
from oz_worker.unreadable import Unreadable, patiently, unreadable

logger = logging.getLogger(__name__)

HELPER = "OZ_WORKER_HELPER"
"""Marks every short CLI child with our instance, so that the next start finds what outlived a kill -9 (rule 5)."""

_PROC = Path("/proc")
LINUX = sys.platform.startswith("linux")


class SpawnError(OzWorkerError):
    """A child could not be started; the sentence says whether program or directory is at fault."""


class ProgramMissing(SpawnError):
    """The program does not exist, or may not be executed."""


class TooLong(SpawnError):
    """The arguments and the environment are more than a process can be given."""


class DirectoryMissing(SpawnError):
    """The working directory does not exist, or may not be entered."""


class Stat(NamedTuple):
    """One line of the process table."""

    pid: int
    state: str
    parent: int
    group: int
    session: int
    ticks: int

    @property
    def dead(self) -> bool:
        """A zombie is dead: somebody else may reap it late, but it runs no more."""
        return self.state in "ZXx"


class Identity(NamedTuple):
    """A process that no reuse of pids can be mistaken for."""

    pid: int
    ticks: int
    boot: str

    def alive(self) -> bool:
        """Whether exactly this process still runs. Raises Unreadable when nobody can say."""
        if self.boot != boot_id():
            return False
        stat = read_stat(self.pid)
        return stat is not None and stat.ticks == self.ticks and not stat.dead


def parse_stat(line: bytes) -> Stat:
    """One `/proc/<pid>/stat`; the name in parentheses may hold anything, also parentheses and newlines."""
    head, _, tail = line.rpartition(b")")
    fields = tail.split()
    pid = int(head.split(b" ", 1)[0])
    return Stat(pid, fields[0].decode(), int(fields[1]), int(fields[2]), int(fields[3]), int(fields[19]))


def read_stat(pid: int) -> Stat | None:
    """The process's line, None when there is no such process of ours. Raises Unreadable when nobody can say."""
    if not LINUX:
        return _stat_elsewhere(pid)
    path = f"/proc/{pid}/stat"
    try:
        with open(path, "rb", buffering=0) as file:
            return parse_stat(file.read(1024))
    except (FileNotFoundError, ProcessLookupError) as error:
        if not os.path.exists("/proc/self/stat"):  # /proc itself is gone: then all would seem to be
            raise unreadable("/proc", error) from error
        return None
    except (PermissionError, ValueError, IndexError):  # mounted with hidepid: another user's, so never ours
        return None
    except OSError as error:
        raise unreadable(path, error) from error


def _stat_elsewhere(pid: int) -> Stat | None:
    """The same by psutil, for systems without /proc; ticks are hundredths of a second since the epoch."""
    import psutil

    try:
        process = psutil.Process(pid)
        with process.oneshot():
            state = "Z" if process.status() == psutil.STATUS_ZOMBIE else "R"
            ticks = round(process.create_time() * 100)
            return Stat(pid, state, process.ppid(), os.getpgid(pid), os.getsid(pid), ticks)
    except (psutil.Error, OSError):
        return None


@functools.lru_cache(maxsize=1)
def boot_id() -> str:
    """What changes with each boot of this machine."""
    try:
        return (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    except OSError as error:
        if LINUX and not isinstance(error, (FileNotFoundError, PermissionError)):
            raise unreadable("/proc/sys/kernel/random/boot_id", error) from error  # and remembered by nobody
        import psutil

        return f"boot-{round(psutil.boot_time())}"


def identify(pid: int) -> Identity | None:
    """The identity of a process that exists now (also as a zombie)."""
    stat = read_stat(pid)
    return Identity(pid, stat.ticks, boot_id()) if stat else None


def environment_of(pid: int) -> dict[str, str] | None:
    """The environment a process was started with, None when it cannot be read."""
    if not LINUX:
        import psutil

        try:
            return dict(psutil.Process(pid).environ())
        except (psutil.Error, OSError):
            return None
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return None
    pairs = (os.fsdecode(item).partition("=") for item in raw.split(b"\0") if item)
    return {name: value for name, _, value in pairs}


def arguments_of(pid: int) -> list[str]:
    """The arguments of a process, empty when they cannot be read."""
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return []
    return [os.fsdecode(item) for item in raw.split(b"\0")[:-1]]


class Request(NamedTuple):
    """What to start. Descriptors are the caller's and stay open; `subprocess.PIPE` makes a pipe of our own."""

    argv: Sequence[str]
    environment: Mapping[str, str]
    directory: str | None = None
    stdin: int = subprocess.DEVNULL
    stdout: int = subprocess.DEVNULL
    stderr: int = subprocess.DEVNULL
    new_session: bool = True


class _Spawned:
    """Pids of children that somebody still has to reap. Lets the reaper of orphans leave them alone.

    One lock guards both fields; `busy` counts spawns whose pid is not known yet, during which no orphan is reaped.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.busy = 0
        self.pids: set[int] = set()


_spawned = _Spawned()


def awaited(pid: int) -> bool:
    """Whether somebody here started this process and has yet to reap it."""
    with _spawned.lock:
        return pid in _spawned.pids


def reap_stranger(pid: int) -> None:
    """Reap a zombie of ours that nobody here started; children that somebody waits for are left alone."""
    with _spawned.lock:
        if _spawned.busy or pid in _spawned.pids:
            return
        try:
            os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            pass  # gone already


class Child:
    """A process that we started and have to reap. Safe from any thread; its lock guards `_code` and `_reaped`.

    Raises Unreadable when its identity cannot be read: without one a restarted worker would take it for a stranger.
    Until `reap` the pid, its group and its session cannot be taken by a stranger, even when the process has ended:
    so `signal_group` is safe, and refuses afterwards.
    """

    def __init__(self, pid: int, *, stdin: int = -1, stdout: int = -1, stderr: int = -1) -> None:
        self.pid = pid
        self.stdin, self.stdout, self.stderr = stdin, stdout, stderr  # our ends of pipes, -1 where none was asked for
        identity = patiently(lambda: identify(pid))
        assert identity is not None, "ours and unreaped: it exists"
        self.identity = identity
        self._lock = threading.Lock()
        self._code: int | None = None
        self._reaped = False

    def poll(self) -> int | None:
        """The exit code (128 + signal for a death by signal) without reaping, None while it runs."""
        with self._lock:
            if self._code is None:
                self._look()
            return self._code

    def _look(self) -> None:
        """Requires holding the lock."""
        if not hasattr(os, "waitid"):  # macOS: waiting is reaping there
            self._reap()
            return
        try:
            result = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            self._lost()
            return
        if result is not None and result.si_pid == self.pid:
            killed = result.si_code != os.CLD_EXITED
            self._code = 128 + result.si_status if killed else result.si_status

    def reap(self) -> bool:
        """Let the kernel forget an ended process; False while it runs. Further calls change nothing."""
        with self._lock:
            if not self._reaped:
                self._reap()
            return self._reaped

    def _reap(self) -> None:
        """Requires holding the lock."""
        try:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
        except ChildProcessError:
            self._lost()
            return
        if pid == self.pid:
            code = os.waitstatus_to_exitcode(status)
            self._code = 128 - code if code < 0 else code
            self._forget()

    def _lost(self) -> None:
        """Somebody else reaped it, which nobody should. Requires holding the lock."""
        logger.warning("child %d was reaped by a stranger; its exit code is lost", self.pid)
        if self._code is None:
            self._code = 255
        self._forget()

    def _forget(self) -> None:
        self._reaped = True
        with _spawned.lock:
            _spawned.pids.discard(self.pid)

    def signal_group(self, signum: int) -> bool:
        """Signal the group that the child leads; False when the child has been reaped or the group is gone."""
        with self._lock:
            if self._reaped:
                return False
            try:
                os.killpg(self.pid, signum)
            except (ProcessLookupError, PermissionError):
                return False
            return True

    def close_pipes(self) -> None:
        """Close our ends of its pipes. Only the thread that reads them calls this."""
        for descriptor in {self.stdin, self.stdout, self.stderr} - {-1}:
            os.close(descriptor)
        self.stdin = self.stdout = self.stderr = -1


def spawn(request: Request) -> Child:
    """Start a child. Raises ProgramMissing, DirectoryMissing or SpawnError with the cure."""
    with _spawned.lock:
        _spawned.busy += 1
    pid = None
    try:
        popen = _open(request)
        pid = popen.pid
    finally:
        with _spawned.lock:
            _spawned.busy -= 1
            if pid is not None:
                _spawned.pids.add(pid)
    popen.returncode = 0  # from here on Child owns the pid: a Popen that believes it is done never waits
    ends: list[int] = []
    try:
        for pipe in (popen.stdin, popen.stdout, popen.stderr):
            ends.append(os.dup(pipe.fileno()) if pipe else -1)
        return Child(popen.pid, stdin=ends[0], stdout=ends[1], stderr=ends[2])
    except (OSError, Unreadable) as error:
        _undo(popen.pid, ends)
        why = error.strerror if isinstance(error, OSError) else error
        raise SpawnError(f"{request.argv[0]} could not be started: {why}") from error
    finally:
        for pipe in (popen.stdin, popen.stdout, popen.stderr):
            if pipe:
                pipe.close()


def _undo(pid: int, ends: Sequence[int]) -> None:
    """End a child that cannot be kept: it is ours, unreaped, and has done next to nothing."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with _spawned.lock:
        _spawned.pids.discard(pid)
    for descriptor in set(ends) - {-1}:
        os.close(descriptor)


def _open(request: Request) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            list(request.argv),
            env=dict(request.environment),
            cwd=request.directory,
            stdin=request.stdin,
            stdout=request.stdout,
            stderr=request.stderr,
            start_new_session=request.new_session,
            bufsize=0,
        )
    except (OSError, ValueError) as error:
        raise explain(error, request.argv[0], request.directory) from error


def explain(error: Exception, program: str, directory: str | None) -> SpawnError:
    """Tell a missing program from a missing directory: Popen raises the same error for both."""
    if directory is not None and not os.path.isdir(directory):
        return DirectoryMissing(f"working directory {directory} does not exist; create it")
    if directory is not None and not os.access(directory, os.X_OK):
        return DirectoryMissing(f"working directory {directory} may not be entered; give this user access to it")
    if isinstance(error, FileNotFoundError):
        return ProgramMissing(f"{program} does not exist; install it or correct its path")
    if isinstance(error, PermissionError):
        return ProgramMissing(f"{program} is not executable; make it so with chmod +x")
    if isinstance(error, OSError) and error.errno == errno.E2BIG:
        much = "its arguments and variables, or one of them, are longer than this system takes; pass long ones in files"
        return TooLong(f"{program} could not be started: {much}")
    if isinstance(error, OSError):
        return SpawnError(f"{program} could not be started: {error.strerror or error}")
    return SpawnError(f"{program} could not be started: {error}")  # ValueError: a NUL or a bad name


def open_pidfd(pid: int) -> int:
    """A descriptor that becomes readable when the process ends; -1 where the system has none or it is gone."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return -1


def signal_exactly(identity: Identity, signum: int) -> bool:
    """Signal this process and no other; False when it is gone, or when nobody can say whether it is the same."""
    descriptor = open_pidfd(identity.pid)
    try:
        stat = read_stat(identity.pid)  # after the open: what the descriptor names can no longer change
        if stat is None or stat.ticks != identity.ticks or stat.dead:
            return False
        if descriptor >= 0:
            signal.pidfd_send_signal(descriptor, signum)
        else:
            os.kill(identity.pid, signum)
        return True
    except (OSError, Unreadable):
        return False
    finally:
        if descriptor >= 0:
            os.close(descriptor)
