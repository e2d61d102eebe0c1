"""Agents as processes of this host: a workspace for each execution, the operator's hooks around it.

A unit is a directory of the instance (`detached.UnitDirectory`) and a tree of processes (`tree.Tree`). The agent runs
under a recorder in a session of its own and writes to a file, so that neither needs this process: a worker that comes
after a kill -9 finds the unit by its directory and learns the true exit code.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import signal
from pathlib import Path
from typing import Callable, Mapping

from oz_worker import threads
from oz_worker.backends.base import Capabilities, Unit
from oz_worker.backends.environ import HARNESS_DIRECTORIES, inherited, secret_values, secrets_of
from oz_worker.backends.hooks import Hooks
from oz_worker.backends.local import LocalUnits, Run
from oz_worker.backends.on_host import OnHost
from oz_worker.backends.workspace import WorkspaceRoot, workspace_name
from oz_worker.detached import Handle, Launch, check_program, launch, memory_kills
from oz_worker.errors import NotUsable, Stopped, TaskFault
from oz_worker.model import ExitFacts, Reason, TaskSpec
from oz_worker.process import SpawnError
from oz_worker.settings import DirectOptions
from oz_worker.tree import MARK
from oz_worker.unreadable import Unreadable, patiently

logger = logging.getLogger(__name__)

_AGAIN = 0.5
_MCP = "mcp.json"
_GITCONFIG = "gitconfig"
_LOST = "the agent's end was not recorded: it was killed or the host restarted; look at its output and run it again"
_NEVER_RAN = "the worker stopped before the agent was started; run it again"


def find_oz(options: DirectOptions, host: Mapping[str, str]) -> str:
    """The agent's program: `oz_path`, else `oz` on the PATH of *host*. Raises NotUsable."""
    given = options.oz_path
    found = (given and os.path.abspath(given)) or shutil.which("oz", path=host.get("PATH", os.defpath))
    if not found:
        raise NotUsable("no program oz on PATH; install the Oz CLI or set backend.direct.oz_path")
    try:
        check_program(found, "/")
    except SpawnError as error:
        raise NotUsable(f"oz_path: {error}") from error
    return found


def check_directories(options: DirectOptions) -> None:
    """Raise NotUsable for a directory that the operator has to make: `target_dir`, `harness_config_dirs`."""
    target = os.path.abspath(options.target_dir)
    if options.target_dir and not os.path.isdir(target):
        raise NotUsable(f"target_dir {target} is not a directory; make it or correct the path")
    for harness, path in options.harness_config_dirs.items():
        if harness not in HARNESS_DIRECTORIES:
            known = ", ".join(HARNESS_DIRECTORIES)
            raise NotUsable(f"harness_config_dirs names {harness!r}; known are {known}")
        if not os.path.isdir(os.path.expanduser(path)):
            raise NotUsable(f"harness_config_dirs.{harness} {path} is not a directory; correct or remove it")


