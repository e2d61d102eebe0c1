"""The operator's commands around a task on this host: setup with its environment file, and teardown."""

from __future__ import annotations

import logging
import os
import stat
from typing import Mapping

from oz_worker.backends.base import Unit
from oz_worker.backends.env_file import EnvFileError, parse
from oz_worker.backends.environ import doubled, worker_environment
from oz_worker.backends.local import SETUP, TEARDOWN, LocalUnits, Run, StepEnd
from oz_worker.detached import Handle, Launch
from oz_worker.errors import Stopped, TaskFault
from oz_worker.model import ExitFacts, Reason
from oz_worker.process import SpawnError
from oz_worker.settings import DirectOptions
from oz_worker.timing import format_duration
from oz_worker.tree import MARK
from oz_worker.unreadable import Unreadable, patiently

logger = logging.getLogger(__name__)

_ENV = "env"
_SHELL = "/bin/sh"


class Hooks:
    """Runs setup and teardown of units. Any thread, one for each unit."""

    def __init__(self, options: DirectOptions, host: Mapping[str, str], units: LocalUnits) -> None:
        self._options = options
        self._host = host
        self._units = units

    def setup(self, unit: Unit, run: Run, workspace: str, environment: Mapping[str, str]) -> dict[str, str]:
        """Run the setup command with the task's *environment*; what it wrote into the environment file.

        Raises TaskFault, or Stopped when the unit's stop order came. The file is gone afterwards in every case.
        """
        path = run.directory.private(_ENV)
        try:
            variables = {
                **worker_environment(self._host),
                **environment,
                **doubled({**self._common(unit, workspace), "OZ_ENVIRONMENT_FILE": path}),
                MARK: self._units.mark(unit),
            }
            order = Launch([_SHELL, "-c", self._options.setup_command], variables, workspace)
            timeout = self._options.setup_timeout
            try:
                with unit.waiting(lambda: "setup_command"):
                    end = self._units.run_step(unit, run, order, step=SETUP, timeout=timeout, give_way=True)
            except (SpawnError, OSError) as error:
                raise _setup_fault(None, f"setup_command could not be started: {error}") from error
            except Unreadable as error:
                raise _setup_fault(None, f"how setup_command ended is unknown: {error}") from error
            if end.stopped:
                unit.ended(ExitFacts(detail="setup_command was stopped", agent_started=False, remains=end.remains))
                raise Stopped(f"setup_command of unit {unit.name} was stopped")
            problem = _problem("setup_command", end, timeout, "setup_timeout")
            if problem:
                raise _setup_fault(end.code, problem, end.remains)
            return _read(path, environment)
        finally:
            run.directory.remove(_ENV)

    def teardown(self, unit: Unit, run: Run, workspace: str, gitconfig: str) -> str:
        """Run the teardown command, unless it has already been; one sentence about its failure."""
        try:
            return self._teardown(unit, run, workspace, gitconfig)
        except Unreadable as error:
            return f"how teardown_command ended is unknown: {error}"

    def _teardown(self, unit: Unit, run: Run, workspace: str, gitconfig: str) -> str:
        timeout = self._options.teardown_timeout
        recorded = patiently(lambda: run.directory.status(TEARDOWN))
        if recorded is not None:
            return _problem("teardown_command", StepEnd(recorded), timeout, "teardown_timeout")
        earlier = patiently(lambda: run.directory.handle(TEARDOWN))
        if earlier is not None and patiently(earlier.identity.alive):
            end = self._wait_for_earlier(unit, run, earlier, timeout)
        else:
            # Neither the task's environment nor its secrets: after a restart nobody knows them.
            variables = {
                **worker_environment(self._host),
                **self._options.environment,
                **doubled(self._common(unit, workspace)),
                "GIT_CONFIG_GLOBAL": gitconfig,
                MARK: self._units.mark(unit),
            }
            order = Launch([_SHELL, "-c", self._options.teardown_command], variables, workspace)
            try:
                end = self._units.run_step(unit, run, order, step=TEARDOWN, timeout=timeout, give_way=False)
            except (SpawnError, OSError) as error:
                return f"teardown_command could not be started: {error}"
        left = self._units.stop(unit, run)
        return "; ".join(filter(None, (_problem("teardown_command", end, timeout, "teardown_timeout"), left)))

    def _wait_for_earlier(self, unit: Unit, run: Run, handle: Handle, timeout: float) -> StepEnd:
        """A teardown that an earlier worker started still runs: it gets its whole time again."""
        hurried = unit.hurried
        run.tree.add(handle.identity)
        ended: list[bool] = []

        def note() -> None:
            ended.append(True)
            unit.notify()

        patiently(lambda: self._units.watcher.watch_process(handle.identity, note))
        unit.wait_until(lambda: bool(ended) or (unit.hurried and not hurried), timeout or None)
        in_time, stopped = bool(ended), not ended and unit.hurried and not hurried
        if not in_time:
            self._units.stop(unit, run)
        code = patiently(lambda: run.directory.status(TEARDOWN))
        return StepEnd(code, late=not in_time and not stopped, stopped=stopped)

    def _common(self, unit: Unit, workspace: str) -> dict[str, str]:
        return {
            "OZ_WORKSPACE_ROOT": workspace,
            "OZ_WORKER_BACKEND": "direct",
            "OZ_RUN_ID": unit.key.task_id,
        }


def _problem(name: str, end: StepEnd, timeout: float, option: str) -> str:
    if end.stopped:
        return f"{name} was killed, because the worker was told to end at once; run it again"
    if end.late:
        return f"{name} took longer than {format_duration(timeout)} and was stopped; raise {option} or make it faster"
    if end.code is None:
        return f"{name} was killed before its end could be recorded; run it again"
    if end.code:
        return f"{name} ended with exit code {end.code}; its output says why"
    return ""


def _setup_fault(code: int | None, sentence: str, remains: str = "") -> TaskFault:
    facts = ExitFacts(code=code, reason=Reason.SETUP_COMMAND, detail=sentence, agent_started=False, remains=remains)
    return TaskFault(facts)


def _read(path: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables in the environment file; TaskFault with file and line when it cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return {}  # a setup that removes its file wants no variables
    except OSError as error:
        raise _setup_fault(None, f"OZ_ENVIRONMENT_FILE {path} cannot be read: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _setup_fault(
                None, f"OZ_ENVIRONMENT_FILE {path} is no file any more; write into the one that is there"
            )
        data = b""
        while len(data) <= _LARGEST and (piece := os.read(descriptor, _LARGEST)):
            data += piece
    finally:
        os.close(descriptor)
    if len(data) > _LARGEST:
        raise _setup_fault(None, f"OZ_ENVIRONMENT_FILE {path} is over {_LARGEST} bytes; write less into it")
    try:
        return parse(os.fsdecode(data), environment)
    except EnvFileError as error:
        raise _setup_fault(
            None, f"OZ_ENVIRONMENT_FILE {path}:{error.line}: {error}; correct what setup_command writes"
        ) from error


_LARGEST = 1024 * 1024
