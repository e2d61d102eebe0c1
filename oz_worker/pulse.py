"""The one way in which the main thread waits: a descriptor, a moment and the wake-up fd in the same `poll`."""

from __future__ import annotations

import math
import select
import time
from typing import Callable

from oz_worker import vitals
from oz_worker.threads import Waker


class Pulse:
    """Waits for a descriptor without ever becoming deaf to the waker. For the main thread alone.

    *on_wake* is called after each wake-up and whenever the moment it returned last (monotonic, inf for none) is
    reached, from inside the wait (design 12, rule 18). What it raises passes through the caller of `poll`: that is
    how "leave" gets out of a DNS look-up, a TLS handshake or a blocked write.
    """

    def __init__(self, waker: Waker, on_wake: Callable[[], float]) -> None:
        self._waker = waker
        self._on_wake = on_wake
        self._next = math.inf

    def beat(self) -> None:
        """Ask now. The waker is drained first, so that a wake-up during the call is not lost."""
        self._waker.drain()
        self._next = self._on_wake()

    def poll(self, until: float, fd: int | None = None, events: int = select.POLLIN) -> bool:
        """Wait once, at most until the monotonic moment *until*; True when *fd* is ready (or broken).

        False says only that time passed or that somebody woke us: the caller looks at its state and clock again.
        """
        if time.monotonic() >= self._next:
            self.beat()
        poller = select.poll()
        poller.register(self._waker.fileno(), select.POLLIN)
        if fd is not None:
            poller.register(fd, events)
        longest = time.monotonic() + vitals.wait()
        ready = {number for number, _ in poller.poll(_milliseconds(min(until, self._next, longest)))}
        if self._waker.fileno() in ready or time.monotonic() >= self._next:
            self.beat()
        return fd in ready


def _milliseconds(until: float) -> int:
    """What `poll` wants; rounded up, or the last fraction of a millisecond would be a busy loop."""
    return max(0, math.ceil((until - time.monotonic()) * 1000))