class Direct(OnHost):
    """The backend `direct`. Its contract is `Backend`'s."""

    def __init__(
        self,
        options: DirectOptions,
        *,
        worker_id: str,
        instance: str,
        instance_dir: Path,
        host_environ: Mapping[str, str],
        cleanup: bool = True,
        task_log_max: int = 0,
        stop_grace: float = 10.0,
        in_container: bool = False,
        on_death: Callable[[str, BaseException], None] = lambda name, error: None,
    ) -> None:
        self.capabilities = Capabilities(survives_worker=not in_container)
        self._options = options
        self._host = host_environ
        self._cleanup = cleanup
        self._on_death = on_death
        self._units = LocalUnits(
            instance_dir,
            instance=instance,
            worker_id=worker_id,
            output_limit=task_log_max,
            cgroup=options.cgroup,
            stop_grace=stop_grace,
            on_death=on_death,
        )
        self._root = None if options.target_dir else WorkspaceRoot(options.workspace_root, instance)
        self._target = os.path.abspath(options.target_dir) if options.target_dir else ""
        self._hooks = Hooks(options, host_environ, self._units)
        self._oz = options.oz_path

    # -- the worker's life ---------------------------------------------------------------------------------------

    def open(self) -> None:
        """Check directories and the agent's program, start the watcher. Raises NotUsable."""
        self._oz = find_oz(self._options, self._host)
        if self._root:
            self._root.open()
        check_directories(self._options)
        self._units.open()

    def unavailable(self) -> str:
        """Why no work can be taken just now."""
        if self._root and (problem := self._root.unavailable()):
            return problem
        if self._target and not os.path.isdir(self._target):
            return f"target_dir {self._target} is gone; make it again or mount it"
        if not os.access(self._oz, os.X_OK):
            return f"the agent's program {self._oz} is gone or not executable; install it again"
        return ""

    # -- one unit's life -----------------------------------------------------------------------------------------

    def prepare(self, unit: Unit) -> None:
        """Make the workspace and run the setup command."""
        spec = _spec(unit)
        _give_way(unit)
        name = workspace_name(unit.key, unit.name)
        path = os.path.join(self._root.path, name) if self._root else self._target
        try:
            run = self._units.create(unit, {"workspace": path, "workspace_name": name if self._root else ""})
            gitconfig = run.directory.private(_GITCONFIG)
        except OSError as error:
            where = self._units.directory(unit).path
            raise _workspace_fault(
                f"{where} cannot be made: {error.strerror}; free space or check its rights"
            ) from error
        if self._root:
            self._root.create(name)
        elif not os.path.isdir(path):
            raise _workspace_fault(f"target_dir {path} is gone; make it again or mount it")
        environment = {
            **inherited(self._host, self._options.inherit_environment),
            **spec.environment,
            **self._options.environment,
            **self._harness(spec, run, path),
            "GIT_CONFIG_GLOBAL": gitconfig,
        }
        written: dict[str, str] = {}
        if self._options.setup_command:
            written = self._hooks.setup(unit, run, path, environment)
        if unit.secrets is not None:
            unit.secrets = (*unit.secrets, *secret_values(written))
        fixed = {"GIT_CONFIG_GLOBAL": gitconfig, MARK: self._units.mark(unit)}
        run.environment = {**environment, **written, **fixed}

    def start(self, unit: Unit) -> None:
        """Start the agent; its handle is on disk when it runs."""
        run = self._known(unit)
        _give_way(unit)
        try:
            order = Launch([self._oz, *self._arguments(_spec(unit), run)], run.environment, run.facts["workspace"])
            variables = ", ".join(sorted(order.environment))
            logger.debug("unit %s: starting %s in %s with %s", unit.name, self._oz, order.directory, variables)
            waiting = launch(order, run.directory)
        except (SpawnError, OSError) as error:
            raise TaskFault(_never(f"the agent could not be started: {error}")) from error
        run.tree.add(waiting.child)
        if unit.cause is not None:
            waiting.drop()
            raise Stopped(f"unit {unit.name} was stopped before its agent ran")
        try:
            waiting.go()
        except OSError as error:
            raise TaskFault(_never(f"the agent's handle cannot be written: {error.strerror}; free space")) from error
        run.environment = {}  # nobody needs the secrets any more
        self._units.watcher.watch_child(waiting.child, lambda code: self._agent_ended(unit, run, code))
        run.tree.enter_cgroup(waiting.child)

    def attach(self, unit: Unit) -> None:
        """Take up a unit of an earlier process. Tries again while what it left cannot be read, until a stop order."""
        said = False
        while unit.facts is None and unit.cause is None:
            try:
                self._attach(unit)
                return
            except Unreadable as error:
                if not said:
                    logger.warning("unit %s: %s; it is left as it is until then", unit.name, error)
                said = True
            unit.wait(_AGAIN)

    def _attach(self, unit: Unit) -> None:
        run = self._units.find(unit)
        if run is None:
            unit.ended(_never(_NEVER_RAN, Reason.UNKNOWN))
            return
        handle = run.directory.handle()
        if handle is None:
            remains = self._units.stop(unit, run)
            unit.ended(dataclasses.replace(_never(_NEVER_RAN, Reason.UNKNOWN), remains=remains))
        elif run.directory.status() is None and handle.identity.alive():
            unit.secrets = secrets_of(handle.identity.pid)
            self._units.watcher.watch_process(handle.identity, lambda: self._agent_ended(unit, run, None))
        elif run.directory.status() is None:
            self._lost(unit, run)
        else:
            unit.ended(self._facts(run, handle))

    def stop(self, unit: Unit) -> ExitFacts:
        """End all of the unit."""
        try:
            run = patiently(lambda: self._units.find(unit), unit.wait)
            if run is None:
                facts = unit.facts or _never(_NEVER_RAN, Reason.UNKNOWN)
                unit.ended(facts)
                return facts
            remains = self._units.stop(unit, run)
            handle = patiently(run.directory.handle)
            if handle is None:
                unit.ended(_never(_NEVER_RAN, Reason.UNKNOWN))
            elif not remains:
                # Nothing lives: the watcher is about to say so, and what the recorder wrote is complete.
                unit.wait_until(lambda: unit.facts is not None, 1.0)
                unit.ended(patiently(lambda: self._facts(run, handle)))
        except Unreadable as error:
            remains = f"how unit {unit.name} ended could not be confirmed: {error}"
        return dataclasses.replace(unit.facts or ExitFacts(reason=Reason.AGENT_INVOCATION), remains=remains)

    def stragglers(self, unit: Unit) -> str:
        """End what the agent, or a setup before it, left running."""
        try:
            run = patiently(lambda: self._units.find(unit))
        except Unreadable as error:
            return f"what unit {unit.name} left running could not be confirmed gone: {error}"
        return self._units.stop(unit, run) if run else ""

    def teardown(self, unit: Unit) -> str:
        """Run the teardown command where there is a workspace to tear down."""
        try:
            run = patiently(lambda: self._units.find(unit))
        except Unreadable as error:
            return f"teardown_command was not run: {error}"
        if run is None or not self._options.teardown_command:
            return ""
        if not self._cleanup and not self._target:
            return ""  # what --no-cleanup keeps is kept as the agent left it
        workspace = str(run.facts.get("workspace", ""))
        if not os.path.isdir(workspace):
            return ""
        return self._hooks.teardown(unit, run, workspace, run.directory.file(_GITCONFIG))

    def clean_up(self, unit: Unit, *, keep: bool) -> str:
        """Remove workspace and unit directory; the latter last, so that a crash in between leaves a trace.

        Where the workspace stays, what says where it is stays too, without anything secret: a later call tries again.
        """
        try:
            run = patiently(lambda: self._units.find(unit))
        except Unreadable as error:
            return f"unit {unit.name} was not removed: {error}"
        if run is not None:
            run.directory.remove("env", _MCP)
            name = run.facts.get("workspace_name")
            if not keep and isinstance(name, str) and name:
                # Below the root of its own time: the configuration may have another one since.
                root = os.path.dirname(str(run.facts.get("workspace", "")))
                left = WorkspaceRoot(root, unit.instance).remove(name)
                if left:
                    return "; ".join(filter(None, (left, self._units.reduce(unit))))
            if keep:
                run.directory.remove(_GITCONFIG)
        return self._units.forget(unit, keep=keep)

    def cancel_dispatched(self, unit: Unit) -> str:
        """Nothing is ever handed over here."""
        return f"unit {unit.name} was not handed over: the direct backend watches its agents itself"

    # -- steps ---------------------------------------------------------------------------------------------------

    def _known(self, unit: Unit) -> Run:
        run = self._units.find(unit)
        assert run is not None, "prepare comes first"
        return run

    def _harness(self, spec: TaskSpec, run: Run, workspace: str) -> dict[str, str]:
        """The directory of its own that a third-party harness keeps its configuration in."""
        if spec.harness not in HARNESS_DIRECTORIES:
            return {}
        variable, name = HARNESS_DIRECTORIES[spec.harness]
        # A shared target directory must not get one: tasks would overwrite each other's.
        path = run.directory.file(name) if self._target else os.path.join(workspace, name)
        source = self._options.harness_config_dirs.get(spec.harness)
        try:
            if source:
                shutil.copytree(os.path.expanduser(source), path, symlinks=True, dirs_exist_ok=True)
            os.makedirs(path, mode=0o700, exist_ok=True)
            os.chmod(path, 0o700)
        except (OSError, shutil.Error) as error:
            raise _workspace_fault(f"{path} cannot be filled from harness_config_dirs: {_first(error)}") from error
        return {variable: path}

    def _arguments(self, spec: TaskSpec, run: Run) -> list[str]:
        argv = list(spec.argv)
        if self._options.mcp_config == "file" and spec.mcp and "--mcp" in argv:
            path = run.directory.private(_MCP, spec.mcp.encode("utf-8", "surrogateescape"))
            argv[argv.index("--mcp") + 1] = path
        return argv

    def _agent_ended(self, unit: Unit, run: Run, code: int | None) -> None:
        """The recorder is gone. On the watcher's thread: it must not block, so it comes again when it cannot know."""
        if unit.facts is not None:
            return  # `stop` was quicker
        try:
            handle = run.directory.handle()
            if handle is not None and (run.directory.status() is not None or unit.cause is not None):
                unit.ended(self._facts(run, handle))
                return
            threads.start(f"lost-{unit.name}", lambda: self._lost(unit, run), self._on_death)
        except (Unreadable, RuntimeError) as error:  # the latter: no thread is left
            logger.warning("unit %s has ended, and how cannot be found out yet: %s", unit.name, error)
            self._units.watcher.later(_AGAIN, lambda: self._agent_ended(unit, run, code))
            return
        logger.warning("unit %s: its recorder was killed (%s)", unit.name, code)

    def _lost(self, unit: Unit, run: Run) -> None:
        """Nobody recorded the end: end what still runs, then say so. Blocks."""
        remains = self._units.stop(unit, run)
        unit.ended(ExitFacts(reason=Reason.AGENT_INVOCATION, detail=_LOST, remains=remains))

    @staticmethod
    def _facts(run: Run, handle: Handle) -> ExitFacts:
        code = run.directory.status()
        if code is None:
            return ExitFacts(reason=Reason.AGENT_INVOCATION, detail=_LOST)
        if code == 0:
            return ExitFacts(code=0)
        killed = code == 128 + signal.SIGKILL
        oom = killed and memory_kills() > handle.memory_kills
        return ExitFacts(code=code, reason=Reason.AGENT_INVOCATION, detail=describe(code, oom=oom), oom=oom)


