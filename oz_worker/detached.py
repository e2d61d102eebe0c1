"""Processes that outlive this worker, and the few lines of shell that record how they end (rule 6).

    read -r go <&2  blocks until our handle (pid, start ticks, boot id) is on disk; our death closes the pipe, so that
                    no handle on disk proves that nothing ran. The pipe is where messages will go to, because the input
                    is the program's: nothing, or what is on no disk
    "$@"            in the foreground, under a trap: a TERM to the group ends the program, not the recorder
    echo $? 1<>"$0" the shell's builtin writes the status in place over four blanks: no new inode, no new process,
                    so that neither a full disk nor the limit of processes loses it

The status is valid only as digits and newline. Nothing is fsynced: after a reboot the boot id says that it ended.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Mapping, NamedTuple, Sequence

from oz_worker.limits import soft_limit_for_children
from oz_worker.nameless import nameless
from oz_worker.process import Child, Identity, Request, SpawnError, explain, spawn
from oz_worker.unreadable import unreadable

AGENT = "agent"
_BLANKS = b"    "
_LARGEST = 1024 * 1024
_STATUS = re.compile(rb"(\d{1,3})\n")
_SHELL = "/bin/sh"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_SHELLS_OWN = frozenset(
    ("IFS", "OPTIND", "PPID", "LINENO", "RANDOM", "SECONDS", "PS1", "PS2", "PS4", "SHELLOPTS", "BASHOPTS")
)
ODD = "OZ_WORKERODD_NAMES"

# The status file is $0 and the variables have names of ours: a plain name could overwrite one of the task's own.
_RECORDER = """read -r OZ_WORKER_GO <&2 || exit 125
exec 2>&1
trap : TERM INT HUP
{limit}"$@"
echo $? 1<>"$0"
"""

# A shell drops variables whose names it could not use (`npm_config_//registry/:_authToken`, `a.b`) and changes those it
# gives a meaning of its own. They travel in one variable past it; only a task that has some pays for the interpreter.
_UNPACK = (
    "import json, os, sys\n"
    f"e = {{**os.environ, **json.loads(os.environ[{ODD!r}])}}\n"
    "e = {n: v for n, v in e.items() if v is not None}\n"
    "try: os.execve(sys.argv[1], sys.argv[1:], e)\n"
    "except OSError as x: print(sys.argv[1], x.strerror, file=sys.stderr); os._exit(127 if x.errno == 2 else 126)\n"
)


class Handle(NamedTuple):
    """What is on disk of a process that was let go: who it is, and the kernel's count of memory kills before."""

    identity: Identity
    memory_kills: int


class UnitDirectory:
    """`units/<unit>/` of an instance: the files by which a restarted worker finds what it had started.

    Used by the unit's thread; `status` and `handle` from any. A *step* is `agent` (files `pid` and `status`) or the
    name of a hook (files `<step>.pid` and `<step>.status`).
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        """The unit's name."""
        return self.path.name

    @property
    def output(self) -> Path:
        """Where everything writes its output."""
        return self.path / "output.log"

    def file(self, name: str) -> str:
        """The path of a file inside."""
        return os.path.join(self.path, name)

    def create(self, facts: Mapping[str, Any]) -> None:
        """Make the directory with `unit.json` inside. Raises OSError."""
        os.makedirs(self.path, mode=0o700, exist_ok=True)
        self.write_facts(facts)

    def write_facts(self, facts: Mapping[str, Any]) -> None:
        """Replace `unit.json`: no secret ever stands there. Raises OSError."""
        self.replace("unit.json", json.dumps(facts))

    def facts(self) -> dict[str, Any] | None:
        """What stands in `unit.json`, None when there is none or it is damaged. Raises Unreadable."""
        data = self._read("unit.json", _LARGEST)
        try:
            facts = json.loads(data) if data is not None else None
        except ValueError:
            return None
        return facts if isinstance(facts, dict) else None

    def replace(self, name: str, text: str) -> None:
        """Write a private file so that it is seen whole or not at all, also by a reader after our death."""
        temporary = self.file(name + ".new")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, text.encode("utf-8", "surrogateescape"))
        finally:
            os.close(descriptor)
        os.rename(temporary, self.file(name))

    def private(self, name: str, data: bytes = b"") -> str:
        """Make a file that only this user can read; its path."""
        path = self.file(name)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
        finally:
            os.close(descriptor)
        return path

    def remove(self, *names: str) -> None:
        """Remove files that may not exist."""
        for name in names:
            try:
                os.unlink(self.file(name))
            except (FileNotFoundError, IsADirectoryError):
                pass  # a directory is not ours; it goes with the unit's own

    def status(self, step: str = AGENT) -> int | None:
        """The recorded exit code, None when none was recorded. Raises Unreadable."""
        data = self._read(_name(step, "status"), 8)
        match = _STATUS.match(data) if data is not None else None
        return int(match[1]) if match else None

    def handle(self, step: str = AGENT) -> Handle | None:
        """The process that was let go for this step; None proves that none was. Raises Unreadable."""
        data = self._read(_name(step, "pid"), 256)
        try:
            pid, ticks, boot, kills = (data or b"").decode("ascii").split()
            return Handle(Identity(int(pid), int(ticks), boot), int(kills))
        except ValueError:
            return None

    def _read(self, name: str, limit: int) -> bytes | None:
        """The head of a file, None when it does not exist: the only answer that proves something."""
        path = self.file(name)
        try:
            with open(path, "rb", buffering=0) as file:
                return file.read(limit)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise unreadable(path, error) from error


