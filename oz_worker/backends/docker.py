"""Agents in containers of a Docker Engine, or of Podman.

A unit is a container with a name that follows from its task and labels that say whose it is, so that a worker that
comes after a kill -9 finds it, and learns its true exit code from the engine. Nothing of a running unit is in this
process but an entry in the watch and the thread of its task.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from pathlib import Path
from typing import Callable, Mapping, NamedTuple, Sequence

from oz_worker.backends import container_facts
from oz_worker.backends.base import Capabilities, Found, Unit
from oz_worker.backends.container_order import Order, container_name, order
from oz_worker.backends.container_output import ContainerOutput
from oz_worker.backends.container_owner import Orphans, own_container
from oz_worker.backends.container_start import Foreign, Starter, StartFailed
from oz_worker.backends.container_stop import Stopper
from oz_worker.backends.container_supplies import Ready, Supplies
from oz_worker.backends.container_traces import Traces
from oz_worker.backends.container_watch import Ears, Watch
from oz_worker.backends.environ import secrets_in, worker_environment
from oz_worker.backends.patience import Patience
from oz_worker.backends.removed import Removed
from oz_worker.backends.silence import Silence
from oz_worker.backends.turns import Turns
from oz_worker.containers import Engine
from oz_worker.engine_words import LABEL, Container, EngineDown, EngineError, NoSuch
from oz_worker.engines import environment_for, find_program, opened
from oz_worker.errors import Stopped, TaskFault
from oz_worker.meters import Meters
from oz_worker.model import ExitFacts, Key
from oz_worker.settings import DockerOptions
from oz_worker.tree import end_earlier_helpers, end_helpers
from oz_worker.unreadable import Unreadable

logger = logging.getLogger(__name__)

_COMMAND_TIMEOUT = 60.0
_CLOSE_SECONDS = 3.0
_AT_ONCE = 8


class _Known(NamedTuple):
    """A unit whose container is followed; not *started*: its absence proves nothing yet."""

    unit: Unit
    started: bool


class Docker:
    """The backend `docker`. Its contract is `Backend`'s.

    The lock guards `_units` (who is told of a container's end). `_ready` and `_unproven` are touched by each unit's own
    thread only, for its own entry.
    """

    def __init__(
        self,
        options: DockerOptions,
        *,
        worker_id: str,
        instance: str,
        instance_dir: Path,
        host_environ: Mapping[str, str],
        task_log_max: int = 0,
        on_death: Callable[[str, BaseException], None] = lambda name, error: None,
        meters: Meters | None = None,
    ) -> None:
        self.capabilities = Capabilities(survives_worker=True)
        self._options = options
        self._worker_id = worker_id.strip()  # as the CLI reads a filter: a label with blanks would never be found
        self._instance = instance
        self._directory = instance_dir
        self._host = host_environ
        self._log_max = task_log_max
        self._on_death = on_death
        self._meters = meters or Meters()
        self._lock = threading.Lock()
        self._units: dict[str, _Known] = {}
        self._removed = Removed()
        self._ready: dict[str, Ready] = {}
        self._unproven: set[str] = set()
        self._turns = Turns(_AT_ONCE)
        self._silence = Silence(f"the {options.engine} engine")

    # -- the worker's life ---------------------------------------------------------------------------------------

    def open(self) -> None:
        """End helpers of a dead worker, look at the engine, start the watch. Raises NotUsable."""
        options = self._options
        program = find_program(options.engine, options.engine_path, self._host)
        end_earlier_helpers(self._instance)
        self._engine = engine = Engine(
            options.engine,
            program,
            environment=environment_for(options.engine, worker_environment(self._host)),
            instance=self._instance,
            timeout=options.command_timeout or _COMMAND_TIMEOUT,
        )
        self._facts = opened(engine)
        owner = own_container(engine)
        self._labels = {"instance": self._instance, "worker": self._worker_id, **({"owner": owner} if owner else {})}
        platform = f"{self._facts.system}/{self._facts.architecture}"
        # What a unit finds out is no news to wait 30 s for: new work is refused from then on.
        self._patience = Patience(options.engine_down_timeout, lambda: self._watch.look())
        self._supplies = Supplies(
            engine,
            options,
            platform,
            patience=self._patience,
            labels=self._labels,
            directory=self._directory,
            on_death=self._on_death,
            meters=self._meters,
        )
        self._traces = Traces(self._directory, self._worker_id)
        self._traces.open()
        self._starter = Starter(engine, self._patience, self._traces)
        self._orphans = Orphans(engine, self._labels)
        self._stopper = Stopper(engine, self._starter.fence, self._orphans.holds)
        self._output = ContainerOutput(engine, self._traces, self._log_max)
        ears = Ears(
            ended=self._ended,
            vanished=self._vanished,
            listed=self._listed,
            made=self._made,
            removed=self._supplies.sidecars.mark_gone,
            silent=self._silent,
            answers=self._silence.ends,
        )
        self._watch = Watch(engine, f"{LABEL}worker={self._worker_id}", ears, self._on_death)
        self._watch.start()
        logger.info("%s %s, %s/%s", engine.kind, self._facts.version, self._facts.system, self._facts.architecture)

    def close(self) -> None:
        """Stop the watch; containers run on."""
        self._watch.stop(_CLOSE_SECONDS)
        self._supplies.sidecars.settle(_CLOSE_SECONDS)
        with contextlib.suppress(Unreadable):
            end_helpers(self._instance)  # what hangs with the engine would outlive us

    def unavailable(self) -> str:
        """Why no work can be taken just now."""
        return self._silence.why

    # -- one unit's life -----------------------------------------------------------------------------------------

    def prepare(self, unit: Unit) -> None:
        """Get the image and the sidecars."""
        _give_way(unit)
        try:
            self._traces.prepared(unit)
        except OSError as error:
            raise TaskFault(container_facts.no_room(error)) from error
        self._ready[unit.name] = self._supplies.get(unit)

    def start(self, unit: Unit) -> None:
        """Start the container. An image or a volume that is gone since it was looked at is got again."""
        _give_way(unit)
        name = container_name(unit)
        self._removed.forget(name)
        with self._lock:
            self._units[name] = _Known(unit, started=False)
        self._watch.follow(name, exists=False)  # before it runs: it may be over before its start returns
        try:
            self._start(unit, self._ready.pop(unit.name), last=False)
        except OSError as error:
            self._forget(name)
            raise TaskFault(container_facts.no_room(error)) from error
        except BaseException:
            self._forget(name)
            raise
        self._follow(unit)

    def _start(self, unit: Unit, ready: Ready, *, last: bool) -> None:
        try:
            self._run(unit, ready)
        except Stopped:
            facts = self.stop(unit)
            if facts.remains:
                raise TaskFault(facts) from None
            raise
        except EngineDown as error:
            raise TaskFault(container_facts.unanswered(str(error), self._options.engine_down_timeout)) from error
        except StartFailed as failure:
            if last or not (isinstance(failure.error, NoSuch) or failure.created):
                facts = container_facts.of_failed_start(
                    failure.error, created=failure.created, sidecars=bool(ready.mounts)
                )
                raise TaskFault(facts) from failure
            logger.info("unit %s: looking anew at image and sidecars: %s", unit.name, failure)
            self._supplies.distrust(ready)
            self._start(unit, self._supplies.get(unit), last=True)

    def _run(self, unit: Unit, ready: Ready) -> None:
        try:
            self._starter.run(unit, self._order(unit, ready))
        except Foreign as taken:
            container = taken.container
            try:
                self._patience.persist(lambda: self._take_over(unit, container), unit)
            except EngineDown:
                raise
            except EngineError as error:
                raise StartFailed(error, created=False) from error

    def _order(self, unit: Unit, ready: Ready) -> Order:
        assert unit.spec is not None
        try:
            return order(
                self._options,
                unit,
                unit.spec,
                image=ready.image,
                sidecar_mounts=ready.mounts,
                labels=self._labels,
                log_driver=self._facts.log_driver,
                log_max=self._log_max,
            )
        except ValueError as error:
            raise TaskFault(container_facts.not_given(str(error))) from error

    def _take_over(self, unit: Unit, container: Container) -> None:
        """Its name is taken: by a living worker, or by one that was replaced, whose task this is (rule 3).

        Raises EngineError.
        """
        for _look in range(2):
            if self._orphans.has_owner(container):
                raise TaskFault(container_facts.taken(container))
            if unit.wait_until(lambda: unit.cause is not None, self._orphans.absent_seconds / 2 + 1):
                raise Stopped(f"unit {unit.name} was stopped while it waited for the owner of {container.name}")
        if self._orphans.has_owner(container) or not self._orphans.take(container, self._all()):
            raise TaskFault(container_facts.taken(container))

    def attach(self, unit: Unit) -> None:
        """Take up a container of an earlier process; one that was only created is fenced (rule 5)."""
        try:
            with self._turns.taken(unit):
                self._patience.persist(lambda: self._attach(unit), unit)
        except Stopped:
            return  # `stop` is next
        except EngineDown as error:
            unit.ended(self._silence_of(unit, str(error)))

    def _attach(self, unit: Unit) -> None:
        """Raises EngineDown also for a refusal: nothing that an engine cannot say just now ends a running task."""
        try:
            container = self._held(unit)
            if container is None:
                started = self._traces.was_started(unit)
                name = container_name(unit)
                unit.ended(container_facts.not_there(name) if started else container_facts.never_ran())
            elif container.fresh and self._starter.fence(container.id):
                unit.ended(container_facts.never_ran())
            else:
                unit.secrets = self._secrets_of(container)
                self._follow(unit)
        except EngineDown:
            raise
        except EngineError as error:
            raise EngineDown(str(error), error.said) from error

    def _secrets_of(self, container: Container) -> tuple[str, ...] | None:
        try:
            return secrets_in(*self._engine.environment_of(container.id))
        except EngineError as error:
            logger.warning("the output of %s will not be shown, its secrets cannot be read: %s", container.name, error)
            return None

    def _follow(self, unit: Unit) -> None:
        name = container_name(unit)
        with self._lock:
            self._units[name] = _Known(unit, started=True)
        if unit.facts is None:
            self._watch.follow(name, exists=True)
            if unit.spec is None or self._silence.why:
                self._watch.look()  # it may have ended before it was followed

    def stop(self, unit: Unit) -> ExitFacts:
        """End the container."""
        with self._lock:
            known = self._units.get(container_name(unit))
        facts = self._stopper.stop(unit, ran=known is None or known.started)
        # Nothing more is asked about one that the engine says nothing of: its report has waited long enough.
        (self._unproven.add if facts.remains else self._unproven.discard)(unit.name)
        return facts

    def stragglers(self, unit: Unit) -> str:
        """A container leaves no processes: they end with its first one."""
        return ""

    def teardown(self, unit: Unit) -> str:
        """There is none."""
        return ""

    def clean_up(self, unit: Unit, *, keep: bool) -> str:
        """Remove the container, its anonymous volumes and its private sidecars."""
        name = container_name(unit)
        self._forget(name)
        self._ready.pop(unit.name, None)
        if keep:
            return ""
        if why := self._no_answer(unit):
            return f"container {name} is removed later: {why}"
        troubles = [self._remove(unit)]
        if not troubles[0]:
            self._removed.note(name, unit)
        spec = unit.spec
        if spec is None or any(sidecar.read_write for sidecar in spec.sidecars):
            troubles.append(self._supplies.sidecars.drop_private(unit))
        if not any(troubles):  # what says that it exists goes last
            troubles.append(self._traces.forget(unit))
        return "; ".join(filter(None, troubles))

    def _remove(self, unit: Unit) -> str:
        """By its id, and only what is held here: another's container may bear the name of a unit that was refused."""
        if self._traces.never_ordered(unit):  # an engine that hangs is not asked: a stop would wait for its answer
            return ""
        try:
            with self._turns.taken():
                if (container := self._held(unit)) is not None:
                    self._engine.call("container", "rm", "--force", "--volumes", container.id)
        except NoSuch:
            return ""
        except EngineError as error:
            return f"container {container_name(unit)} was not removed: {error}"
        return ""

    def output_at(self, unit: Unit) -> str:
        """The command that shows it."""
        return self._output.where(unit)

    def tail(self, unit: Unit, limit: int) -> bytes:
        """The end of the unit's output."""
        return b"" if self._traces.never_ordered(unit) or self._no_answer(unit) else self._output.tail(unit, limit)

    def collect(self, unit: Unit) -> str:
        """Fetch the output from the engine, if there is any and it answers at all."""
        return "" if self._traces.never_ordered(unit) else self._no_answer(unit) or self._output.collect(unit)

    def recover(self) -> Sequence[Found]:
        """List the units of this instance: containers, and those of which there is none. Raises EngineError."""
        self._supplies.sidecars.remove_unfinished()
        return self.units()

    def units(self) -> Sequence[Found]:
        """List the units of this instance, touching nothing. Raises EngineError."""
        found = {unit.name: unit for unit in self._traces.list()}
        found.update({unit.name: unit for unit in map(_found, self._orphans.ours(self._all()))})
        return list(found.values())

    def look_after(self) -> Sequence[Found]:
        """Take over what has lost its worker; remove what is old."""
        taken = [_found(container) for container in self._orphans.adopt(self._all())]
        try:
            self._supplies.sidecars.collect()
        except EngineError as error:
            logger.info("old sidecars are looked for again in a minute: %s", error)
        return taken

    def cancel_dispatched(self, unit: Unit) -> str:
        """Nothing is ever handed over here."""
        return f"unit {unit.name} was not handed over: the docker backend watches its containers itself"

    # -- what the watch hears, on its thread ---------------------------------------------------------------------

    def _ended(self, container: Container) -> None:
        if (unit := self._unit(container.name)) is not None:
            unit.ended(container_facts.of_container(container))

    def _vanished(self, name: str, code: int | None) -> None:
        if (unit := self._unit(name)) is not None:
            unit.ended(container_facts.vanished(name, code))

    def _listed(self, containers: list[Container]) -> None:
        self._supplies.sidecars.note_marks({one.name for one in containers if one.label("role") == "mark"})
        for container in containers:
            self._made(container.name)

    def _made(self, name: str) -> None:
        """A container that was removed here and exists all the same was made late, by a request of a dead program."""
        removed = self._removed.unit(name)
        # What tells of it may be older than its removal: only one that exists now, and is ours, is another one.
        if removed is not None and self._held(removed) is not None:
            logger.warning("removing %s, which was made after its task had ended", name)
            self._remove(removed)

    def _silent(self, seconds: float, why: str) -> None:
        self._silence.goes_on(why)
        limit = self._options.engine_down_timeout
        if limit and seconds > limit:
            with self._lock:
                known = list(self._units.values())
            for entry in known:
                if entry.started:
                    entry.unit.ended(self._silence_of(entry.unit, why))

    # -- small things --------------------------------------------------------------------------------------------

    def _all(self) -> list[Container]:
        """Everything of this worker id, of every instance: filters are ANDed, so the instance is chosen in code."""
        return self._engine.overview(f"label={LABEL}worker={self._worker_id}")

    def _held(self, unit: Unit) -> Container | None:
        """The unit's container, if this instance made or adopted it."""
        found = self._engine.inspect(container_name(unit))
        return next((one for one in found if self._orphans.holds(one, unit.name)), None)

    def _no_answer(self, unit: Unit) -> str:
        """Why nothing is asked of the engine about a unit that has ended; "" when it answers."""
        return self._silence.why or ("how it ended is not known" if unit.name in self._unproven else "")

    def _unit(self, name: str) -> Unit | None:
        with self._lock:
            known = self._units.get(name)
        return known.unit if known else None

    def _forget(self, name: str) -> None:
        self._watch.drop(name)
        with self._lock:
            self._units.pop(name, None)

    def _silence_of(self, unit: Unit, why: str) -> ExitFacts:
        return container_facts.silent(container_name(unit), why, self._options.engine_down_timeout)


def _give_way(unit: Unit) -> None:
    if unit.cause is not None:
        raise Stopped(f"unit {unit.name} was stopped before its container was made")


def _found(container: Container) -> Found:
    return Found(container.label("unit"), Key(container.label("task"), container.label("execution")))
