"""Work handed to a command of the operator's: it takes a payload on its stdin and starts the agent elsewhere.

The dispatcher runs under the same recorder as a direct agent, so that a restarted worker learns how it ended. What a
successful dispatcher leaves running is the work itself and is left alone. Status 0 means handed over; another one
means that nothing was started; none at all, or too late, means that nobody knows: then the cancel command runs once
before the failure is reported (rule 7).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import threading
from pathlib import Path
from typing import Any, Callable, Mapping

from oz_worker import threads
from oz_worker.backends.base import PROOF_SECONDS, Capabilities, Unit
from oz_worker.backends.environ import doubled, worker_environment
from oz_worker.backends.local import LocalUnits, Run
from oz_worker.backends.on_host import OnHost
from oz_worker.detached import Detached, Launch, launch
from oz_worker.errand import run as run_child
from oz_worker.errors import NotUsable, Stopped, TaskFault
from oz_worker.model import Cause, ExitFacts, Key, Reason, TaskSpec
from oz_worker.process import SpawnError
from oz_worker.settings import CommandOptions
from oz_worker.timing import Deadline, format_duration
from oz_worker.tree import MARK
from oz_worker.unreadable import Unreadable, patiently

logger = logging.getLogger(__name__)

_SHELL = "/bin/sh"
_AGAIN = 0.5
_DEFAULT_TIMEOUT = 60.0
_LAST = 500


class Command(OnHost):
    """The backend `command`. Its contract is `Backend`'s.

    Each dispatch has one thread `dispatch-<unit>` until it is decided. It blocks on a condition of its own, woken by
    the watcher, by a stop order that does not wait for the dispatcher, or by the end of `dispatch_timeout`.
    """

    def __init__(
        self,
        options: CommandOptions,
        *,
        worker_id: str,
        server_root_url: str,
        instance: str,
        instance_dir: Path,
        host_environ: Mapping[str, str],
        task_log_max: int = 0,
        stop_grace: float = 10.0,
        on_death: Callable[[str, BaseException], None] = lambda name, error: None,
    ) -> None:
        self.capabilities = Capabilities(survives_worker=True, fire_and_forget=True)
        self._options = options
        self._timeout = options.dispatch_timeout if options.dispatch_timeout > 0 else _DEFAULT_TIMEOUT
        self._worker_id = worker_id
        self._url = server_root_url
        self._host = host_environ
        self._instance = instance
        self._on_death = on_death
        self._deciding: dict[str, _Dispatch] = {}  # each entry is touched by its unit's thread only
        self._units = LocalUnits(
            instance_dir,
            instance=instance,
            worker_id=worker_id,
            output_limit=task_log_max,
            cgroup="off",  # what a dispatcher leaves running would stay in its cgroup and could be taken for ours
            stop_grace=stop_grace,
            on_death=on_death,
        )

    def open(self) -> None:
        """Start the watcher. Raises NotUsable."""
        if not self._options.dispatch_command.strip():
            raise NotUsable("backend.command needs dispatch_command; set it to the command that starts an agent")
        self._units.open()

    def unavailable(self) -> str:
        """A command can always be tried."""
        return ""

    def prepare(self, unit: Unit) -> None:
        """Make the unit's directory."""
        if unit.cause is not None:
            raise Stopped(f"unit {unit.name} was stopped before it was dispatched")
        assert unit.spec is not None, "only attached units have no spec, and they are never prepared"
        try:
            self._units.create(unit, {"docker_image": unit.spec.docker_image})
        except OSError as error:
            sentence = f"{self._units.directory(unit).path} cannot be made: {error.strerror}; free space there"
            raise TaskFault(_failed(sentence, started=False)) from error

    def payload(self, spec: TaskSpec) -> dict[str, Any]:
        """Version 1 of what a dispatcher reads: a stable contract (oz.md 11)."""
        return {
            "version": 1,
            "run_id": spec.key.task_id,
            "execution_id": spec.key.execution_id,
            "server_root_url": self._url,
            "worker_id": self._worker_id,
            "docker_image": spec.docker_image,
            "base_args": list(spec.argv),
            "env": dict(spec.environment),
            "sidecars": [sidecar._asdict() for sidecar in spec.sidecars] or None,
            "task": dict(spec.document),
        }

    def start(self, unit: Unit) -> None:
        """Start the dispatcher; its handle is on disk when it runs. The payload, full of secrets, is on no disk."""
        run = self._units.find(unit)
        assert run is not None, "prepare comes first"
        assert unit.spec is not None
        image = {"OZ_SERVER_ROOT_URL": self._url, "OZ_DOCKER_IMAGE": unit.spec.docker_image}
        environment = {**self._environment(unit.key, image), MARK: self._units.mark(unit)}
        argv = [_SHELL, "-c", self._options.dispatch_command]
        try:
            payload = json.dumps(self.payload(unit.spec)).encode()
            waiting = launch(Launch(argv, environment, _here(), payload), run.directory)
        except (SpawnError, OSError, ValueError, TypeError) as error:
            raise TaskFault(_failed(f"dispatch_command could not be started: {error}", started=False)) from error
        run.tree.add(waiting.child)
        dispatch = _Dispatch(self, unit, run, self._timeout)
        try:  # its thread first: once the dispatcher has its word, somebody has to decide about it
            threads.start(f"dispatch-{unit.name}", dispatch.follow, self._on_death)
        except RuntimeError as error:
            waiting.drop()
            raise TaskFault(
                _failed(f"dispatch_command was not started: {error}; run it again", started=False)
            ) from error
        try:
            self._let_go(unit, waiting)
        except BaseException:
            dispatch.begin(False)
            raise
        self._deciding[unit.name] = dispatch
        self._units.watcher.watch_child(waiting.child, lambda code: dispatch.note())
        dispatch.begin(True)

    @staticmethod
    def _let_go(unit: Unit, waiting: Detached) -> None:
        if unit.cause is not None:
            waiting.drop()
            raise Stopped(f"unit {unit.name} was stopped before it was dispatched")
        try:
            waiting.go()
        except OSError as error:
            sentence = f"the dispatcher's handle cannot be written: {error.strerror}; free space"
            raise TaskFault(_failed(sentence, started=False)) from error

    def attach(self, unit: Unit) -> None:
        """Take up a dispatch of an earlier process; the dispatcher gets its whole time again."""
        while True:
            try:
                run = self._units.find(unit)
                handle = run.directory.handle() if run else None
                if run is None or handle is None:
                    sentence = "the worker stopped before the task was dispatched; run it again"
                    unit.ended(_failed(sentence, started=False))
                    return
                dispatch = _Dispatch(self, unit, run, self._timeout)
                self._units.watcher.watch_process(handle.identity, dispatch.note)
                break
            except Unreadable as error:
                logger.warning("unit %s: %s; it is left as it is until then", unit.name, error)
                if unit.cause is not None:
                    return  # `stop` is next
            unit.wait(_AGAIN)
        self._deciding[unit.name] = dispatch
        dispatch.begin(True)
        try:
            threads.start(f"dispatch-{unit.name}", dispatch.follow, self._on_death)
        except RuntimeError:  # no thread is left: the task's own will do
            dispatch.follow()

    def stop(self, unit: Unit) -> ExitFacts:
        """Wait for the dispatcher within `dispatch_timeout`, then cancel what it may have started."""
        try:
            run = patiently(lambda: self._units.find(unit))
            dispatched = run is not None and patiently(run.directory.handle) is not None
        except Unreadable as error:
            remains = f"how unit {unit.name} ended could not be confirmed: {error}"
            return dataclasses.replace(unit.facts or ExitFacts(reason=Reason.DISPATCH_COMMAND), remains=remains)
        if run is None or not dispatched:
            unit.ended(_failed("the task was stopped before it was dispatched", started=False))
        elif unit.facts is None and unit.name in self._deciding:
            unit.wait_until(lambda: unit.facts is not None)  # `_Dispatch.follow` is bounded
        elif unit.facts is None or unit.facts.remains:
            # Decided before, perhaps by an earlier process: only what could not be ended then is still to be ended.
            unit.ended(ExitFacts(reason=Reason.DISPATCH_COMMAND))
            assert unit.facts is not None
            return dataclasses.replace(unit.facts, remains=self._units.stop(unit, run))
        facts = unit.facts
        assert facts is not None  # set above, or by decide
        if facts.reason is not None or not facts.agent_started:
            return facts  # nothing was started, or decide has cancelled it
        problem = self.cancel_dispatched(unit)
        return ExitFacts(code=facts.code, detail=problem, uncancelled=problem)

    def stop_dispatcher(self, unit: Unit, run: Run) -> str:
        """End the dispatcher's whole tree, by TERM and KILL."""
        return self._units.stop(unit, run)

    def stragglers(self, unit: Unit) -> str:
        """What a dispatcher leaves running is the work."""
        return ""

    def teardown(self, unit: Unit) -> str:
        """There is none."""
        return ""

    def clean_up(self, unit: Unit, *, keep: bool) -> str:
        """Remove the unit's directory."""
        self._deciding.pop(unit.name, None)
        return self._units.forget(unit, keep=keep)

    def cancel_dispatched(self, unit: Unit) -> str:
        """Run the cancel command; without one there is nothing to do."""
        if not self._options.cancel_command.strip():
            return ""
        argv = [_SHELL, "-c", self._options.cancel_command]
        timeout = self._options.cancel_timeout
        try:
            outcome = run_child(
                argv, environment=self._environment(unit.key, {}), instance=self._instance, timeout=timeout
            )
        except SpawnError as error:
            return f"cancel_command could not be started: {error}"
        if outcome.late:
            return f"cancel_command took longer than {format_duration(timeout)} and was killed; raise cancel_timeout"
        if outcome.code:
            said = (outcome.errors or outcome.output)[-_LAST:].decode(errors="replace").strip()
            return f"cancel_command ended with exit code {outcome.code}" + (f": {said}" if said else "")
        return ""

    def _environment(self, key: Key, more: Mapping[str, str]) -> dict[str, str]:
        known = {"OZ_RUN_ID": key.task_id, "OZ_EXECUTION_ID": key.execution_id, "OZ_WORKER_BACKEND": "command"}
        return {**worker_environment(self._host), **self._options.environment, **doubled({**known, **more})}


