"""kill -9 of the worker: no running task is lost, no report is lost or contradicted, nothing is left."""

from __future__ import annotations

import functools
import os
import signal
import sys

import pytest

from oz_worker.devplane.tasks import Task
from tests.faults.kills import kill_at_random_instants, loops, ran_once, redeliver_unclaimed
from tests.rig import ROOT, SAFETY, Rig, Worker, until


def test_a_running_task_survives_and_its_true_exit_code_is_reported(rig: Rig) -> None:
    worker = rig.start()
    task = rig.submit("echo run >> $HOME/runs; while [ ! -e $HOME/go ]; do sleep 0.05; done; echo end; exit 7")
    until((rig.place / "runs").exists, "the agent")
    worker.kill()
    worker = rig.start()
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(task)
    assert task.terminal.exit_code == 7
    assert "end" in task.terminal.message
    assert (rig.place / "runs").read_text() == "run\n"
    assert worker.stop() == 0
    rig.audit()


def test_a_task_that_ended_while_the_worker_was_away_is_reported_with_its_true_exit_code(rig: Rig) -> None:
    worker = rig.start()
    task = rig.submit("echo up > $HOME/up; while [ ! -e $HOME/go ]; do sleep 0.05; done; echo $PRIVATE_TOKEN; exit 8")
    until((rig.place / "up").exists, "the agent")
    worker.kill()
    (rig.place / "go").touch()
    until(lambda: not rig.unit_processes(), "the agent's end")
    worker = rig.start()
    rig.plane.wait_acknowledged(task)
    assert task.terminal.exit_code == 8
    assert "Last output" not in task.terminal.message, "its secrets are no longer known"
    assert worker.stop() == 0
    rig.audit()


def test_a_cancel_is_kept_through_a_kill(rig: Rig) -> None:
    rig.config["stop_grace"] = "1h"
    worker = rig.start()
    task = rig.submit("trap '' TERM; echo up > $HOME/up; while :; do sleep 1; done")
    until((rig.place / "up").exists, "the agent")
    rig.plane.cancel(task)
    worker.wait_log("cancelled by the server")
    until(lambda: b"cancelling" in database(rig), "the cancel in the database")
    worker.kill()
    rig.config["stop_grace"] = "300ms"
    worker = rig.start()
    rig.plane.wait_for(lambda: task.closed, SAFETY, "execution_closed")
    assert task.state == "cancelled"
    assert worker.stop() == 0
    rig.audit()


def database(rig: Rig) -> bytes:
    """Every byte of the database and its log."""
    return b"".join(path.read_bytes() for path in rig.instance_dirs()[0].glob("state.db*"))


def test_preserve_leaves_tasks_running_and_the_next_worker_takes_them_up(rig: Rig) -> None:
    worker = rig.start("--on-shutdown", "preserve")
    task = rig.submit("echo up >> $HOME/up; while [ ! -e $HOME/go ]; do sleep 0.05; done; exit 2")
    until((rig.place / "up").exists, "the agent")
    assert worker.stop() == 0
    assert rig.unit_processes()
    worker = rig.start("--on-shutdown", "preserve")
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(task)
    assert task.terminal.exit_code == 2
    assert worker.stop() == 0
    rig.audit()


def test_without_its_database_a_running_task_is_adopted_from_its_directory(rig: Rig) -> None:
    worker = rig.start()
    task = rig.submit("echo up >> $HOME/up; while [ ! -e $HOME/go ]; do sleep 0.05; done; exit 3")
    until((rig.place / "up").exists, "the agent")
    worker.kill()
    for path in rig.instance_dirs()[0].glob("state.db*"):
        path.unlink()
    worker = rig.start()
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(task)
    assert task.terminal.exit_code == 3
    assert worker.stop() == 0
    rig.audit()


def test_killed_together_with_its_agent_the_lost_end_is_said(rig: Rig) -> None:
    worker = rig.start()
    task = rig.submit("echo up > $HOME/up; sleep 1000")
    until((rig.place / "up").exists, "the agent")
    worker.kill()
    for pid in rig.unit_processes():
        os.kill(pid, signal.SIGKILL)
    worker = rig.start()
    rig.plane.wait_acknowledged(task)
    assert task.terminal.reason == "agent_invocation"
    assert task.terminal.exit_code is None
    assert "killed or the host restarted" in task.terminal.message
    assert worker.stop() == 0
    rig.audit()


def doomed(rig: Rig, commit: int, when: str) -> Worker:
    """A worker that dies at its nth commit."""
    config = rig.place / "config.yaml"
    script = ROOT / "tests" / "faults" / "die_at_commit.py"
    argv = [sys.executable, str(script), str(commit), when, "--config-file", str(config)]
    argv += ["--web-socket-url", rig.plane.url, "--server-root-url", rig.plane.root_url]
    worker = Worker(argv, rig.env, rig.log)
    rig.workers.append(worker)
    return worker


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_at_every_single_commit(rig: Rig, when: str) -> None:
    rig.start().stop()  # writes the configuration, makes the database
    for commit in range(1, 200):
        quick = rig.submit("echo run-$TASK_ID >> $HOME/runs; exit 1")
        slow = rig.submit("echo run-$TASK_ID >> $HOME/runs; while :; do sleep 1; done", task_id=f"slow-{commit}")
        worker = doomed(rig, commit, when)
        died = until(functools.partial(_dead_or_done, rig, worker, slow, quick), "death or the end of its work")
        if died == "done" and worker.stop() == 0:
            break  # more commits than its whole life has
        worker = rig.start()
        redeliver_unclaimed(rig, quick, slow)
        rig.plane.wait_for(functools.partial(_claimed, slow), SAFETY)
        if not slow.ended:
            rig.plane.cancel(slow)
        rig.plane.wait_acknowledged(quick, slow)
        assert worker.stop() == 0
    else:
        raise AssertionError("the work never came to its end")
    assert commit > 8, "this many commits at least are in the life of two tasks"
    ran_once(rig)
    rig.audit()


def _claimed(task: Task) -> bool:
    return task.claimed or task.ended


def _dead_or_done(rig: Rig, worker: Worker, slow: Task, quick: Task) -> str:
    if worker.process.poll() is not None:
        return "dead"
    with rig.plane.lock:
        if slow.claimed and quick.ended and slow.cancelled_at is None:
            try:
                rig.plane.cancel(slow)
            except ConnectionError:
                pass
        return "done" if slow.acknowledged and quick.acknowledged and slow.closed else ""


@loops(20, soak=1000)
def test_kills_at_random_instants(rig: Rig, kills: int) -> None:
    assert kill_at_random_instants(rig, kills, within=(0.1, 1.0)).stop() == 0
    rig.audit()
