"""What the direct and the command backend share: units as directories and process trees of this host."""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path
from typing import Any, Callable, NamedTuple

from oz_worker.backends import unit_root
from oz_worker.backends.base import PROOF_SECONDS, Found, Unit
from oz_worker.backends.output import OutputFiles
from oz_worker.backends.workspace import remove_tree
from oz_worker.cgroup import Cgroup, cgroup_base
from oz_worker.detached import AGENT, Launch, UnitDirectory, launch
from oz_worker.limits import raise_open_files
from oz_worker.tree import MARK, Processes, Tree, end_earlier_helpers
from oz_worker.unreadable import patiently
from oz_worker.watcher import Watcher, become_subreaper

logger = logging.getLogger(__name__)

SETUP, TEARDOWN = "setup", "teardown"
STEPS = (SETUP, AGENT, TEARDOWN)
_OUTPUT_PAUSE = 1.0


class Run:
    """One unit as this process knows it. Used by the unit's thread; the watcher only sets `Step.code`."""

    def __init__(self, directory: UnitDirectory, tree: Tree, facts: dict[str, Any]) -> None:
        self.directory = directory
        self.tree = tree
        self.facts = facts
        self.environment: dict[str, str] = {}


class StepEnd(NamedTuple):
    """How a hook ended: `code` None when nobody recorded it, `remains` what could not be confirmed gone."""

    code: int | None
    late: bool = False
    stopped: bool = False
    remains: str = ""


