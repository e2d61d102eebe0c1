"""Threads whose death is noticed, and the two ways of waking one that waits.

`Waker` wakes a `poll` (the main thread's), `StopOrder` in `oz_worker.backends.base` wakes a task's thread.
"""

from __future__ import annotations

import logging
import queue
import socket
import threading
from typing import Callable

logger = logging.getLogger(__name__)

OnDeath = Callable[[str, BaseException], None]

STACK_BYTES = 512 * 1024
"""Enough for JSON, YAML and regular expressions; the default of 8 MiB maps 8 GB of addresses for 1,000 tasks."""


class Waker:
    """A non-blocking socketpair: `wake()` from any thread or signal handler, `poll` on `fileno()`.

    A socketpair and not an eventfd, because `signal.set_wakeup_fd` writes single bytes, which an eventfd refuses.
    """

    def __init__(self) -> None:
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)

    def fileno(self) -> int:
        """The descriptor that becomes readable after `wake()`."""
        return self._read.fileno()

    def write_fd(self) -> int:
        """The descriptor for `signal.set_wakeup_fd`."""
        return self._write.fileno()

    def wake(self) -> None:
        """Make `fileno()` readable. Never blocks: a full buffer already means "awake"."""
        try:
            self._write.send(b"\0")
        except (BlockingIOError, OSError):
            pass  # full: the reader is awake already; closed: nobody is left to wake

    def drain(self) -> None:
        """Swallow the wake-ups so far. Only the thread that polls calls this, before it looks at the state."""
        try:
            while self._read.recv(4096):
                pass
        except (BlockingIOError, OSError):
            pass

    def close(self) -> None:
        """Close both ends."""
        self._read.close()
        self._write.close()


class Deaths:
    """The names of threads that died: the `OnDeath` of every part, from any thread; taken by the main thread."""

    def __init__(self, waker: Waker) -> None:
        self._waker = waker
        self._names: queue.SimpleQueue[str] = queue.SimpleQueue()

    def __call__(self, name: str, _error: BaseException) -> None:
        """The thread *name* died."""
        self._names.put(name)
        self._waker.wake()

    def taken(self) -> str | None:
        """The next name, None when there is none."""
        try:
            return self._names.get_nowait()
        except queue.Empty:
            return None


def start(name: str, body: Callable[[], None], on_death: OnDeath) -> threading.Thread:
    """Start a daemon thread whose unexpected end is reported to *on_death(name, error)*, on that thread.

    Daemon, because a non-daemon thread would hold the process at exit for as long as its task runs.
    """

    def guarded() -> None:
        try:
            body()
        except BaseException as error:  # a thread's top: whatever it is, the daemon must hear of it
            logger.exception("thread %s died", name)
            on_death(name, error)

    thread = threading.Thread(target=guarded, name=name, daemon=True)
    thread.start()
    return thread
