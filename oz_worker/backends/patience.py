"""Waiting for an engine that does not answer, within its limit."""

from __future__ import annotations

import logging
from typing import Callable, TypeVar

from oz_worker.backends.base import Unit
from oz_worker.containers import EngineDown
from oz_worker.errors import Stopped
from oz_worker.timing import Deadline

logger = logging.getLogger(__name__)

FIRST, LONGEST = 0.25, 5.0
T = TypeVar("T")


def persist(act: Callable[[], T], unit: Unit, limit: float) -> T:
    """What *act* returns; tried again while it raises EngineDown, for *limit* seconds (0: for ever).

    Blocks in *act* and in the unit's condition. Raises Stopped when the unit is ordered to stop, and the last
    EngineDown once the limit has passed.
    """
    deadline = Deadline(limit) if limit else None
    pause, said = FIRST, False
    while True:
        try:
            return act()
        except EngineDown as error:
            if unit.cause is None and deadline is not None and deadline.passed():
                raise
            if not said:
                logger.warning("unit %s waits for the engine: %s", unit.name, error)
            said = True
        unit.wait_until(lambda: unit.cause is not None, pause)
        if unit.cause is not None:
            raise Stopped(f"unit {unit.name} was stopped while it waited for the engine")
        pause = min(pause * 2, LONGEST)