def describe(code: int, *, oom: bool = False) -> str:
    """A sentence about an agent's exit code."""
    if oom:
        return "the agent was killed (exit code 137) while the kernel ran out of memory; give the host more of it"
    if code == 128 + signal.SIGKILL:
        return (
            "the agent was killed by SIGKILL (exit code 137), by somebody or for want of memory; the kernel's log "
            "(dmesg) says which"
        )
    if code == 127:
        return "the agent ended with exit code 127: oz or the interpreter it names was not found; check oz_path"
    if code == 126:
        return "the agent ended with exit code 126: oz could not be executed; check its rights and its architecture"
    if code > 128:
        try:
            return f"the agent was ended by {signal.Signals(code - 128).name} (exit code {code}); its output says more"
        except ValueError:
            pass  # a code of its own choosing
    return f"the agent ended with exit code {code}; its output says why"


def _never(sentence: str, reason: Reason = Reason.AGENT_INVOCATION) -> ExitFacts:
    return ExitFacts(reason=reason, detail=sentence, agent_started=False)


def _workspace_fault(sentence: str) -> TaskFault:
    return TaskFault(ExitFacts(reason=Reason.WORKSPACE_SETUP, detail=sentence, agent_started=False))


def _spec(unit: Unit) -> TaskSpec:
    assert unit.spec is not None, "only attached units have no spec, and they are never prepared"
    return unit.spec


def _give_way(unit: Unit) -> None:
    if unit.cause is not None:
        raise Stopped(f"unit {unit.name} was stopped before its agent ran")


def _first(error: Exception) -> str:
    """The first of the many problems that a copy of a tree collects."""
    if isinstance(error, shutil.Error) and error.args and error.args[0]:
        return str(error.args[0][0][-1])
    return str(error)
