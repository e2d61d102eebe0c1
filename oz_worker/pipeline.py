"""Two short CLI children joined by a pipe of ours, which sees the end of what flows through it."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
from typing import Mapping, NamedTuple, Sequence

from oz_worker import errand
from oz_worker.errand import Outcome
from oz_worker.limits import restore_open_files
from oz_worker.process import HELPER, Child, Request, open_pidfd, spawn
from oz_worker.timing import Deadline

_PIECE = 1 << 16
_ERRORS = 1 << 16
_LONGEST_PAUSE = 3600.0


class Flow(NamedTuple):
    """How both ended. The source's `output` are the last bytes it wrote, the sink's is not kept.

    `sink_failed_first`: what the source says then is a consequence. `interrupted`: why both are late.
    """

    source: Outcome
    sink: Outcome
    sink_failed_first: bool = False
    interrupted: bool = False


def join(
    source: Sequence[str],
    sink: Sequence[str],
    *,
    environment: Mapping[str, str],
    instance: str,
    timeout: float,
    last: int,
    interrupt: int = -1,
) -> Flow:
    """Run `source | sink` to both ends; keep the *last* bytes that went through, and what both say on stderr.

    The bytes pass through this process, because a pipe between the children alone could not tell a stream that is
    complete from one that was cut. One poll in the calling thread serves everything, *timeout* seconds and *interrupt*
    (a descriptor that becomes readable when the caller wants to leave) too. Both carry the helper mark and are killed
    with their groups when they are late. Memory: one piece of 64 KiB. Raises SpawnError.
    """
    marked = {**environment, HELPER: instance}
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
    with contextlib.ExitStack() as stack:

        def start(request: Request) -> Child:
            child = spawn(request)
            stack.callback(errand.end, child)
            restore_open_files(child.pid)
            return child

        reads = start(Request(source, marked, stdout=pipe, stderr=pipe))
        writes = start(Request(sink, marked, stdin=pipe, stdout=nothing, stderr=pipe))
        joint = _Joint(reads, writes, last)
        done, interrupted = joint.until_both_end(Deadline(timeout), interrupt)
        outcomes = [
            Outcome(child.poll() if done else None, b"", joint.said(child), late=not done) for child in (reads, writes)
        ]
        return Flow(outcomes[0]._replace(output=joint.last), outcomes[1], joint.sink_failed_first, interrupted)


class _Joint:
    """Moves bytes from one child to the other. One thread uses it."""

    def __init__(self, source: Child, sink: Child, keep: int) -> None:
        self._source, self._sink = source, sink
        self._keep = keep
        self._left = memoryview(b"")  # read, not yet written
        self._errors = {source.stderr: bytearray(), sink.stderr: bytearray()}
        self._open = {source.stderr, sink.stderr}
        self._said = {source.pid: self._errors[source.stderr], sink.pid: self._errors[sink.stderr]}
        self.last = b""
        self.sink_failed_first = False
        for descriptor in (source.stdout, source.stderr, sink.stdin, sink.stderr):
            os.set_blocking(descriptor, False)

    def said(self, child: Child) -> bytes:
        """What it wrote on stderr."""
        return bytes(self._said[child.pid])

    def until_both_end(self, deadline: Deadline, interrupt: int) -> tuple[bool, bool]:
        """Whether both ended before the deadline and the interrupt, and whether it was the interrupt."""
        watches = {child: open_pidfd(child.pid) for child in (self._source, self._sink)}
        try:
            while alive := [child for child in watches if child.poll() is None]:
                if self._sink not in alive and self._sink.poll() and self._source.stdout >= 0:
                    self.sink_failed_first = True
                    self._close_source()  # nobody wants the rest
                if deadline.passed():
                    return False, False
                waited = [watches[child] for child in alive]
                pause = deadline.left() if min(waited) >= 0 else min(0.05, deadline.left())
                if interrupt in self._turn([*waited, interrupt], pause):
                    return False, True
            self._finish()
            return True, False
        finally:
            for descriptor in watches.values():
                if descriptor >= 0:
                    os.close(descriptor)

    def _turn(self, extra: Sequence[int], pause: float) -> set[int]:
        poll = select.poll()
        for descriptor in [*self._open, *(one for one in extra if one >= 0)]:
            poll.register(descriptor, select.POLLIN)
        if self._left:
            poll.register(self._sink.stdin, select.POLLOUT)
        elif self._source.stdout >= 0:
            poll.register(self._source.stdout, select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll(min(max(0.0, pause), _LONGEST_PAUSE) * 1000)}
        for descriptor in ready & self._open:
            self._listen(descriptor)
        if self._left and self._sink.stdin in ready:
            self._write()
        elif self._source.stdout in ready:
            self._read()
        return ready

    def _read(self) -> bool:
        """Take one piece from the source; whether there was one."""
        try:
            piece = os.read(self._source.stdout, _PIECE)
        except BlockingIOError:
            return False
        if not piece:
            self._close_source()
            self._close_sink()
            return False
        self.last = (self.last + piece)[-self._keep :] if len(piece) < self._keep else piece[-self._keep :]
        if self._sink.stdin >= 0:  # else it has had enough: the rest is read for its end alone
            self._left = memoryview(piece)
        return True

    def _write(self) -> None:
        try:
            self._left = self._left[os.write(self._sink.stdin, self._left) :]
        except BlockingIOError:
            pass
        except OSError:  # it reads no more; its exit code says whether it is content
            self._left = memoryview(b"")
            self._close_sink()

    def _listen(self, descriptor: int) -> None:
        with contextlib.suppress(BlockingIOError):
            words = os.read(descriptor, _PIECE)
            kept = self._errors[descriptor]
            kept += words
            del kept[:-_ERRORS]
            if not words:
                self._open.discard(descriptor)

    def _finish(self) -> None:
        """Both have ended: read what lies in the pipes, but wait for no grandchild that holds them."""
        while self._source.stdout >= 0 and self._read():
            self._left = memoryview(b"")
        for descriptor in set(self._open):
            self._listen(descriptor)

    def _close_source(self) -> None:
        if self._source.stdout >= 0:
            os.close(self._source.stdout)
            self._source.stdout = -1

    def _close_sink(self) -> None:
        if self._sink.stdin >= 0:
            os.close(self._sink.stdin)
            self._sink.stdin = -1
