"""Ending a container: TERM, KILL at the end of the grace, and the engine's word that nothing runs."""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import Callable

from oz_worker.backends import container_facts
from oz_worker.backends.base import PROOF_SECONDS, Unit
from oz_worker.backends.container_order import container_name
from oz_worker.containers import Engine, EngineDown, EngineError
from oz_worker.model import ExitFacts, Reason
from oz_worker.timing import Deadline

logger = logging.getLogger(__name__)

_AGAIN = 1.0


class Stopper:
    """Stops containers. Safe from any thread; holds no state of one."""

    def __init__(self, engine: Engine, fence: Callable[[str], bool]) -> None:
        self._engine = engine
        self._fence = fence

    def stop(self, unit: Unit, *, ran: bool) -> ExitFacts:
        """End the unit's container and return the facts of its end, with what remains when that cannot be proven.

        Blocks in the engine's program and in the unit's condition, where the watch may tell of the end first; at most
        PROOF_SECONDS and one call behind the KILL. *ran*: the container is known to have run, so that its absence is
        no proof that it never did.
        """
        name = container_name(unit)
        deadline = Deadline(max(0.0, unit.kill_at - time.monotonic()) + PROOF_SECONDS)
        signalled = remains = ""
        while unit.facts is None or unit.facts.remains:
            try:
                if self._over(unit, name, ran):
                    remains = ""
                    break
                remains = f"container {name}, which runs although it was killed"
                signalled = self._signal(unit, name, signalled)
            except EngineError as error:
                remains = f"container {name} ({error})"
            if deadline.passed():
                break
            self._pause(unit, signalled)
        else:
            remains = ""
        unit.ended(ExitFacts(reason=Reason.CONTAINER_WAIT))  # where its end is not known; an earlier fact stays
        assert unit.facts is not None
        return dataclasses.replace(unit.facts, remains=remains)

    def _over(self, unit: Unit, name: str, ran: bool) -> bool:
        """Whether nothing runs; then how it ended, or that it never began, is said."""
        container = next(iter(self._engine.inspect(name)), None)
        if container is not None and container.lives:
            return False
        if container is not None and not container.fresh:
            unit.ended(container_facts.of_container(container))
        elif container is None and ran:
            unit.ended(container_facts.vanished(name, None))
        elif container is None or self._fence(name):
            unit.ended(container_facts.never_ran())
        else:
            return False
        return True

    def _signal(self, unit: Unit, name: str, signalled: str) -> str:
        """Send what is due and was not sent yet; KILL again each time."""
        due = "KILL" if unit.hurried or time.monotonic() >= unit.kill_at else "TERM"
        if due != signalled or due == "KILL":
            try:
                self._engine.call("kill", "--signal", due, name)
            except EngineDown:
                raise
            except EngineError as error:  # it has ended meanwhile: the next look says so
                logger.debug("%s: %s", name, error)
        return due

    @staticmethod
    def _pause(unit: Unit, signalled: str) -> None:
        """Until its end, the time for KILL, a hurry, or the next look."""
        grace = max(0.0, unit.kill_at - time.monotonic()) if signalled == "TERM" else _AGAIN
        hurried = unit.hurried

        def news() -> bool:
            return (unit.facts is not None and not unit.facts.remains) or unit.hurried != hurried

        unit.wait_until(news, min(_AGAIN, grace))
