"""Working directories of tasks: made, marked outside themselves, and removed without ever leaving them."""

from __future__ import annotations

import errno
import logging
import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

from oz_worker import vitals
from oz_worker.errors import NotUsable, TaskFault
from oz_worker.model import ExitFacts, Key, Reason

logger = logging.getLogger(__name__)

MARKERS = ".oz-worker"
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")
_NAMED = 5
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def workspace_name(key: Key, unit: str) -> str:
    """`<task>-<execution>-<8 of unit>`, each id cut to 40. TaskFault when an id cannot be part of a path."""
    parts = []
    for what, value in (("task id", key.task_id), ("execution id", key.execution_id)):
        if value in (".", "..") or "/" in value or "\\" in value or "\0" in value or (not value and what == "task id"):
            raise _fault(f"the {what} {value[:80]!r} cannot be part of a path; the server has to send another one")
        # A leading dot would hide the directory, or be the directory of the markers.
        parts.append(re.sub(r"\A\.", "_", _UNSAFE.sub("_", value[:40])))
    return "-".join([*(part for part in parts if part), unit[:8]])


def _fault(sentence: str) -> TaskFault:
    return TaskFault(ExitFacts(reason=Reason.WORKSPACE_SETUP, detail=sentence, agent_started=False))


class WorkspaceRoot:
    """The directory below which each execution gets one of its own. Safe from any thread: it has no state.

    A directory is ours when `.oz-worker/<its name>` holds our instance. Only such directories are removed.
    """

    def __init__(self, path: str, instance: str) -> None:
        self.path = os.path.abspath(path)
        self._instance = instance

    def open(self) -> None:
        """Make it and prove that directories can be made inside. Raises NotUsable with the cure."""
        try:
            os.makedirs(self._markers(), mode=0o700, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise NotUsable(
                f"workspace_root {self.path} is not a directory; remove the file in its way or choose another path"
            ) from None
        except OSError as error:
            raise NotUsable(
                f"workspace_root {self.path} cannot be made: {error.strerror}; choose a writable path"
            ) from error
        if self.unavailable():
            raise NotUsable(self.unavailable())

    def unavailable(self) -> str:
        """Why no workspace can be made just now; "" when one can."""
        if not os.path.isdir(self.path):
            return f"workspace_root {self.path} is gone; make it again or mount it"
        if not os.access(self.path, os.W_OK | os.X_OK):
            return f"workspace_root {self.path} is not writable for this user; change its rights or choose another path"
        return ""

    def create(self, name: str) -> str:
        """Make the workspace *name*, private and marked. Raises TaskFault with the cure."""
        path, marker = os.path.join(self.path, name), os.path.join(self._markers(), name)
        try:
            if os.path.lexists(path) and not self.owns(name):
                raise _fault(f"workspace {path} exists and is not this worker's; remove it or move it away")
            os.makedirs(self._markers(), mode=0o700, exist_ok=True)
            # The marker first: a crash in between leaves a marker without a directory, which harms nobody.
            _write(marker, self._instance)
            if os.path.lexists(path):
                left = remove_tree(path)
                if left:
                    raise _fault(f"workspace {path} of an earlier attempt is in the way: {left}")
            os.mkdir(path, 0o700)
        except OSError as error:
            if not os.path.lexists(path):
                _unlink(marker)
            cure = "free space or inodes there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check its rights"
            raise _fault(f"workspace {path} cannot be made: {error.strerror}; {cure}") from error
        return path

    def owns(self, name: str) -> bool:
        """Whether the directory of that name carries our mark. Raises OSError for a mark that cannot be read."""
        return self._mark(name) == self._instance

    def _mark(self, name: str) -> str | None:
        try:
            return Path(self._markers(), name).read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return None

    def remove(self, name: str) -> str:
        """Remove the workspace *name* if it is ours; one sentence about what is left, "" when all is gone."""
        path = os.path.join(self.path, name)
        if not name or "/" in name or name.startswith("."):
            return f"{path!r} is no name of a workspace; nothing was removed"
        try:
            owned = self.owns(name)
        except OSError as error:
            return f"whose workspace {path} is cannot be read: {error.strerror}; nothing of it was removed"
        if not owned:
            if os.path.lexists(path):
                logger.warning("%s is not this worker's (no mark of ours in %s); it was left alone", path, MARKERS)
            elif self._mark(name) == "":  # its worker was killed while it wrote the mark
                _unlink(os.path.join(self._markers(), name))
            return ""
        left = remove_tree(path)
        if not left:
            try:
                os.unlink(os.path.join(self._markers(), name))
            except OSError as error:
                return f"marker of workspace {path} could not be removed: {error.strerror}"
        return left

    def _markers(self) -> str:
        return os.path.join(self.path, MARKERS)


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass  # a mark without a directory harms nobody


def _write(path: str, text: str) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(path, flags, 0o600)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def remove_tree(path: str) -> str:
    """Remove a directory and all below it; one sentence about what is left, "" when nothing is.

    Follows no link, leaves no mount point's other side touched, makes read-only directories writable on its way, and
    needs one descriptor whatever the depth: it goes up by `..` and checks that it came back to where it had been.
    """
    try:
        if stat.S_ISDIR(os.lstat(path).st_mode) and not os.access(path, os.R_OK | os.X_OK):
            os.chmod(path, 0o700)
        top = os.open(path, _DIRECTORY)
    except FileNotFoundError:
        return ""
    except OSError as error:  # a link or a file in its place: not what we made
        return f"{path} could not be removed: {error.strerror}"
    return _Removal(path, top).run()


class _Level(NamedTuple):
    """One directory on the way down: what it is called, who it is, and the directories that are still inside."""

    name: str
    identity: tuple[int, int]
    inside: list[str]


class _Removal:
    """One removal. One thread; `_here` is the only open directory, the last of `_levels`."""

    def __init__(self, path: str, top: int) -> None:
        self._path = path
        self._here = top
        self._device = os.fstat(top).st_dev
        self._mounts = _mounts_below(os.path.realpath(path))
        self._real = os.path.realpath(path)
        self._levels: list[_Level] = []
        self._problems: list[str] = []
        self._count = 0

    def run(self) -> str:
        """Remove it all; the sentence about the rest."""
        try:
            self._enter("")
            while self._levels:
                vitals.stamp()
                inside = self._levels[-1].inside
                if inside:
                    self._down(inside.pop())
                elif not self._up():
                    break
        finally:
            os.close(self._here)
        if not self._count:
            try:
                os.rmdir(self._path)
            except FileNotFoundError:
                pass
            except OSError as error:
                self._problem("", error)
        if not self._count:
            return ""
        more = f" and {self._count - _NAMED} more" if self._count > _NAMED else ""
        return f"could not remove {', '.join(self._problems)}{more}; remove it by hand"

    def _enter(self, name: str) -> None:
        """Take up the directory `_here`: remove its files, note its directories."""
        facts = os.fstat(self._here)
        if facts.st_mode & stat.S_IRWXU != stat.S_IRWXU:
            self._try("", lambda: os.fchmod(self._here, 0o700))
        inside: list[str] = []
        self._levels.append(_Level(name, (facts.st_dev, facts.st_ino), inside))
        try:
            with os.scandir(self._here) as entries:
                found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
        except OSError as error:
            self._problem("", error)
            return
        for entry, is_directory in found:
            if is_directory:
                inside.append(entry)
            else:
                self._remove_file(entry)

    def _remove_file(self, name: str) -> None:
        vitals.stamp()  # a tree may be of any size, and so may each directory in it
        self._try(name, lambda: os.unlink(name, dir_fd=self._here))

    def _down(self, name: str) -> None:
        if self._where(name) in self._mounts:
            self._problem(name, OSError(errno.EBUSY, "something is mounted there"))
            return
        descriptor = -1
        try:
            descriptor = self._open(name)
            if os.fstat(descriptor).st_dev != self._device:
                raise OSError(errno.EBUSY, "something is mounted there")
        except OSError as error:
            if descriptor >= 0:
                os.close(descriptor)
            self._problem(name, error)
            return
        os.close(self._here)
        self._here = descriptor
        self._enter(name)

    def _open(self, name: str) -> int:
        """A directory that may not be read is made readable first: nothing in there runs any more."""
        try:
            return os.open(name, _DIRECTORY, dir_fd=self._here)
        except PermissionError:
            facts = os.stat(name, dir_fd=self._here, follow_symlinks=False)
            if not stat.S_ISDIR(facts.st_mode):
                raise
            os.chmod(name, 0o700, dir_fd=self._here)
            return os.open(name, _DIRECTORY, dir_fd=self._here)

    def _up(self) -> bool:
        """Leave the finished directory and remove it from its parent; False at the top or when lost."""
        done = self._levels.pop()
        if not self._levels:
            return False
        parent = os.open("..", _DIRECTORY, dir_fd=self._here)
        facts = os.fstat(parent)
        os.close(self._here)
        self._here = parent
        if (facts.st_dev, facts.st_ino) != self._levels[-1].identity:
            self._problem("", OSError(errno.ESTALE, "it was moved while it was being removed"))
            return False
        self._try(done.name, lambda: os.rmdir(done.name, dir_fd=self._here))
        return True

    def _try(self, name: str, action: object) -> None:
        try:
            action()  # type: ignore[operator]
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:  # what stays inside has been named already
                self._problem(name, error)

    def _where(self, name: str) -> str:
        return os.path.join(self._real, *(level.name for level in self._levels[1:]), name)

    def _problem(self, name: str, error: OSError) -> None:
        self._count += 1
        if len(self._problems) < _NAMED:
            shown = os.path.join(self._path, *(level.name for level in self._levels[1:]), name).rstrip("/")
            self._problems.append(f"{shown} ({error.strerror})")


def _mounts_below(path: str) -> frozenset[str]:
    """Mount points below *path*: also bind mounts of the same file system, which no device number tells apart."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return frozenset()
    points = (re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), line.split()[4]) for line in lines)
    return frozenset(point for point in points if point.startswith(path + "/"))
