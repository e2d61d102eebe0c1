"""A backend whose units live in a plain dictionary: for tests of the engine, driven by the test, strict about misuse.

It keeps the contract of `oz_worker.backends.base.Backend` (the contract suite runs over it), and its world outlives
the engine, as containers outlive a worker.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Sequence

from oz_worker.backends.base import Capabilities, Found, Unit
from oz_worker.errors import Stopped
from oz_worker.model import ExitFacts, Key, Reason


@dataclass
class Outside:
    """One unit as it exists outside the worker."""

    key: Key
    started: bool = False
    code: int | None = None  # None while it runs
    watcher: Unit | None = None


@dataclass
class World:
    """Everything that exists outside; survives engines. The lock guards all of it.

    *outlives_disk*: it is a cluster, where a worker finds its units also without its database.
    """

    outlives_disk: bool = False
    units: dict[str, Outside] = field(default_factory=dict)
    starts: dict[str, int] = field(default_factory=dict)
    teardowns: dict[str, int] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def exit(self, name: str, code: int) -> None:
        """The agent of a unit ends by itself."""
        with self.lock:
            outside = self.units.get(name)
            if outside is None or not outside.started or outside.code is not None:
                return
            outside.code = code
            watcher = outside.watcher
        if watcher is not None:
            watcher.ended(_facts(code))

    def codes(self) -> dict[str, int | None]:
        """How the units that exist ended; None for those that have not."""
        with self.lock:
            return {name: outside.code for name, outside in self.units.items()}

    def running(self) -> list[str]:
        """Names of the units whose agent runs."""
        with self.lock:
            return [name for name, outside in self.units.items() if outside.started and outside.code is None]


class Scripted:
    """The backend over a World."""

    def __init__(self, world: World) -> None:
        self.capabilities = Capabilities(survives_worker=True, outlives_disk=world.outlives_disk)
        self.world = world
        self.trouble = ""
        self.cancelled: list[Key] = []

    def open(self) -> None: ...

    def close(self) -> None: ...

    def unavailable(self) -> str:
        return self.trouble

    def prepare(self, unit: Unit) -> None:
        assert unit.spec is not None, "prepare needs the spec"
        with self.world.lock:
            assert unit.name not in self.world.units, "prepared twice"
            self.world.units[unit.name] = Outside(unit.key)
        if unit.cause is not None:
            raise Stopped

    def start(self, unit: Unit) -> None:
        with self.world.lock:
            outside = self.world.units[unit.name]
            assert not outside.started, "started twice"
            outside.started = True
            outside.watcher = unit
            self.world.starts[unit.name] = self.world.starts.get(unit.name, 0) + 1

    def attach(self, unit: Unit) -> None:
        with self.world.lock:
            outside = self.world.units[unit.name]
            outside.watcher = unit
            code, started = outside.code, outside.started
        if not started:
            unit.ended(ExitFacts(reason=Reason.UNKNOWN, detail="never started", agent_started=False))
        elif code is not None:
            unit.ended(_facts(code))

    def stop(self, unit: Unit) -> ExitFacts:
        with self.world.lock:
            outside = self.world.units.get(unit.name)
            if outside is not None and outside.started and outside.code is None:
                outside.code = 143
        unit.ended(_facts(143))
        assert unit.facts is not None
        return unit.facts

    def stragglers(self, unit: Unit) -> str:
        return ""

    def teardown(self, unit: Unit) -> str:
        with self.world.lock:
            self.world.teardowns[unit.name] = self.world.teardowns.get(unit.name, 0) + 1
        return ""

    def clean_up(self, unit: Unit, *, keep: bool) -> str:
        with self.world.lock:
            outside = self.world.units.get(unit.name)
            assert outside is None or not outside.started or outside.code is not None, "removed while running"
            if not keep:
                self.world.units.pop(unit.name, None)
        return ""

    def tail(self, unit: Unit, limit: int) -> bytes:
        return b"the last line"[-limit:]

    def output_at(self, unit: Unit) -> str:
        return "nowhere"

    def collect(self, unit: Unit) -> str:
        return ""

    def look_after(self) -> Sequence[Found]:
        return ()

    def recover(self) -> Sequence[Found]:
        return self.units()

    def units(self) -> Sequence[Found]:
        with self.world.lock:
            return [Found(name, outside.key) for name, outside in self.world.units.items()]

    def cancel_dispatched(self, unit: Unit) -> str:
        self.cancelled.append(unit.key)
        return ""


def _facts(code: int) -> ExitFacts:
    return ExitFacts(code=code, reason=None if code == 0 else Reason.AGENT_INVOCATION, detail=f"exit code {code}")
