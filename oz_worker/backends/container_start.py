"""Making and starting a container, and finding out what came of it where the engine's program cannot say.

The name decides: it follows from the unit, and the engine gives it to one container only. So however often the order
is given again after a silence, at most one container runs.
"""

from __future__ import annotations

import logging

from oz_worker.backends.base import Unit
from oz_worker.backends.container_order import Order, container_name
from oz_worker.backends.container_traces import Traces
from oz_worker.backends.patience import Patience
from oz_worker.backends.turns import Turns
from oz_worker.containers import Engine
from oz_worker.engine_words import Container, EngineDown, EngineError, Interrupted, NameTaken, NoSuch
from oz_worker.errors import OzWorkerError, Stopped

logger = logging.getLogger(__name__)

_AT_ONCE = 8
"""Starts at once: an engine gets no faster by more of them (two are as fast as eight [M])."""


_BEGUN = '{{if and .LogPath (eq .State.Status "created") (not .State.Error)}}begun{{end}}'


class StartFailed(OzWorkerError):
    """The engine refused; it is proven that the agent never ran. `created`: there was a container, it is removed."""

    def __init__(self, error: EngineError, *, created: bool) -> None:
        super().__init__(str(error))
        self.error = error
        self.created = created


class Foreign(OzWorkerError):
    """The name is taken by a container of somebody else's."""

    def __init__(self, container: Container) -> None:
        super().__init__(f"the container {container.name} belongs to the instance {container.label('instance')!r}")
        self.container = container


class Starter:
    """Runs orders. Safe from any thread: it has no state but its options."""

    def __init__(self, engine: Engine, patience: Patience, traces: Traces) -> None:
        self._engine = engine
        self._patience = patience
        self._traces = traces
        self._turns = Turns(_AT_ONCE)

    def run(self, unit: Unit, order: Order) -> None:
        """Return once the container of *unit* runs, or has run. Blocks in the engine's program.

        The unit's stop order ends the program at once. Raises Stopped then (what may have been made is the caller's
        to end), StartFailed, Foreign, or EngineDown when the engine did not answer within its limit;
        OSError when the unit's directory cannot be written.
        """
        self._patience.persist(lambda: self._try(unit, order), unit)

    def _try(self, unit: Unit, order: Order) -> None:
        try:
            self._call(unit, order)
        except Interrupted:
            raise Stopped(f"unit {unit.name} was stopped while its container was made") from None
        except NameTaken as error:
            try:
                exists = self._exists(unit)
            except EngineDown:
                raise
            except EngineError as refused:
                raise StartFailed(refused, created=True) from error
            if not exists:
                self._call_again(unit, order)
        except EngineDown:
            if not self._exists(unit):
                raise  # patience: the order is given again
        except EngineError as error:
            self._judge(unit, error)

    def _call(self, unit: Unit, order: Order) -> None:
        # In the unit's directory: podman's monitor writes a file `oom` where it was started, when memory runs out [M].
        with self._turns.taken(unit), unit.wakes() as interrupt:
            self._traces.starting(unit)  # no sooner: what only waited for its turn has never run
            self._engine.call(
                *order.arguments,
                stdin=order.transport.file,
                extra=order.transport.passed,
                interrupt=interrupt,
                directory=str(self._traces.directory(unit).path),
            )

    def _call_again(self, unit: Unit, order: Order) -> None:
        try:
            self._call(unit, order)
        except EngineDown:
            raise
        except EngineError as error:
            self._judge(unit, error)

    def _exists(self, unit: Unit) -> bool:
        """Whether a container of the unit runs or has run; one that was only created is removed.

        Raises Foreign when it is not the unit's, EngineDown when nobody can say.
        """
        container = self._look(unit)
        if container is None:
            return False
        if not _is_of(container, unit):
            raise Foreign(container)
        return not container.fresh or not self.fence(container.id)

    def _judge(self, unit: Unit, error: EngineError) -> None:
        """The engine refused. Raises StartFailed unless the container runs all the same."""
        container = self._look(unit)
        if container is None or not _is_of(container, unit):
            raise StartFailed(error, created=False)
        try:
            never = container.fresh and self.fence(container.id)
        except EngineDown:
            raise
        except EngineError as refused:
            raise StartFailed(refused, created=True) from error
        if never:
            raise StartFailed(error, created=True)
        logger.info("unit %s: its container runs, although its start was answered by: %s", unit.name, error)

    def _look(self, unit: Unit) -> Container | None:
        return next(iter(self._engine.inspect(container_name(unit))), None)

    def fence(self, name: str) -> bool:
        """Remove a container that was only created: True proves that it never ran and never will (rule 5).

        Without force the engine refuses to remove one that runs: then it was started meanwhile. One that an engine had
        begun to start when it died is removed too, but proves nothing. Raises EngineError when the engine refuses for
        another reason.
        """
        try:
            begun = self._begun(name)
            self._engine.call("container", "rm", "--volumes", name)
            if begun:
                logger.warning("%s was being started when its engine died, and may have run: it is not run again", name)
                return False
        except NoSuch:
            return True
        except EngineDown:
            raise
        except EngineError as error:
            container = next(iter(self._engine.inspect(name)), None)
            if container is not None and container.fresh:
                raise
            logger.info("%s was started meanwhile: %s", name, error)
            return container is None
        return True

    def _begun(self, name: str) -> bool:
        """Whether docker was about to start it and never said how that went.

        dockerd writes down that a container runs a few milliseconds after its first process does. Killed in between,
        it says "created" ever after, while the agent runs on unseen [M]; only the path of the log tells it apart.
        """
        return self._engine.kind == "docker" and bool(
            self._engine.call("container", "inspect", "--format", _BEGUN, name).strip()
        )


def _is_of(container: Container, unit: Unit) -> bool:
    return container.label("instance") == unit.instance and container.label("unit") == unit.name
