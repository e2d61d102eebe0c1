"""Short CLI children: started, fed, listened to and ended within one call."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import time
from typing import Mapping, NamedTuple, Sequence

from oz_worker.limits import restore_open_files
from oz_worker.process import HELPER, Child, Request, open_pidfd, spawn
from oz_worker.timing import Deadline


class Outcome(NamedTuple):
    """How a short child ended. `code` is None when it was ended by us: too late, or interrupted."""

    code: int | None
    output: bytes
    errors: bytes
    truncated: bool = False
    late: bool = False


DRAIN = 1.0
"""Seconds for what holds the pipes of a child that has ended."""


def run(
    argv: Sequence[str],
    *,
    environment: Mapping[str, str],
    instance: str,
    timeout: float,
    stdin: bytes = b"",
    directory: str | None = None,
    limit: int = 1 << 20,
    interrupt: int = -1,
    merged: bool = False,
    into: int = -1,
) -> Outcome:
    """Run a short CLI to its end and keep the first *limit* bytes of each of its streams.

    *merged*: both streams in one, in their order, of which the last *limit* bytes are kept; or all of it in the file
    *into*, a descriptor of the caller's.

    One poll in the calling thread serves output, input, exit, *timeout* seconds and *interrupt* (a descriptor that
    becomes readable when the caller wants to leave). What holds the pipes open after the exit is waited for at most a
    second. The child carries the helper mark; its whole group is killed when it is late. Raises SpawnError.

    Where *stdin* fits into a pipe it is all there before the child is: a kill of this process must not let an order
    without its conditions through. Longer ones may be cut off by that, which who reads them has to notice.
    """
    pipe = subprocess.PIPE
    marked = {**environment, HELPER: instance}
    output, errors = into if into >= 0 else pipe, subprocess.STDOUT if merged else pipe
    filled = _filled(stdin)
    source = filled if filled >= 0 else pipe if stdin else subprocess.DEVNULL
    try:
        child = spawn(Request(argv, marked, directory, source, output, errors))
    finally:
        if filled >= 0:
            os.close(filled)
    restore_open_files(child.pid)
    talk = _Talk(child, b"" if filled >= 0 else stdin, limit, last=merged)
    try:
        code = talk.until_exit(Deadline(timeout), interrupt)
        if code is None:
            child.signal_group(signal.SIGKILL)
        talk.drain()
        return Outcome(code, bytes(talk.output[-limit:]), bytes(talk.errors), talk.truncated, late=code is None)
    finally:
        end(child)


def _filled(data: bytes) -> int:
    """The reading end of a pipe that holds all of *data* and is closed to writers; -1 where it is too long for one."""
    if not data:
        return -1
    read, write = os.pipe()
    try:
        if len(data) > select.PIPE_BUF and hasattr(fcntl, "F_SETPIPE_SZ"):
            with contextlib.suppress(OSError):  # more than this system lets a pipe hold
                fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, len(data))
        os.set_blocking(write, False)
        if os.write(write, data) == len(data):
            return read
    except BlockingIOError:
        pass
    finally:
        os.close(write)
    os.close(read)
    return -1


def end(child: Child) -> None:
    """Kill the group of a child that still runs, reap it and close its pipes: the last thing done with it."""
    if child.poll() is None:
        child.signal_group(signal.SIGKILL)
    deadline = Deadline(5)
    while not child.reap() and not deadline.passed():
        time.sleep(0.002)
    child.close_pipes()


class _Talk:
    """Feeds and drains the pipes of one short child. One thread uses it."""

    def __init__(self, child: Child, stdin: bytes, limit: int, *, last: bool) -> None:
        self._child = child
        self._last = last
        self._left = memoryview(stdin)
        self._limit = limit
        self.output, self.errors, self.truncated = bytearray(), bytearray(), False
        streams = ((child.stdout, self.output), (child.stderr, self.errors))
        self._readers = {descriptor: kept for descriptor, kept in streams if descriptor >= 0}
        for descriptor in (child.stdin, child.stdout, child.stderr):
            if descriptor >= 0:
                os.set_blocking(descriptor, False)

    def until_exit(self, deadline: Deadline, interrupt: int) -> int | None:
        """Talk until the child ends (its code) or the deadline or interrupt comes (None)."""
        watch = open_pidfd(self._child.pid)
        try:
            while True:
                code = self._child.poll()
                if code is not None or deadline.passed():
                    return code
                pause = deadline.left() if watch >= 0 else min(0.05, deadline.left())
                if interrupt in self._turn([watch, interrupt], pause):
                    return None
        finally:
            if watch >= 0:
                os.close(watch)

    def drain(self) -> None:
        """After the end: read what is in the pipes, but wait for no grandchild that holds them."""
        deadline = Deadline(DRAIN)
        while self._readers and not deadline.passed():
            self._turn([], deadline.left())

    def _turn(self, extra: Sequence[int], pause: float) -> set[int]:
        poll = select.poll()
        for descriptor in [*self._readers, *(d for d in extra if d >= 0)]:
            poll.register(descriptor, select.POLLIN)
        if self._child.stdin >= 0:
            poll.register(self._child.stdin, select.POLLOUT)
        ready = {descriptor for descriptor, _ in poll.poll(max(0.0, pause) * 1000)}
        if self._child.stdin in ready:
            self._feed()
        for descriptor in ready & set(self._readers):
            self._read(descriptor)
        return ready

    def _feed(self) -> None:
        try:
            self._left = self._left[os.write(self._child.stdin, self._left[:65536]) :]
        except BlockingIOError:
            return
        except OSError:  # it does not want its input; that is its business
            self._left = self._left[:0]
        if not self._left:
            os.close(self._child.stdin)
            self._child.stdin = -1

    def _read(self, descriptor: int) -> None:
        try:
            data = os.read(descriptor, 65536)
        except BlockingIOError:
            return
        kept = self._readers[descriptor]
        room = self._limit - len(kept)
        self.truncated = self.truncated or len(data) > room
        if not self._last:
            kept += data[:room]
        else:
            kept += data
            if len(kept) > 2 * self._limit:  # not at each piece: that would move everything each time
                del kept[: -self._limit]
        if not data:
            del self._readers[descriptor]
