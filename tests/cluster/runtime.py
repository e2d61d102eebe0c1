"""The container runtime: starts processes in a root, pids and a host name of their own, and keeps what they print.

usage: unshare --mount --pid --fork --kill-child --mount-proc python -I -S runtime.py PLACE/stage

Reads one JSON object a line from stdin and answers with such lines on stdout. The end of stdin means that the cluster
is closed or was killed: then everything ends and PLACE is removed. When this process is killed, the kernel ends the
namespace. One thread; a container's first process is made by clone(2), so that it is number 1 in its namespace and
takes all others with it. Only the standard library: it is run as a program, outside the package.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import platform
import select
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

_LIBC = ctypes.PyDLL(None, use_errno=True)  # keeps the lock over clone, so that the child holds it too
_CLONE = {"x86_64": 56, "aarch64": 220}
_NEW_NAMESPACES = 0x00020000 | 0x04000000 | 0x20000000  # mounts, host name, pids
_RDONLY, _REMOUNT, _BIND = 0x1, 0x20, 0x1000
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_LONGEST_LINE = 16 * 1024
_LARGEST_LOG = 10 * 1024 * 1024
_SEARCH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def _checked(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def _mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    done = _LIBC.mount(source.encode(), target.encode(), kind.encode() or None, flags, options.encode() or None)
    _checked(done, f"mount {source} on {target}")


def _inside(root: str, target: str) -> str:
    """The place of *target* in *root*, made if it is not there; links in it are followed as the container would."""
    path = root
    for part in Path(target).parts[1:]:
        path = os.path.join(path, part)
        if os.path.islink(path):
            link = os.readlink(path)
            path = _inside(root, os.path.join("/" + os.path.relpath(os.path.dirname(path), root), link))
        elif not os.path.isdir(path):
            os.mkdir(path)
    return path


def _lay_out(order: dict[str, Any], stage: str) -> str:
    """The container's root: its image below, what it writes in memory, and its volumes; all gone with its namespace."""
    _mount("tmpfs", stage, "tmpfs", 0, "mode=755")
    root = f"{stage}/root"
    for name in ("root", "upper", "work"):
        os.mkdir(f"{stage}/{name}")
    _mount("overlay", root, "overlay", 0, f"lowerdir={order['root']},upperdir={stage}/upper,workdir={stage}/work")
    for name in ("proc", "dev", "sys", "tmp", "etc"):
        if not os.path.isdir(f"{root}/{name}"):
            os.mkdir(f"{root}/{name}")
    _mount("proc", f"{root}/proc", "proc")
    _mount("tmpfs", f"{root}/dev", "tmpfs", 0, "mode=755")
    for name in _DEVICES:
        Path(f"{root}/dev/{name}").touch()
        _mount(f"/dev/{name}", f"{root}/dev/{name}", "", _BIND)
    for name, target in (("fd", "self/fd"), ("stdin", "self/fd/0"), ("stdout", "self/fd/1"), ("stderr", "self/fd/2")):
        os.symlink(f"/proc/{target}", f"{root}/dev/{name}")
    for source, target, read_only in sorted(order["mounts"], key=lambda row: len(Path(row[1]).parts)):
        if os.path.isdir(source):
            place = _inside(root, target)
        else:
            place = os.path.join(_inside(root, os.path.dirname(target)), os.path.basename(target))
            Path(place).touch()
        _mount(source, place, "", _BIND)
        if read_only:
            _mount("none", place, "", _BIND | _REMOUNT | _RDONLY)
    return root


def _program(name: str, path: str) -> str:
    """The file to run; the words of a real runtime when there is none."""
    if "/" in name:
        if not os.path.exists(name):
            raise FileNotFoundError(f'exec: "{name}": stat {name}: no such file or directory')
        if os.path.isdir(name) or not os.access(name, os.X_OK):
            raise PermissionError(f'exec: "{name}": permission denied')
        return name
    for directory in path.split(":"):
        if os.access(found := os.path.join(directory, name), os.X_OK) and not os.path.isdir(found):
            return found
    raise FileNotFoundError(f'exec: "{name}": executable file not found in $PATH')


