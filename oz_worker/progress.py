"""CLI children that take minutes and show how far they are: watched on a terminal of our own, ended when they stall.

Without a terminal `docker pull` prints nothing between "Pulling fs layer" and "Download complete" of a layer, and
podman nothing at all: a slow big layer would look like a stall.
"""

from __future__ import annotations

import collections
import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import termios
from typing import Callable, Mapping, NamedTuple, Sequence

from oz_worker.errand import DRAIN, end
from oz_worker.limits import restore_open_files
from oz_worker.process import HELPER, Child, Request, open_pidfd, spawn
from oz_worker.timing import Deadline

_NEVER = 1e9
_ROWS, _COLUMNS = 100, 400
"""Wide enough that no progress is shortened to fit."""
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_LAYER = re.compile(r"\b[0-9a-f]{10,64}\b")
_AMOUNT = re.compile(r"\d[\d.]*\s?[kKMGT]?i?[bB]\s*/\s*\d[\d.]*\s?[kKMGT]?i?[bB]")
_LONGEST = 8192
_SAID = 32 << 10


class Ending(NamedTuple):
    """How a watched child ended. `code` is None when it was ended by us.

    `stalled`: nothing moved for too long; `interrupted`: the caller wanted to leave; neither: it took too long.
    `words` is what it said beside its progress, `last` its last progress, "" for none.
    """

    code: int | None
    words: bytes
    last: str
    stalled: bool = False
    interrupted: bool = False


def watch(
    argv: Sequence[str],
    *,
    environment: Mapping[str, str],
    instance: str,
    timeout: float,
    quiet: float,
    shows_on: str,
    interrupt: int = -1,
    moved: Callable[[str], None] = lambda last: None,
) -> Ending:
    """Run a CLI that shows its progress on *shows_on* (`stdout` or `stderr`) if that is a terminal.

    One poll in the calling thread serves terminal, pipe, exit, *interrupt* (a descriptor that becomes readable when the
    caller wants to leave) and both limits in seconds, 0 for none: *timeout*, and *quiet* without progress. The child
    carries the helper mark; its whole group is killed when a limit is reached. What holds its streams open after the
    exit is waited for at most a second. *moved* hears of each progress and must not block. Raises SpawnError.
    """
    screen = Screen()
    terminal = _open_terminal()
    shown, other = (terminal[1], subprocess.PIPE) if terminal else (subprocess.PIPE, subprocess.PIPE)
    streams = {"stdout": other, "stderr": other, shows_on: shown}
    try:
        marked = {**environment, HELPER: instance}
        child = spawn(Request(argv, marked, stdout=streams["stdout"], stderr=streams["stderr"]))
    except BaseException:
        _close(terminal)
        raise
    restore_open_files(child.pid)
    shows = terminal[0] if terminal else getattr(child, shows_on)
    if terminal:
        os.close(terminal[1])
    watching = _Watching(child, screen, shows, moved, errors_shown=shows_on == "stderr")
    try:
        # Without a terminal nothing is shown in between: then silence is no stall.
        ending = watching.until_exit(Deadline(timeout or _NEVER), quiet if terminal else 0, interrupt)
        if ending.code is None:
            child.signal_group(signal.SIGKILL)
        watching.drain()
        return ending._replace(words=watching.words(), last=screen.last)
    finally:
        end(child)
        if terminal:
            os.close(terminal[0])


def _open_terminal() -> tuple[int, int] | None:
    """Our end of a new terminal and the child's, None where there are none to be had.

    `openpty` opens with O_NOCTTY: a daemon that leads a session does not get it for its own.
    """
    try:
        terminal = os.openpty()
    except OSError:
        return None
    fcntl.ioctl(terminal[1], termios.TIOCSWINSZ, struct.pack("HHHH", _ROWS, _COLUMNS, 0, 0))
    return terminal


def _close(terminal: tuple[int, int] | None) -> None:
    for descriptor in terminal or ():
        os.close(descriptor)


