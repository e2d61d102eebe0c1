"""What the engine does when the disk, a sibling or the moment is against it."""

from __future__ import annotations

import sqlite3
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from oz_worker import rows
from oz_worker.backends.base import Unit
from oz_worker.engine.instance import misfit
from oz_worker.lifecycle import State
from oz_worker.model import Cause, ExitFacts, Key, ReportKind
from oz_worker.store import Store
from tests.bench_engine import SAFETY_SECONDS, Bench, eventually, spec
from tests.scripted import Scripted, World

KEY = Key("task", "exec")


def kinds(frames: list[dict[str, Any]]) -> list[str]:
    return [frame["type"] for frame in frames]


def ended_unread(state_dir: Path) -> World:
    """A worker whose only task has ended and whose report nobody has read."""
    world = World()
    bench = Bench(state_dir, world)
    bench.connect()
    bench.engine.assign(spec(KEY))
    bench.settle()
    bench.read()
    bench.acknowledge()
    bench.disconnect()
    world.exit(world.running()[0], 3)
    eventually(bench.engine.idle)
    bench.leave()
    return world


def change(state_dir: Path, sql: str) -> None:
    db = sqlite3.connect(state_dir / "bench" / "state.db")
    db.execute(sql)
    db.commit()
    db.close()


def test_a_held_report_of_a_task_that_is_over_is_let_go_at_the_start(tmp_path: Path) -> None:
    world = ended_unread(tmp_path)
    change(tmp_path, "UPDATE outbox SET held = 1")  # what a full disk at the release leaves behind
    bench = Bench(tmp_path, world)
    bench.connect()
    assert kinds(bench.read()) == ["task_failed"]
    bench.acknowledge()
    bench.leave()


def test_a_report_that_was_only_in_memory_is_said_from_its_row_at_the_start(tmp_path: Path) -> None:
    world = ended_unread(tmp_path)
    change(tmp_path, "DELETE FROM outbox")  # what a kill leaves behind after a full disk
    bench = Bench(tmp_path, world)
    bench.connect()
    assert kinds(bench.read()) == ["task_failed"]
    bench.acknowledge()
    bench.settle()
    bench.leave()
    bench = Bench(tmp_path, world)
    bench.connect()
    assert bench.read() == []
    bench.leave()


def test_a_report_that_was_read_is_not_said_again_because_its_deletion_was_lost(tmp_path: Path) -> None:
    world = ended_unread(tmp_path)
    change(tmp_path, "UPDATE tasks SET report_acked = 1")
    bench = Bench(tmp_path, world)
    bench.connect()
    assert bench.read() == []
    bench.settle()
    assert bench.store.do(rows.reports) == []
    bench.leave()


def test_a_task_that_comes_while_all_are_being_ended_is_ended_too(tmp_path: Path) -> None:
    bench = Bench(tmp_path, World())
    bench.connect()
    bench.engine.stop_all(1.0)
    bench.engine.assign(spec(KEY))  # decided before the intake was closed
    assert not bench.engine.idle()
    eventually(bench.engine.idle)
    assert bench.read()[-1]["data"]["failure_reason"] == "graceful_shutdown"
    bench.leave()


class Stuck(World):
    """Its teardowns wait until the test lets them go."""

    def __init__(self) -> None:
        super().__init__()
        self.in_teardown, self.go_on = threading.Event(), threading.Event()


class StuckBackend(Scripted):
    def teardown(self, unit: Unit) -> str:
        assert isinstance(self.world, Stuck)
        self.world.in_teardown.set()
        assert self.world.go_on.wait(SAFETY_SECONDS)
        return super().teardown(unit)