class LocalUnits:
    """The units of one instance on this host. Safe from any thread: the lock guards the map of runs.

    Different units are served concurrently, one unit by one thread.
    """

    def __init__(
        self,
        instance_dir: Path,
        *,
        instance: str,
        worker_id: str,
        output_limit: int,
        cgroup: str,
        stop_grace: float,
        on_death: Callable[[str, BaseException], None],
    ) -> None:
        self.instance = instance
        self.stop_grace = stop_grace
        self._on_death = on_death
        self._watcher: Watcher | None = None
        self.processes = Processes()
        self.outputs = OutputFiles(output_limit)
        self._root = instance_dir / "units"
        self._worker_id = worker_id
        self._cgroup = cgroup
        self._cgroups: Path | None = None
        self._lock = threading.Lock()
        self._runs: dict[str, Run] = {}

    def open(self) -> None:
        """Make the directory of units and start the watcher. Raises NotUsable."""
        unit_root.make(self._root)
        raise_open_files()
        become_subreaper()
        self._cgroups = cgroup_base()  # also where none are made: an earlier worker may have left some
        self._watcher = Watcher(self._on_death)
        self._watcher.start()
        self._watcher.every(_OUTPUT_PAUSE, self.outputs.sweep)

    def close(self) -> None:
        """Stop the watcher; units are left alone."""
        if self._watcher:
            self._watcher.close()

    @property
    def watcher(self) -> Watcher:
        """The one watcher of all processes here."""
        assert self._watcher is not None, "open comes first"
        return self._watcher

    def mark(self, unit: Unit) -> str:
        """The value of the mark in the environment of everything that belongs to *unit*."""
        return f"{unit.instance}.{unit.name}"

    def create(self, unit: Unit, facts: dict[str, Any]) -> Run:
        """Make a unit's directory and cgroup. Raises OSError."""
        path = self._cgroup_of(unit.name) if self._cgroup == "auto" else None
        whole = {
            "version": 1,
            "task_id": unit.key.task_id,
            "execution_id": unit.key.execution_id,
            "instance": unit.instance,
            "worker": self._worker_id,
            "cgroup": str(path or ""),
            **facts,
        }
        directory = self.directory(unit)
        directory.create(whole)
        cgroup = Cgroup.make(path) if path else None  # after it is written down where it is
        return self._keep(unit, Run(directory, Tree(self.mark(unit), self.processes, cgroup), whole))

    def _keep(self, unit: Unit, run: Run) -> Run:
        with self._lock:
            self._runs[unit.name] = run
        self.outputs.add(run.directory.output)
        return run

    def directory(self, unit: Unit) -> UnitDirectory:
        """Where the files of *unit* are."""
        return UnitDirectory(self._root / unit.name)

    def find(self, unit: Unit) -> Run | None:
        """The unit's run: known, or taken up from its directory; None when it left no trace. Raises Unreadable."""
        with self._lock:
            run = self._runs.get(unit.name)
        if run is not None:
            return run
        directory = self.directory(unit)
        facts = directory.facts()
        if facts is None:
            return None
        path = facts.get("cgroup")
        cgroup = Cgroup(Path(path)) if isinstance(path, str) and path and os.path.isdir(path) else None
        run = Run(directory, Tree(self.mark(unit), self.processes, cgroup), facts)
        for step in STEPS:  # the sessions that an earlier process started
            handle = directory.handle(step)
            if handle is not None:
                run.tree.add(handle.identity)
        return self._keep(unit, run)

    def run_step(self, unit: Unit, run: Run, order: Launch, *, step: str, timeout: float, give_way: bool) -> StepEnd:
        """Run a hook under the recorder to its end, at most *timeout* seconds (0 = unlimited).

        With *give_way* the unit's stop order ends it; without, only a `hurry` that comes while it runs. What is late
        or gives way is stopped with all that the unit has running. Raises SpawnError or OSError when it cannot be
        started, Unreadable when nobody can say how it ended.
        """
        hurried = unit.hurried  # before: whoever asked for haste then has not asked to leave this out
        waiting = launch(order, run.directory, step)
        run.tree.add(waiting.child)
        waiting.go()
        ended: list[int] = []

        def note(code: int) -> None:
            ended.append(code)
            unit.notify()

        self.watcher.watch_child(waiting.child, note)
        run.tree.enter_cgroup(waiting.child)

        def gives_way() -> bool:
            return (give_way and unit.cause is not None) or (unit.hurried and not hurried)

        unit.wait_until(lambda: bool(ended) or gives_way(), timeout or None)
        in_time, stopped = bool(ended), not ended and gives_way()
        remains = "" if in_time else self.stop(unit, run)
        code = patiently(lambda: run.directory.status(step))
        return StepEnd(code, late=not in_time and not stopped, stopped=stopped, remains=remains)

    def stop(self, unit: Unit, run: Run) -> str:
        """End all of a unit: at once when it is hurried, else by its stop order's clock, else by a grace of its own."""
        began = time.monotonic()
        own = began + self.stop_grace

        def kill_at() -> float:  # never before this call: the time for a proof is counted from it
            return max(began, min(own, unit.kill_at)) if unit.cause or unit.hurried else own

        return run.tree.stop(kill_at=kill_at, wait=unit.wait, proof=PROOF_SECONDS)

    def recover(self) -> list[Found]:
        """End helpers of a dead worker, remove what it had only begun to make, then list the units.

        Raises Unreadable when that cannot be known: a unit that is not listed would be taken for one that never was.
        """
        end_earlier_helpers(self.instance)
        found = self.units()
        directories = unit_root.directories(self._root)
        for path in self._cgroups.glob(f"oz-{self.instance}-*") if self._cgroups else ():
            if self._root / path.name.rpartition("-")[2] not in directories:
                Cgroup(path).remove()
        for path in directories - {self._root / unit.name for unit in found}:
            directory = UnitDirectory(path)
            if patiently(directory.handle) is None and not os.path.exists(directory.file("unit.json")):
                remove_tree(str(path))
            else:
                logger.warning("%s is damaged and was left alone; remove it when nothing of it runs", path)
        return found

    def units(self) -> list[Found]:
        """List the units that have a directory, touching nothing. Raises Unreadable rather than leave one out."""
        return unit_root.found(unit_root.directories(self._root))

    def _cgroup_of(self, name: str) -> Path | None:
        return self._cgroups / f"oz-{self.instance}-{name}" if self._cgroups else None

    def forget(self, unit: Unit, *, keep: bool) -> str:
        """Let go of a unit, with its directory unless *keep*; one sentence about what is left."""
        self._let_go(unit)
        return "" if keep else remove_tree(str(self.directory(unit).path))

    def reduce(self, unit: Unit) -> str:
        """Let go of a unit that is to be forgotten later: only its facts, handles and statuses stay."""
        self._let_go(unit)
        directory = self.directory(unit)
        try:
            names = os.listdir(directory.path)
        except FileNotFoundError:
            return ""
        except OSError as error:
            return f"{directory.path} cannot be listed: {error.strerror}"
        kept = ("unit.json", "pid", "status")
        return "; ".join(filter(None, (_removed(directory.file(name)) for name in names if not name.endswith(kept))))

    def _let_go(self, unit: Unit) -> None:
        """Reap what has ended and remove the cgroup, also of a unit that only its name is known of."""
        with self._lock:
            run = self._runs.pop(unit.name, None)
        self.outputs.discard(self.directory(unit).output)
        if run is not None:
            run.tree.release()
        noted = run.tree.cgroup.path if run is not None and run.tree.cgroup else None
        for path in {noted, self._cgroup_of(unit.name)} - {None}:
            assert path is not None
            Cgroup(path).remove()


def _removed(path: str) -> str:
    """Remove a file or a directory; one sentence about what is left."""
    try:
        if os.path.isdir(path) and not os.path.islink(path):
            return remove_tree(path)
        os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        return f"could not remove {path} ({error.strerror}); remove it by hand"
    return ""


__all__ = ["MARK", "LocalUnits", "Run", "StepEnd"]