def _become(order: dict[str, Any], user: tuple[int, int]) -> NoReturn:
    """The last steps, in the root already."""
    os.makedirs(order["cwd"], exist_ok=True)
    os.chdir(order["cwd"])
    if user != (0, 0):
        os.setgroups([])
        os.setgid(user[1])
        os.setuid(user[0])
    env = order["env"]
    program = _program(order["argv"][0], env.get("PATH", _SEARCH))
    try:
        os.execve(program, order["argv"], env)
    except OSError as error:
        why = "exec format error" if error.errno == errno.ENOEXEC else (error.strerror or "").lower()
        raise OSError(f"exec {program}: {why}") from None


class _Child:
    """A process that runs, and what it prints."""

    def __init__(self, name: str, pid: int, log: str) -> None:
        self.name = name
        self.pid = pid
        self.open: set[int] = set()
        self.code: int | None = None
        self.failed = ""
        self._log = log
        self._size = 0
        self._rests: dict[str, bytes] = {"stdout": b"", "stderr": b""}
        self._file = open(log, "ab", buffering=0) if log else None  # noqa: SIM115

    def keep(self, stream: str, data: bytes) -> None:
        """Write lines as kubelets expect them; *data* b"" is the end of the stream."""
        if self._file is None:
            return
        *lines, rest = (self._rests[stream] + data).split(b"\n")
        rows = [(b"F", line) for line in lines]
        while len(rest) > _LONGEST_LINE or (rest and not data):
            rows.append((b"P", rest[:_LONGEST_LINE]))
            rest = rest[_LONGEST_LINE:]
        self._rests[stream] = rest
        whole, part = divmod(time.time_ns(), 1_000_000_000)
        stamp = time.strftime(f"%Y-%m-%dT%H:%M:%S.{part:09d}Z", time.gmtime(whole)).encode()
        text = b"".join(b"%s %s %s %s\n" % (stamp, stream.encode(), tag, line) for tag, line in rows)
        self._file.write(text)
        self._size += len(text)
        if self._size > _LARGEST_LOG:
            os.replace(self._log, f"{self._log}.old")
            self._file.close()
            self._file, self._size = open(self._log, "ab", buffering=0), 0  # noqa: SIM115

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class Runtime:
    """All containers; everything happens between two polls."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._children: dict[int, _Child] = {}
        self._names: dict[str, int] = {}
        self._fds: dict[int, tuple[_Child, str]] = {}
        self._poll = select.poll()

    def _tell(self, child: _Child, said: str, **more: Any) -> None:
        sys.stdout.write(json.dumps({"id": child.name, "said": said, **more}) + "\n")
        sys.stdout.flush()

    def start(self, order: dict[str, Any]) -> None:
        """Start a container, or with `in` a program in one that runs."""
        pipes = {name: os.pipe() for name in ("stdout", "stderr", "fault")}
        inner = self._names.get(order.get("in", ""))
        pid = os.fork() if "in" in order else self._clone()
        if pid == 0:
            self._in_child(order, pipes, inner)
        child = self._children[pid] = _Child(order["id"], pid, order["log"])
        self._names[child.name] = pid
        for name, (reads, writes) in pipes.items():
            os.close(writes)
            os.set_blocking(reads, False)
            child.open.add(reads)
            self._fds[reads] = (child, name)
            self._poll.register(reads, select.POLLIN)

    @staticmethod
    def _clone() -> int:
        number = _CLONE[platform.machine()]
        return _checked(_LIBC.syscall(number, _NEW_NAMESPACES | signal.SIGCHLD, 0, 0, 0, 0), "clone")

    def _in_child(self, order: dict[str, Any], pipes: dict[str, tuple[int, int]], inner: int | None) -> NoReturn:
        fault = pipes["fault"][1]
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGINT, signal.SIGXFSZ):
                signal.signal(number, signal.SIG_DFL)
            os.setsid()
            os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
            os.dup2(pipes["stdout"][1], 1)
            os.dup2(pipes["stderr"][1], 2)
            os.umask(0o022)
            if "in" in order:
                self._enter(inner)
            else:
                name = order["host"].encode()
                _checked(_LIBC.sethostname(name, len(name)), "sethostname")
                os.chroot(_lay_out(order, self._stage))
            _become(order, (order["user"][0], order["user"][1]))
        except BaseException as error:
            text = str(error) if isinstance(error, OSError) else repr(error)
            with contextlib.suppress(OSError):
                os.write(fault, text.encode()[:4000])
        finally:
            os._exit(127)

    def _enter(self, pid: int | None) -> None:
        """Go into a container. Who returns is a new process in it; the caller waits for that one and ends like it."""
        if pid is None:
            raise ProcessLookupError("container not running")
        root = os.open(f"/proc/{pid}/root", os.O_RDONLY)
        spaces = [os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY) for name in ("uts", "pid", "mnt")]
        for space in spaces:
            _checked(_LIBC.setns(space, 0), "setns")
        os.fchdir(root)
        os.chroot(".")
        for fd in (root, *spaces):
            os.close(fd)
        if inside := os.fork():
            os.closerange(3, 64)  # else our copy of the fault pipe would hide that the program has begun
            os._exit(os.waitstatus_to_exitcode(os.waitpid(inside, 0)[1]) & 0xFF)

    def signal(self, order: dict[str, Any]) -> None:
        if pid := self._names.get(order["id"]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, order["number"])

    def _read(self, fd: int) -> None:
        child, name = self._fds[fd]
        try:
            data = os.read(fd, 1 << 16)
        except BlockingIOError:
            return
        if name == "fault":
            child.failed += data.decode(errors="replace")
            if not data and not child.failed:
                self._tell(child, "started")
        else:
            child.keep(name, data)
        if not data:
            self._poll.unregister(fd)
            os.close(fd)
            del self._fds[fd]
            child.open.discard(fd)
            self._settle(child)

    def _settle(self, child: _Child) -> None:
        """Once a process is gone and all it printed is kept, say so."""
        if child.code is None or child.open:
            return
        child.close()
        del self._children[child.pid]
        if self._names.get(child.name) == child.pid:
            del self._names[child.name]
        if child.failed:
            self._tell(child, "failed", why=child.failed)
        else:
            self._tell(child, "ended", code=child.code)

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return
                if child := self._children.get(pid):
                    code = os.waitstatus_to_exitcode(status)
                    child.code = code if code >= 0 else 128 - code
                    self._settle(child)

    def serve(self) -> None:
        """Until stdin ends."""
        woken, wakes = os.pipe()
        os.set_blocking(wakes, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
        for fd in (0, woken):
            self._poll.register(fd, select.POLLIN)
        pending = b""
        while True:
            for fd, _ in self._poll.poll():
                if fd == woken:
                    os.read(woken, 4096)
                elif fd == 0:
                    data = os.read(0, 1 << 16)
                    if not data:
                        return
                    *lines, pending = (pending + data).split(b"\n")
                    for line in lines:
                        order = json.loads(line)
                        (self.start if order["do"] == "start" else self.signal)(order)
                elif fd in self._fds:
                    self._read(fd)
            self._reap()


def main(stage: str) -> None:
    """Hold the namespace until stdin ends."""
    with contextlib.suppress(BrokenPipeError):
        Runtime(stage).serve()
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)
    shutil.rmtree(os.path.dirname(stage), ignore_errors=True)  # the other side may have been killed


if __name__ == "__main__":
    main(sys.argv[1])
