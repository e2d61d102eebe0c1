"""A task's life under every interleaving that hypothesis finds: one terminal report, no slot leaked, no unit left."""

from __future__ import annotations

import shutil
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from oz_worker.lifecycle import FINAL, TRANSITIONS, Event, State, step
from oz_worker.model import Key
from tests.bench_engine import Bench, eventually, spec
from tests.scripted import World

KEYS = [Key("task-a", "exec-1"), Key("task-a", "exec-2"), Key("task-b", "")]
TERMINAL = ("task_completed", "task_failed")


class Life(RuleBasedStateMachine):
    """The server's side, the outside world's and the operator's, in any order."""

    outlives_disk = False

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.world = World(outlives_disk=self.outlives_disk)
        self.bench = Bench(self.directory, self.world, max_concurrent_tasks=2)
        self.reports: dict[tuple[str, str], list[str]] = defaultdict(list)
        self.runs_of: dict[Key, int] = defaultdict(int)

    @initialize()
    def begin(self) -> None:
        self.bench.connect()

    @rule(key=st.sampled_from(KEYS), twice=st.booleans())
    def assign(self, key: Key, twice: bool) -> None:
        if self.bench.connected:
            for _time in range(1 + twice):
                self.bench.engine.assign(spec(key))
            self.bench.settle()

    @rule(key=st.sampled_from(KEYS), whole=st.booleans())
    def cancel(self, key: Key, whole: bool) -> None:
        if self.bench.connected:
            self.bench.engine.cancel(key.task_id, "" if whole else key.execution_id)
            self.bench.settle()

    @rule(index=st.integers(0, 3), code=st.sampled_from([0, 1, 137]))
    def agent_exits(self, index: int, code: int) -> None:
        running = self.world.running()
        if running:
            self.world.exit(running[index % len(running)], code)
            self.bench.settle()

    @rule(index=st.integers(0, 3), code=st.sampled_from([0, 1]), key=st.sampled_from(KEYS))
    def agent_exits_while_cancelled(self, index: int, code: int, key: Key) -> None:
        running = self.world.running()
        if running and self.bench.connected:
            self.bench.engine.cancel(key.task_id, key.execution_id)
            self.world.exit(running[index % len(running)], code)
            self.bench.settle()

    @rule(acknowledge=st.booleans())
    def server_reads(self, acknowledge: bool) -> None:
        self._note(self.bench.read())
        if acknowledge:
            self.bench.acknowledge()
            self.bench.settle()

    @rule()
    def connection_breaks(self) -> None:
        self.bench.disconnect()
        self.bench.connect()

    @rule()
    def worker_restarts(self) -> None:
        self._restart()

    @invariant()
    def no_thread_died(self) -> None:
        assert self.bench.deaths == []

    @invariant()
    def nothing_ran_twice(self) -> None:
        assert all(count == 1 for count in self.world.starts.values())

    @invariant()
    def slots_match_the_tasks(self) -> None:
        taken, alive = self.bench.engine.registry.counts()
        assert taken == alive <= 2

    def teardown(self) -> None:
        try:
            self._finish()
        finally:
            self.bench.leave()
            shutil.rmtree(self.directory)

    def _finish(self) -> None:
        """Whatever happened: once agents have ended and the server has read, nothing is left and all was said."""
        self._restart()
        for name in self.world.running():
            self.world.exit(name, 0)
        self.bench.settle()
        for _round in range(3):
            self._note(self.bench.read())
            self.bench.acknowledge()
            self.bench.settle()
        assert self.bench.engine.idle()
        assert self.bench.engine.registry.counts() == (0, 0)
        eventually(lambda: self.world.units == {}, "the removal of every unit")
        assert self.bench.outbox.undelivered() == 0
        runs: dict[Key, int] = defaultdict(int)
        for row in self.bench.store.do(_all_rows):
            assert row[2] == "ended"
            assert row[3] == 1, "every report is acknowledged"
            runs[Key(row[0], row[1])] += 1
        for key, count in runs.items():
            distinct = self.reports[key]
            assert 1 <= len(set(distinct)) <= count, f"{key}: {count} attempts, reports {distinct}"

    def _restart(self) -> None:
        self.bench.settle()
        self.bench.leave()
        self.bench = Bench(self.directory, self.world, max_concurrent_tasks=2)
        self.bench.settle()
        self.bench.connect()

    def _note(self, frames: list[dict[str, Any]]) -> None:
        for frame in frames:
            data = frame["data"]
            if frame["type"] in TERMINAL:
                self.reports[Key(data["task_id"], data.get("execution_id", ""))].append(str(sorted(data.items())))


def _all_rows(db: Any) -> list[tuple[str, str, str, int]]:
    return list(db.execute("SELECT task_id, execution_id, state, report_acked FROM tasks").fetchall())


class LifeInACluster(Life):
    """The same where units outlive the worker's disk, and so stay until their report was read."""

    outlives_disk = True

    @invariant()
    def what_ended_well_stays_until_its_report_was_read(self) -> None:
        kept = {name for name, code in self.world.codes().items() if code == 0}
        for unit in self.bench.store.do(_succeeded_unread):
            assert unit in kept, f"{unit} was removed before its report was read"


def _succeeded_unread(db: Any) -> list[str]:
    query = "SELECT unit FROM tasks WHERE result = 'succeeded' AND report_acked = 0"
    return [row[0] for row in db.execute(query).fetchall()]


Life.TestCase.settings = LifeInACluster.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestLife = Life.TestCase
TestLifeInACluster = LifeInACluster.TestCase


def test_final_states_absorb_every_event() -> None:
    for state in FINAL:
        for event in Event:
            assert step(state, event) is state


def test_every_state_but_the_final_ones_leads_to_an_end() -> None:
    for state in State:
        reached = {state}
        while True:
            more = {after for one in reached for after in TRANSITIONS[one].values()} - reached
            if not more:
                break
            reached |= more
        assert reached & FINAL
