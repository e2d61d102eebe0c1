"""What tests of host processes share: small sh agents, a direct backend around them, and looking for survivors."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any, Callable, Mapping

import pytest

from oz_worker.backends.base import Unit
from oz_worker.backends.command import Command
from oz_worker.backends.direct import Direct
from oz_worker.cgroup import Cgroup, cgroup_base
from oz_worker.errors import TaskFault
from oz_worker.model import Key, TaskSpec, unit_name
from oz_worker.process import environment_of, read_stat
from oz_worker.settings import CommandOptions, DirectOptions
from oz_worker.tree import MARK
from tests.audit import guard
from tests.rig import until

INSTANCE = os.environ.setdefault(f"OZ_TEST_INSTANCE_{os.environ.get('PYTEST_XDIST_WORKER', '')}", f"{os.getpid():012x}")
"""One for each process that runs tests, so that none meets the units of another; drivers of theirs inherit it."""

PATIENCE = 20.0


def eventually(holds: Callable[[], Any], what: str = "", patience: float = PATIENCE) -> Any:
    """The first true value of *holds*; fails after a deadline that no healthy run comes near."""
    return until(holds, what or "what never happened", patience)


def written(path: Path) -> str:
    """The text of a file, once it ends with a newline."""
    return str(eventually(lambda: path.exists() and (text := path.read_text()).endswith("\n") and text, f"no {path}"))


def alive(pid: int) -> bool:
    """Whether a process runs: a zombie does not."""
    stat = read_stat(pid)
    return stat is not None and not stat.dead


def marked(mark: str) -> list[int]:
    """The live processes that carry a unit's mark."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [pid for pid in pids if alive(pid) and (environment_of(pid) or {}).get(MARK) == mark]


def end_marked(mark: str) -> None:
    """Kill everything that carries a mark, also what is being born just now."""

    def none_left() -> bool:
        found = marked(mark)
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not found

    eventually(none_left)


class Stage:
    """A place on disk with an agent, and the backends that were opened there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.instance_dir = root / "state" / INSTANCE
        self.workspaces = root / "workspaces"
        self.oz = root / "oz"
        self.opened: list[Direct | Command] = []
        self.units: list[Unit] = []
        self.agent("exit 0")

    def agent(self, body: str) -> None:
        """Let *body* be the agent from now on. It finds a directory for its notes in $NOTES."""
        new = self.oz.with_name("oz.new")
        new.write_text(f"#!/bin/sh\nNOTES={self.root}\n{body}\n")
        new.chmod(0o755)
        new.rename(self.oz)  # an agent that runs keeps the file it runs

    def options(self, **changes: Any) -> DirectOptions:
        """Options that fit this stage."""
        return DirectOptions(**{"workspace_root": str(self.workspaces), "oz_path": str(self.oz), **changes})

    def closed_direct(self, *, grace: float = 10.0, log_max: int = 0, cleanup: bool = True, **options: Any) -> Direct:
        """A direct backend that is not open yet; `host` is its environment."""
        host: Mapping[str, str] = options.pop("host", None) or dict(os.environ)
        return Direct(
            self.options(**options),
            worker_id="worker-1",
            instance=INSTANCE,
            instance_dir=self.instance_dir,
            host_environ=host,
            cleanup=cleanup,
            task_log_max=log_max,
            stop_grace=grace,
        )

    def direct(self, **options: Any) -> Direct:
        """An open direct backend."""
        backend = self.closed_direct(**options)
        backend.open()
        self.opened.append(backend)
        return backend

    def command(self, dispatch: str, *, host: Mapping[str, str] | None = None, **options: Any) -> Command:
        """An open command backend."""
        backend = Command(
            CommandOptions(dispatch_command=dispatch, **options),
            worker_id="worker-1",
            server_root_url="https://server.example",
            instance=INSTANCE,
            instance_dir=self.instance_dir,
            host_environ=host or dict(os.environ),
            stop_grace=10.0,
        )
        backend.open()
        self.opened.append(backend)
        return backend

    def unit(self, task: str = "task", execution: str = "run-1", **spec: Any) -> Unit:
        """A new unit; keyword arguments change its spec."""
        key = Key(task, execution)
        values: dict[str, Any] = {"argv": ("agent", "run"), "environment": {"TASK_ID": task}, **spec}
        values["environment"] = guard().keep_of(self.root, values["environment"])
        unit = Unit(unit_name(key, 1), INSTANCE, key, TaskSpec(key=key, run_id=task, **values))
        self.units.append(unit)
        return unit

    def again(self, unit: Unit) -> Unit:
        """The same unit as a restarted worker sees it."""
        return Unit(unit.name, INSTANCE, unit.key)

    def mark(self, unit: Unit) -> str:
        """The mark of the unit's processes."""
        return f"{INSTANCE}.{unit.name}"

    def close(self) -> None:
        """Close the backends and kill whatever a failed test left."""
        for backend in self.opened:
            backend.close()
        for unit in self.units:
            end_marked(self.mark(unit))
        base = cgroup_base()
        for path in base.glob(f"oz-{INSTANCE}-*") if base else ():
            Cgroup(path).remove()


def planted(unit: Unit) -> str:
    """The secret that each unit is given for the audit."""
    assert unit.spec is not None
    return unit.spec.environment["PRIVATE_TOKEN"]


def run(backend: Direct | Command, unit: Unit) -> Unit:
    """Prepare and start a unit and wait for its end."""
    backend.prepare(unit)
    backend.start(unit)
    unit.wait_for_end_or_stop(PATIENCE)
    assert unit.facts is not None, "the unit did not end"
    return unit


def prepare_fault(stage: Stage, unit: Unit, **options: Any) -> TaskFault:
    """The fault with which a unit's preparation ends; what it left is removed."""
    backend = stage.direct(**options)
    with pytest.raises(TaskFault) as caught:
        backend.prepare(unit)
    assert not caught.value.facts.agent_started
    assert backend.clean_up(unit, keep=False) == ""
    return caught.value
