"""Short CLI children: started, fed, listened to and ended within one call."""

from __future__ import annotations

import logging
import os
import select
import signal
import subprocess
import time
from typing import Mapping, NamedTuple, Sequence

from oz_worker import vitals
from oz_worker.limits import restore_open_files
from oz_worker.nameless import nameless
from oz_worker.process import HELPER, Child, Request, SpawnError, open_pidfd, spawn
from oz_worker.timing import Deadline

logger = logging.getLogger(__name__)


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

    The child finds all of *stdin* there: our death does not cut it short, which would be another order than was meant.
    One poll in the calling thread serves output, exit, *timeout* seconds and *interrupt* (a descriptor that
    becomes readable when the caller wants to leave). What holds the pipes open after the exit is waited for at most a
    second. The child carries the helper mark; its whole group is killed when it is late. Raises SpawnError.
    """
    began, pipe = time.monotonic(), subprocess.PIPE
    marked = {**environment, HELPER: instance}
    output, errors = into if into >= 0 else pipe, subprocess.STDOUT if merged else pipe
    try:
        given = nameless(stdin) if stdin else subprocess.DEVNULL
    except OSError as error:
        raise SpawnError(f"{argv[0]} cannot be given its input: {error.strerror}") from error
    try:
        child = spawn(Request(argv, marked, directory, given, output, errors))
    finally:
        if given >= 0:
            os.close(given)
    restore_open_files(child.pid)
    talk = _Talk(child, limit, last=merged)
    try:
        code = talk.until_exit(Deadline(timeout), interrupt)
        if code is None:
            child.signal_group(signal.SIGKILL)
        talk.drain()
        _tell(argv, code, time.monotonic() - began)
        return Outcome(code, bytes(talk.output[-limit:]), bytes(talk.errors), talk.truncated, late=code is None)
    finally:
        end(child)


def _tell(argv: Sequence[str], code: int | None, seconds: float) -> None:
    """At debug level; of the arguments the order alone (`run`, `get`), the others may be anybody's."""
    if logger.isEnabledFor(logging.DEBUG):
        order = next((f" {word}" for word in argv[1:] if word.isalpha() and word.islower()), "")
        how = "was ended by us" if code is None else f"ended with exit code {code}"
        logger.debug("%s%s %s after %.3f s", argv[0], order, how, seconds)


def end(child: Child) -> None:
    """Kill the group of a child that still runs, reap it and close its pipes: the last thing done with it."""
    if child.poll() is None:
        child.signal_group(signal.SIGKILL)
    deadline = Deadline(5)
    while not child.reap() and not deadline.passed():
        time.sleep(0.002)
    child.close_pipes()


class _Talk:
    """Drains the pipes of one short child. One thread uses it."""

    def __init__(self, child: Child, limit: int, *, last: bool) -> None:
        self._child = child
        self._last = last
        self._limit = limit
        self.output, self.errors, self.truncated = bytearray(), bytearray(), False
        streams = ((child.stdout, self.output), (child.stderr, self.errors))
        self._readers = {descriptor: kept for descriptor, kept in streams if descriptor >= 0}
        for descriptor in (child.stdout, child.stderr):
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
        ready = {descriptor for descriptor, _ in poll.poll(max(0.0, vitals.wait(pause)) * 1000)}
        for descriptor in ready & set(self._readers):
            self._read(descriptor)
        return ready

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
