"""Ending a container: TERM, KILL at the end of the grace, and the engine's word that nothing runs."""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import Callable

from oz_worker.backends import container_facts
from oz_worker.backends.base import PROOF_SECONDS, Unit
from oz_worker.backends.container_order import container_name
from oz_worker.backends.turns import Turns
from oz_worker.containers import LOOK_TIMEOUT, Engine
from oz_worker.engine_words import Container, EngineDown, EngineError
from oz_worker.model import ExitFacts, Reason
from oz_worker.timing import Deadline

logger = logging.getLogger(__name__)

_AGAIN = 1.0
_LAST_LOOK = 1.0
"""No question is given less time than this."""
_AT_ONCE = 16


class Stopper:
    """Stops containers. Safe from any thread; holds no state of one."""

    def __init__(self, engine: Engine, fence: Callable[[str], bool], holds: Callable[[Container, str], bool]) -> None:
        self._engine = engine
        self._fence = fence
        self._holds = holds
        self._turns = Turns(_AT_ONCE)

    def stop(self, unit: Unit, *, ran: bool) -> ExitFacts:
        """End the unit's container and return the facts of its end, with what remains when that cannot be proven.

        Blocks in the engine's program and in the unit's condition, where the watch may tell of the end first; at most
        PROOF_SECONDS behind the KILL. *ran*: the container is known to have run, so that its absence is no proof that
        it never did. What bears its name and is not held here is left alone.
        """
        name = container_name(unit)
        deadline = Deadline(max(0.0, unit.kill_at - time.monotonic()) + PROOF_SECONDS - _LAST_LOOK)
        signalled = remains = ""
        while unit.facts is None or unit.facts.remains:
            try:
                with self._turns.taken(wait=deadline.left()):
                    container = self._over(unit, name, ran, deadline)
                    if container is None:
                        remains = ""
                        break
                    remains = f"container {name}, which runs although it was killed"
                    signalled = self._signal(unit, container, signalled, deadline)
            except EngineDown as error:
                logger.debug("%s: %s", name, error)
                remains = f"container {name}, of which the engine says nothing"
            except EngineError as error:
                remains = f"container {name} ({error})"
            if deadline.passed():
                break
            self._pause(unit, signalled)
        else:
            remains = ""
        # Where its end is not known; an earlier fact stays. What remains is part of it: the next stop looks again.
        unit.ended(ExitFacts(reason=Reason.CONTAINER_WAIT, remains=remains))
        assert unit.facts is not None
        return dataclasses.replace(unit.facts, remains=remains)

    def _over(self, unit: Unit, name: str, ran: bool, deadline: Deadline) -> Container | None:
        """The container, while it runs; else None, once it is said how it ended, or that it never began."""
        found = self._engine.inspect(name, timeout=self._patience(deadline))
        container = next((one for one in found if self._holds(one, unit.name)), None)
        if container is not None and container.lives:
            return container
        if container is not None and not container.fresh:
            unit.ended(container_facts.of_container(container))
        elif container is None and ran:
            unit.ended(container_facts.vanished(name, None))
        elif container is None or self._fence(container.id):
            unit.ended(container_facts.never_ran())
        else:
            return container
        return None

    def _patience(self, deadline: Deadline) -> float:
        return max(_LAST_LOOK, min(self._engine.timeout, LOOK_TIMEOUT, deadline.left()))

    def _signal(self, unit: Unit, container: Container, signalled: str, deadline: Deadline) -> str:
        """Send what is due and was not sent yet; KILL again each time."""
        due = "KILL" if unit.hurried or time.monotonic() >= unit.kill_at else "TERM"
        if due != signalled or due == "KILL":
            try:
                self._engine.call("kill", "--signal", due, container.id, timeout=self._patience(deadline))
            except EngineDown:
                raise
            except EngineError as error:  # it has ended meanwhile: the next look says so
                logger.debug("%s: %s", container.name, error)
        return due

    @staticmethod
    def _pause(unit: Unit, signalled: str) -> None:
        """Until its end, the time for KILL, a hurry, or the next look."""
        grace = max(0.0, unit.kill_at - time.monotonic()) if signalled == "TERM" else _AGAIN
        hurried = unit.hurried

        def news() -> bool:
            return (unit.facts is not None and not unit.facts.remains) or unit.hurried != hurried

        unit.wait_until(news, min(_AGAIN, grace))
