"""Signs of life: which threads the worker is useless without, and for how long each of them may give none.

Such a thread calls `stamp` at each turn of its loop and waits for nothing longer than `WAIT_SECONDS` at a time, so that
one that has nothing to do is told apart from one that is stuck without asking anybody what it waits for. What waits for
a short child does the same inside (`errand`), so that a slow engine is no stuck thread. Judged by `observe.watchdog`.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from typing import Iterator, TypeVar

T = TypeVar("T")

WAIT_SECONDS = 20.0
"""The longest wait between two stamps: it costs an idle thread three wake-ups a minute."""

LIMITS: dict[str, float] = {
    "main": 120.0,  # never waits for a disk once it dials; while it takes up tasks at the start it waits for the store
    "store": 300.0,  # a disk may stall for minutes (NFS, a degraded array), and nothing is better after a restart
    "watcher": 300.0,  # its callbacks look at files
    "containers": 300.0,  # a list of thousands on a loaded machine
    "jobs": 300.0,
    "upkeep": 1800.0,  # removes trees of any size, and waits for the store
    "output": 300.0,
    "log": float("inf"),  # whoever reads the log may stop for ever, which must not end a task: only its death counts
    "watchdog": 60.0,
}
"""Seconds without a stamp, of those in which the process ran at all, after which a thread counts as stuck."""


class Sign:
    """What is known of one essential thread. `at` is written by that thread, `late` by the watchdog, read by any."""

    __slots__ = ("at", "dead", "late", "name", "seen")

    def __init__(self, name: str) -> None:
        self.name = name
        self.at = time.monotonic()
        self.dead = False
        self.seen = self.at  # the stamp that the watchdog saw last
        self.late = 0.0  # for how many seconds it has been the same


_own = threading.local()
_lock = threading.Lock()  # guards the list below: all essential threads of this process
_signs: list[Sign] = []


@contextlib.contextmanager
def essential(name: str) -> Iterator[None]:
    """The body of the thread *name* of LIMITS: watched until it is over; if it raises, the thread counts as dead."""
    assert name in LIMITS, f"how late may the thread {name} be?"
    sign = Sign(name)
    _own.sign = sign
    with _lock:
        _signs.append(sign)
    try:
        yield
    except BaseException:
        sign.dead = True
        raise
    with _lock:
        _signs.remove(sign)


def stamp() -> None:
    """The calling thread lives and works. Costs nothing to speak of; on a thread that is not essential, nothing."""
    sign: Sign | None = getattr(_own, "sign", None)
    if sign is not None:
        sign.at = time.monotonic()


def wait(seconds: float | None = None) -> float:
    """Stamp, and how long to wait at most when *seconds* (None: for ever) are wanted."""
    stamp()
    return WAIT_SECONDS if seconds is None else min(seconds, WAIT_SECONDS)


def signs() -> list[Sign]:
    """All essential threads that have not ended in good order."""
    with _lock:
        return list(_signs)


def troubles() -> list[str]:
    """What is wrong with the essential threads, a sentence for each; empty when nothing is. Safe from any thread."""
    return [sentence for sign in signs() if (sentence := _trouble(sign))]


def _trouble(sign: Sign) -> str:
    if sign.dead:
        return f"thread {sign.name} died"
    # Whoever asks while the watchdog itself is late has to judge by the clock.
    late = time.monotonic() - sign.at if sign.name == "watchdog" else sign.late
    limit = LIMITS[sign.name]
    return (
        f"thread {sign.name} has given no sign of life for {late:.0f} s (limit {limit:.0f} s)" if late > limit else ""
    )


def take(source: queue.SimpleQueue[T]) -> T:
    """The next item of *source*; stamps while there is none."""
    while True:
        try:
            return source.get(timeout=wait())
        except queue.Empty:
            continue
