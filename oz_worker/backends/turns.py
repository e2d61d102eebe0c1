"""So many at once and no more: each call of an engine's program costs a process of some 24 MB for a moment."""

from __future__ import annotations

import contextlib
import threading
from typing import Callable, Iterator

from oz_worker.backends.base import Unit
from oz_worker.engine_words import EngineDown
from oz_worker.errors import Stopped, Unanswered

_LOOK_SECONDS = 0.5


class Turns:
    """At most *most* holders at once. Safe from any thread.

    Who waits is woken by whoever is done, each of whom is bounded by the engine's timeout. *busy* makes the error for
    who has waited too long: a kind of Unanswered.
    """

    def __init__(self, most: int, busy: Callable[[str], Unanswered] = EngineDown) -> None:
        self._free = threading.BoundedSemaphore(most)
        self._busy = busy

    @contextlib.contextmanager
    def taken(self, unit: Unit | None = None, wait: float | None = None) -> Iterator[None]:
        """A turn. For a *unit* it is waited for only until its stop order: then Stopped, within half a second.

        *wait* is for how many seconds at most: then *busy*, because turns that long mean an engine that hangs.
        """
        with unit.waiting(lambda: "its turn: others are being started") if unit else contextlib.nullcontext():
            self._wait(unit, wait)
        try:
            yield
        finally:
            self._free.release()

    def _wait(self, unit: Unit | None, wait: float | None) -> None:
        while not self._free.acquire(timeout=_LOOK_SECONDS if unit else wait):
            if unit is None:
                raise self._busy("other calls took all turns all the time; is it well?")
            if unit.cause is not None:
                raise Stopped(f"unit {unit.name} was stopped while it waited for its turn")
