"""A start that takes its time still listens to signals."""

from __future__ import annotations

import queue
import signal
import threading

import pytest

from oz_worker import opening
from oz_worker.threads import Waker
from tests.hosting import eventually


def test_a_slow_start_hears_every_signal_and_only_some_end_it() -> None:
    waker, inbox, go = Waker(), queue.SimpleQueue[signal.Signals](), threading.Event()
    told: list[signal.Signals] = []

    def on_other(number: signal.Signals) -> None:
        told.append(number)
        go.set()

    inbox.put(signal.SIGHUP)
    waker.wake()
    assert opening.interruptible(lambda: go.wait() and "opened", waker, inbox, on_other) == "opened"
    assert told == [signal.SIGHUP]

    for number in opening.ENDING:
        never = threading.Event()
        inbox.put(number)
        waker.wake()
        assert opening.interruptible(never.wait, waker, inbox, on_other) is None
        never.set()
    assert told == [signal.SIGHUP]
    eventually(lambda: all(thread.name != "opening" for thread in threading.enumerate()))
    waker.close()


def test_what_a_start_raises_is_raised_to_who_waits() -> None:
    waker = Waker()

    def refused() -> None:
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        opening.interruptible(refused, waker, queue.SimpleQueue(), lambda number: None)
    eventually(lambda: all(thread.name != "opening" for thread in threading.enumerate()))
    waker.close()