def _name(step: str, suffix: str) -> str:
    return suffix if step == AGENT else f"{step}.{suffix}"


class Launch(NamedTuple):
    """What to run detached. *stdin* is what it reads: it stays in memory, so that it leaves no trace on a disk."""

    argv: Sequence[str]
    environment: Mapping[str, str]
    directory: str
    stdin: bytes = b""


class Detached:
    """A recorder that waits for its word. `go` lets it run, `drop` makes it leave with nothing done."""

    def __init__(self, child: Child, directory: UnitDirectory, step: str, word: int) -> None:
        self.child = child
        self._directory = directory
        self._step = step
        self._word = word

    def go(self) -> None:
        """Commit the handle, then let it run. Raises OSError when the handle cannot be written; then nothing ran."""
        pid, ticks, boot = self.child.identity
        try:
            self._directory.replace(_name(self._step, "pid"), f"{pid} {ticks} {boot} {memory_kills()}\n")
            os.write(self._word, b"go\n")
        except BrokenPipeError:
            pass  # it was killed already; its end will be noticed like any other
        finally:
            os.close(self._word)

    def drop(self) -> None:
        """Let it leave without running."""
        os.close(self._word)


def launch(launch: Launch, directory: UnitDirectory, step: str = AGENT) -> Detached:
    """Start the recorder in a session of its own, waiting for `go`. Raises SpawnError or OSError with the cause."""
    check_program(launch.argv[0], launch.directory)
    directory.remove(_name(step, "pid"))
    directory.private(_name(step, "status"), _BLANKS)
    argv, environment = _past_the_shell(launch)
    limit = soft_limit_for_children()
    script = _RECORDER.format(limit=f"ulimit -Sn {limit}\n" if limit is not None else "")
    command = [_SHELL, "-c", script, directory.file(_name(step, "status")), *argv]
    ours: list[int] = []  # closed in any case
    write = -1
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        ours.append(output := os.open(directory.output, flags, 0o600))
        stdin = subprocess.DEVNULL
        if launch.stdin:
            ours.append(stdin := nameless(launch.stdin))
        read, write = os.pipe()
        ours.append(read)
        child = spawn(Request(command, environment, launch.directory, stdin, output, read))
    except BaseException:
        if write >= 0:
            os.close(write)
        raise
    finally:
        for descriptor in ours:
            os.close(descriptor)
    return Detached(child, directory, step, write)


def check_program(program: str, directory: str) -> None:
    """Raise the sentence that the shell could not say: what is missing, the program or the directory."""
    if not os.path.isdir(directory):
        raise explain(FileNotFoundError(), program, directory)
    if not os.path.isfile(program):
        raise explain(FileNotFoundError(), program, None)
    if not os.access(program, os.X_OK):
        raise explain(PermissionError(), program, None)


def _past_the_shell(launch: Launch) -> tuple[list[str], dict[str, str]]:
    odd: dict[str, str | None] = {
        name: value for name, value in launch.environment.items() if not _NAME.match(name) or name in _SHELLS_OWN
    }
    if not odd:
        return list(launch.argv), dict(launch.environment)
    if any("=" in name or "\0" in name or not name for name in odd):
        raise SpawnError("an environment variable has an impossible name: it is empty or has '=' or NUL in it")
    kept = {name: value for name, value in launch.environment.items() if name not in odd}
    odd[ODD] = None  # not for the task
    if "LC_CTYPE" not in kept:
        odd["LC_CTYPE"] = None  # Python sets it by itself where the locale is C
    return [sys.executable, "-I", "-S", "-c", _UNPACK, *launch.argv], {**kept, ODD: json.dumps(odd)}


def memory_kills() -> int:
    """How often this kernel has killed for memory since boot; 0 where it does not say."""
    try:
        with open("/proc/vmstat", "rb", buffering=0) as file:
            data = file.read(16384)
    except OSError:
        return 0
    start = data.find(b"\noom_kill ")
    return int(data[start + 10 :].split(b"\n", 1)[0]) if start >= 0 else 0