class Screen:
    """What stands on the terminal, as far as it tells whether something moves. One thread uses it.

    Progress is a text that differs from the last one of the same layer: a redraw of the same numbers is none, and
    neither are a bar without numbers or what stands behind them, for instance a speed.
    """

    def __init__(self) -> None:
        self.last = ""
        self.said: collections.deque[str] = collections.deque(maxlen=50)  # texts that are no layer's
        self._rest = b""
        self._shown: dict[str, tuple[str, ...]] = {}

    def feed(self, data: bytes) -> bool:
        """Take what the child has written; whether it shows progress."""
        *texts, rest = re.split(rb"[\r\n]+", self._rest + data)
        self._rest = rest[-_LONGEST:]
        moved = False
        for text in texts:
            shown = _ESCAPE.sub("", text[:_LONGEST].decode("utf-8", "replace")).strip()
            moved = (bool(shown) and self._take(shown)) or moved
        return moved

    def _take(self, text: str) -> bool:
        layer = _LAYER.search(text)
        amount = _AMOUNT.search(text)
        state = tuple(re.findall(r"\w+", text[: amount.end()] if amount else text))
        key = layer[0] if layer else ""
        if not layer or text.startswith("Error"):  # which may name a layer
            self.said.append(text)
        if not state or self._shown.get(key) == state:
            return False
        self._shown[key] = state
        self.last = text
        return True


class _Watching:
    """Reads both streams of one child until it ends. One thread uses it."""

    def __init__(
        self, child: Child, screen: Screen, shows: int, moved: Callable[[str], None], *, errors_shown: bool
    ) -> None:
        self._moved = moved
        self._child = child
        self._screen = screen
        self._shows = shows
        self._errors_shown = errors_shown
        self._said = bytearray()  # the end of what came through the pipe of errors
        self._open = {shows, *({child.stdout, child.stderr} - {-1})}
        for descriptor in self._open:
            os.set_blocking(descriptor, False)

    def until_exit(self, deadline: Deadline, quiet: float, interrupt: int) -> Ending:
        """Watch until the child ends or must be ended; whatever moves begins the time without progress anew."""
        watch = open_pidfd(self._child.pid)
        stall = Deadline(quiet or _NEVER)
        try:
            while True:
                code = self._child.poll()
                if code is not None or deadline.passed() or stall.passed():
                    return Ending(code, b"", "", stalled=code is None and not deadline.passed())
                pause = min(deadline.left(), stall.left(), 60.0 if watch >= 0 else 0.05)
                ready, moved = self._turn([watch, interrupt], pause)
                if interrupt in ready:
                    return Ending(None, b"", "", interrupted=True)
                if moved:
                    stall = Deadline(quiet or _NEVER)
        finally:
            if watch >= 0:
                os.close(watch)

    def drain(self) -> None:
        """After the end: read what is on its way, but wait for no grandchild that holds a stream."""
        deadline = Deadline(DRAIN)
        while self._open and not deadline.passed():
            self._turn([], deadline.left())

    def words(self) -> bytes:
        """What it said beside its progress: its errors, where they have a pipe of their own."""
        return "\n".join(self._screen.said).encode() if self._errors_shown else bytes(self._said)

    def _turn(self, extra: Sequence[int], pause: float) -> tuple[set[int], bool]:
        poll = select.poll()
        for descriptor in [*self._open, *(d for d in extra if d >= 0)]:
            poll.register(descriptor, select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll(max(0.0, pause) * 1000)}
        moved = [self._read(descriptor) for descriptor in ready & self._open]
        return ready, any(moved)

    def _read(self, descriptor: int) -> bool:
        try:
            data = os.read(descriptor, 65536)
        except BlockingIOError:
            return False
        except OSError:  # EIO: nobody has the terminal open any more
            data = b""
        if not data:
            self._open.discard(descriptor)
        if descriptor == self._shows:
            moved = self._screen.feed(data or b"\n")
            if moved:
                self._moved(self._screen.last)
            return moved
        if descriptor == self._child.stderr:
            self._said += data
            del self._said[:-_SAID]
        return False
