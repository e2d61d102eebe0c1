"""Waiting for an engine or a cluster that does not answer, within its limit."""

from __future__ import annotations

import logging
from typing import Callable, TypeVar

from oz_worker.backends.base import Unit
from oz_worker.errors import Stopped, Unanswered
from oz_worker.timing import Deadline

logger = logging.getLogger(__name__)

FIRST, LONGEST = 0.25, 5.0
T = TypeVar("T")


class Patience:
    """For how many seconds one that does not answer is waited for (0: for ever), and who hears of it at once.

    Safe from any thread. *heard* must not block; *whom* is what the log calls it.
    """

    def __init__(self, limit: float, heard: Callable[[], None], whom: str = "the engine") -> None:
        self.limit = limit
        self._heard = heard
        self._whom = whom

    def persist(self, act: Callable[[], T], unit: Unit) -> T:
        """What *act* returns; tried again while it raises Unanswered, within the limit.

        Blocks in *act* and in the unit's condition. Raises Stopped when the unit is ordered to stop, and the last
        Unanswered once the limit has passed.
        """
        deadline = Deadline(self.limit) if self.limit else None
        pause, said = FIRST, ""
        with unit.waiting(lambda: said and f"{self._whom}, which does not answer: {said}"):
            while True:
                try:
                    return act()
                except Unanswered as error:
                    self._heard()
                    if unit.cause is None and deadline is not None and deadline.passed():
                        raise
                    if not said:
                        logger.warning("unit %s waits for %s: %s", unit.name, self._whom, error)
                    said = str(error)
                unit.wait_until(lambda: unit.cause is not None, pause)
                if unit.cause is not None:
                    raise Stopped(f"unit {unit.name} was stopped while it waited for {self._whom}")
                pause = min(pause * 2, LONGEST)