def test_a_redelivery_committed_together_with_the_end_is_answered_behind_it(tmp_path: Path) -> None:
    world = Stuck()
    bench = Bench(tmp_path, world)
    bench.backend = bench.engine.primary.backend = StuckBackend(world)
    bench.connect()
    bench.engine.assign(spec(KEY))
    bench.settle()
    world.exit(world.running()[0], 3)
    assert world.in_teardown.wait(SAFETY_SECONDS)
    at_gate, gate = threading.Event(), threading.Event()

    def wait_at_gate(_db: object) -> None:
        at_gate.set()
        gate.wait(SAFETY_SECONDS)

    bench.store.post(wait_at_gate)
    assert at_gate.wait(SAFETY_SECONDS), "whose batch is closed once it runs"
    world.go_on.set()
    eventually(lambda: bench.store._queue.qsize() == 1, "the release in the queue")
    bench.engine.assign(spec(KEY))
    gate.set()
    eventually(bench.engine.idle)
    assert kinds(bench.read()) == ["task_claimed", "task_failed", "task_failed"], "no claim behind the end"
    bench.leave()


class SlowDisk(Scripted):
    """Its units are proven gone at the second look, and from then on the disk is slow for a while."""

    def __init__(self, world: World, bench: Bench) -> None:
        super().__init__(world)
        self.bench, self.looks = bench, 0
        self.on_their_way: list[ReportKind] = []

    def stop(self, unit: Unit) -> ExitFacts:
        facts, self.looks = super().stop(unit), self.looks + 1
        if self.looks == 1:
            return replace(facts, remains="process 7")
        self.bench.store.post(lambda _db: time.sleep(0.3))
        return facts

    def clean_up(self, unit: Unit, *, keep: bool) -> str:
        self.on_their_way = [entry.row.kind for entry in self.bench.engine.outbox._waiting.values()]
        return super().clean_up(unit, keep=keep)


def test_a_task_is_not_done_before_the_word_of_its_end_is_on_its_way(tmp_path: Path) -> None:
    """Or a drain would leave with it undelivered, and with exit 1."""
    bench = Bench(tmp_path, world := World())
    bench.backend = bench.engine.primary.backend = slow = SlowDisk(world, bench)
    bench.connect()
    bench.engine.assign(spec(KEY))
    bench.settle()
    bench.engine.cancel(*KEY)
    eventually(lambda: bool(slow.on_their_way), "the clean-up")
    assert ReportKind.CLOSED in slow.on_their_way
    eventually(bench.engine.idle)
    bench.leave()


def test_an_assignment_on_its_way_keeps_the_engine_from_being_idle(tmp_path: Path) -> None:
    bench = Bench(tmp_path, World())
    bench.connect()
    bench.engine.assign(spec(KEY))
    assert not bench.engine.idle()
    bench.settle()
    bench.leave()


def test_what_status_reads_of_rejections_and_waits_has_no_secrets(tmp_path: Path) -> None:
    bench = Bench(tmp_path, World())
    bench.connect()
    bench.engine.assign(spec(KEY, "hunter2secret"))
    bench.settle()
    bench.backend.trouble = "the proxy http://bob:hunter2secret@proxy:3128 is away"
    bench.engine.assign(spec(Key("other", "exec")))
    bench.settle()
    with bench.engine.tasks()[0].unit.waiting(lambda: "the image of https://bob:hunter2secret@host/x"):
        bench.engine.notes.look()
    facts = bench.store.do(rows.facts)
    for name, words in {
        "rejections": "the proxy http",
        "waits": "the image of https",
        "intake": "the proxy http",
    }.items():
        assert words in facts[name]
        assert "hunter2secret" not in facts[name], name
    bench.leave()


def test_an_answer_to_a_cancel_that_hangs_keeps_nobody_from_being_idle(tmp_path: Path) -> None:
    """A stop gives it the time of the flush; a listing of a dying engine takes a minute."""
    bench = Bench(tmp_path, World())
    bench.connect()
    with bench.world.lock:  # the listing waits for it
        bench.engine.cancel("nobody", "exec")
        bench.settle()
        eventually(lambda: any(thread.name == "cancel-unknown" for thread in threading.enumerate()), "the listing")
        assert bench.engine.idle()
        assert bench.engine.cancellation.answering()
    eventually(lambda: not bench.engine.cancellation.answering(), "the answer")
    assert kinds(bench.read()) == ["execution_closed"]
    bench.leave()


