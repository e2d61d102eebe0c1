"""A real engine over a real database and the scripted backend, with a server that reads what it is given."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Callable

from oz_worker import slots
from oz_worker.dialects.oz import reports
from oz_worker.engine import recovery
from oz_worker.engine.admission import Engine
from oz_worker.engine.gate import Limits
from oz_worker.engine.instance import Instance
from oz_worker.engine.outbox import Outbox
from oz_worker.engine.output import Output
from oz_worker.engine.upkeep import Upkeep
from oz_worker.known import Known
from oz_worker.lifecycle import State
from oz_worker.meters import Meters
from oz_worker.model import Key, Report, TaskSpec
from oz_worker.store import Store
from tests.scripted import Scripted, World

ORIGIN = "ws://127.0.0.1:1"
SAFETY_SECONDS = 20.0


def eventually(condition: Callable[[], bool], what: str = "the condition") -> None:
    """Wait until *condition* holds; far longer than it can take on a busy machine, then fail."""
    limit = time.monotonic() + SAFETY_SECONDS
    while not condition():
        assert time.monotonic() < limit, f"{what} did not come true"
        time.sleep(0.001)


def spec(key: Key, *secrets: str) -> TaskSpec:
    """A plain task."""
    return TaskSpec(key=key, run_id=key.task_id, argv=("agent", "run"), environment={}, secrets=secrets)


class Bench:
    """One worker's engine, from its lock to its outbox, without a link."""

    def __init__(self, state_dir: Path, world: World, instance: str = "bench", **limits: Any) -> None:
        self.deaths: list[str] = []
        self.world = world
        self.backend = Scripted(world)
        self.slot = slots.take(state_dir, instance)
        self.store = Store(self.slot.path / "state.db")
        self.store.start(self._died)
        self.meters = Meters()
        self.outbox = Outbox(ORIGIN, lambda: None)
        defaults: dict[str, Any] = {
            "max_concurrent_tasks": 0,
            "most_tasks": 0,
            "one_shot": False,
            "stop_grace": 1.0,
            "task_timeout": 0.0,
            "cleanup": True,
            "keep_failed": 0.0,
            "min_free_disk": 0,
            "min_free_inodes": 0,
            "disk_paths": (),
            "backend": "scripted",
        }
        self.engine = Engine(
            Instance(self.slot, self.store, self.backend),
            outbox=self.outbox,
            meters=self.meters,
            output=Output(known=Known(), longest_copy=1 << 20, retention=3600.0),
            limits=Limits(**{**defaults, **limits}),
            encode=self._encode,
            on_change=lambda: None,
            on_death=self._died,
        )
        self.seen: list[dict[str, Any]] = []  # every frame the server was given, in order
        self.connected = False
        self._taken = 0
        recovery.recover(self.engine, self.engine.primary)
        self._upkeep = Upkeep(self.engine, _no_other, lambda path: "not in this bench")
        if world.outlives_disk:
            self._upkeep.start(self._died)

    def connect(self) -> None:
        """A new connection."""
        self.outbox.opened()
        self._taken = 0
        self.connected = True

    def disconnect(self) -> None:
        """The connection breaks: what was read and not acknowledged will come again."""
        self.outbox.closed()
        self.connected = False

    def read(self) -> list[dict[str, Any]]:
        """What the server reads now."""
        if not self.connected:
            return []
        frames = [json.loads(text) for text in self.outbox.take(1000)]
        self._taken += len(frames)
        self.seen += frames
        return frames

    def acknowledge(self) -> None:
        """The pong for everything read so far."""
        if self.connected:
            self.outbox.acknowledged(self._taken)

    def settle(self) -> None:
        """Wait until nothing moves: every task runs undisturbed, or is done."""

        def still() -> bool:
            self.store.do(lambda db: None)
            return all(
                task.row.state is State.RUNNING and task.unit.facts is None and task.row.cause is None
                for task in self.engine.tasks()
            )

        eventually(still, "every task at rest")

    def leave(self) -> None:
        """The worker goes and leaves everything as it is (what `preserve` does)."""
        self._upkeep.stop(SAFETY_SECONDS)
        self.store.close(SAFETY_SECONDS)
        self.slot.release()

    def _encode(self, report: Report) -> str:
        return reports.encode(report, worker_id="bench")

    def _died(self, name: str, error: BaseException) -> None:
        self.deaths.append(f"{name}: {error!r}")


def _no_other(slot: slots.Slot) -> Instance:
    raise AssertionError("there is one instance in a bench")
