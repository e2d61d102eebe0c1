"""Signals become items of a queue and a byte for the poll; nothing else happens in a handler."""

from __future__ import annotations

import contextlib
import queue
import signal
from typing import Iterator

from oz_worker.threads import Waker

HANDLED = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGUSR1,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR2,
)


@contextlib.contextmanager
def captured(waker: Waker) -> Iterator[queue.SimpleQueue[signal.Signals]]:
    """Deliver handled signals to the yielded queue and wake *waker*; the handlers before are restored at the end.

    A handler interrupts any line of the main thread, so it uses the one reentrant primitive, `SimpleQueue.put`: an
    `Event.set` or a log line there can deadlock. Main thread only.
    """
    inbox: queue.SimpleQueue[signal.Signals] = queue.SimpleQueue()
    previous = {number: signal.signal(number, lambda n, _frame: inbox.put(signal.Signals(n))) for number in HANDLED}
    # SIGPIPE is ignored by Python already; a write to a closed pipe is an error of that write.
    old_fd = signal.set_wakeup_fd(waker.write_fd(), warn_on_full_buffer=False)
    try:
        yield inbox
    finally:
        signal.set_wakeup_fd(old_fd)
        for number, handler in previous.items():
            signal.signal(number, handler)