def test_a_dead_siblings_survivor_is_not_run_again_before_it_is_served(tmp_path: Path) -> None:
    world = World()
    dead = Bench(tmp_path, world, instance="dead")
    dead.connect()
    dead.engine.assign(spec(KEY))
    dead.settle()
    dead.leave()
    sibling = Bench(tmp_path, World(), instance="sibling")
    sibling.connect()
    sibling.engine.assign(spec(KEY))
    sibling.settle()
    [frame] = sibling.read()
    assert (frame["type"], frame["data"]["reason"]) == ("task_rejected", "backend unavailable")
    assert len(world.running()) == 1
    sibling.leave()


def test_an_instance_of_another_worker_or_backend_does_not_fit(tmp_path: Path) -> None:
    world = World()
    bench = Bench(tmp_path, world)
    bench.connect()
    bench.engine.assign(spec(KEY))
    bench.settle()
    bench.store.do(lambda db: rows.put_fact(db, "worker", '{"worker_id": "alpha"}'))
    path, uid = bench.slot.path, bench.engine.uid
    bench.leave()
    assert misfit(path, worker_id="alpha", backend="scripted", uid=uid) == ""
    assert "worker alpha" in misfit(path, worker_id="beta", backend="scripted", uid=uid)
    assert "scripted backend" in misfit(path, worker_id="alpha", backend="direct", uid=uid)


def test_a_cancel_of_handed_over_work_that_was_not_run_is_run_at_the_next_start(tmp_path: Path) -> None:
    world = ended_unread(tmp_path)
    change(tmp_path, "DELETE FROM outbox")
    change(tmp_path, "UPDATE tasks SET state = 'dispatched', cause = 'cancel', closed = 0, claim_acked = 1")
    bench = Bench(tmp_path, world)
    eventually(lambda: bench.backend.cancelled == [KEY])
    eventually(bench.engine.idle)
    [row] = bench.store.do(rows.closed_tasks)
    assert (row.state, row.cause, row.closed) == (State.DISPATCHED, Cause.CANCEL, True)
    bench.connect()
    assert bench.read() == []
    bench.leave()


def test_a_change_that_raises_takes_neither_the_thread_nor_its_neighbours(tmp_path: Path) -> None:
    store = Store(tmp_path / "state.db")
    deaths: list[str] = []
    store.start(lambda name, error: deaths.append(name))
    answers: list[str] = []
    store.post(lambda db: 1 / 0, lambda _result, error: answers.append(str(error)))
    store.post(lambda db: None, lambda _result, _error: answers.remove("never said"))
    store.do(lambda db: rows.put_fact(db, "alive", "yes"))
    assert "division by zero" in answers[0]
    assert deaths == []
    store.close(10)
    late: list[object] = []
    store.post(lambda db: None, lambda _result, error: late.append(error))
    eventually(lambda: len(late) == 1)
    assert "closed" in str(late[0])


def test_without_its_disk_a_worker_of_a_cluster_tells_of_a_success_whose_report_was_lost_with_it(
    tmp_path: Path,
) -> None:
    world = World(outlives_disk=True)
    bench = Bench(tmp_path / "first", world)
    bench.connect()
    bench.engine.assign(spec(KEY))
    bench.settle()
    (unit,) = world.running()
    bench.disconnect()
    world.exit(unit, 0)
    eventually(bench.engine.idle)
    bench.leave()
    assert world.codes() == {unit: 0}
    bench = Bench(tmp_path / "second", world)
    bench.settle()
    bench.connect()
    assert kinds(bench.read()) == ["task_claimed", "task_completed"]
    assert world.codes() == {unit: 0}
    bench.acknowledge()
    eventually(lambda: world.codes() == {}, "the removal")
    bench.leave()


def test_a_stop_of_the_worker_removes_what_was_read_before_it_leaves(tmp_path: Path) -> None:
    world = World(outlives_disk=True)
    bench = Bench(tmp_path, world)
    bench.connect()
    bench.engine.assign(spec(KEY))
    bench.settle()
    world.exit(world.running()[0], 0)
    eventually(bench.engine.idle)
    bench.read()
    bench.acknowledge()
    bench.store.do(lambda db: None)
    bench.leave()
    assert world.codes() == {}