class _Dispatch:
    """One dispatcher that runs, until it is decided what came of it.

    `follow` is the body of a thread of its own. It blocks until `begin`, then in the unit's condition, woken by the
    watcher's `note`, by a stop order for a shutdown, or by its timeout; then in stopping a late dispatcher, which is
    bounded.
    """

    def __init__(self, backend: Command, unit: Unit, run: Run, timeout: float) -> None:
        self._backend = backend
        self._unit = unit
        self._run = run
        self._timeout = timeout
        self._ended = False
        self._begun = threading.Event()
        self._runs = False  # set before `_begun`

    def begin(self, runs: bool) -> None:
        """The dispatcher *runs*, or it never will."""
        self._runs = runs
        self._begun.set()

    def follow(self) -> None:
        """Decide, once there is something to decide about."""
        self._begun.wait()
        if self._runs:
            self._decide()

    def note(self) -> None:
        """The recorder is gone."""
        self._ended = True
        self._unit.notify()

    def _decide(self) -> None:
        """Wait, and deliver the unit's facts in any case."""
        unit = self._unit
        # A cancel waits for the dispatcher: half a dispatch could leave an agent that nobody knows of.
        unit.wait_until(lambda: self._ended or unit.cause is Cause.SHUTDOWN, self._timeout)
        code = self._status()
        if code is None:
            unit.ended(self._unknown(late=not self._ended))
        elif code:
            sentence = f"dispatch_command ended with exit code {code}; its output says why"
            unit.ended(ExitFacts(code=code, reason=Reason.DISPATCH_COMMAND, detail=sentence, agent_started=False))
        else:
            unit.ended(ExitFacts(code=0, dispatched=unit.cause is None))

    def _status(self) -> int | None:
        """The recorded status. Goes on trying while it cannot be read; for a stop order only as long as for a proof."""
        deadline = Deadline(PROOF_SECONDS)
        while True:
            try:
                return self._run.directory.status()
            except Unreadable as error:
                logger.warning("unit %s: %s", self._unit.name, error)
                if self._unit.cause is not None and deadline.passed():
                    return None
            self._unit.wait(_AGAIN)

    def _unknown(self, *, late: bool) -> ExitFacts:
        remains = self._backend.stop_dispatcher(self._unit, self._run)
        cancel = self._backend.cancel_dispatched(self._unit)
        if late and self._unit.cause is Cause.SHUTDOWN:
            what, reason = "dispatch_command was stopped", Reason.DISPATCH_COMMAND
        elif late:
            limit = format_duration(self._timeout)
            what, reason = f"dispatch_command took longer than {limit} and was stopped", Reason.DISPATCH_TIMEOUT
        else:
            what, reason = "dispatch_command was killed before its end could be recorded", Reason.DISPATCH_COMMAND
        unsure = "whether the agent was started is unknown"
        cancelled = f"; {cancel}" if cancel else ""
        return ExitFacts(reason=reason, detail=f"{what}; {unsure}{cancelled}", remains=remains, uncancelled=cancel)


def _failed(sentence: str, *, started: bool) -> ExitFacts:
    return ExitFacts(reason=Reason.DISPATCH_COMMAND, detail=sentence, agent_started=started)


def _here() -> str:
    """The worker's own directory: a relative path in dispatch_command means one from there."""
    try:
        return os.getcwd()
    except OSError:
        return "/"
