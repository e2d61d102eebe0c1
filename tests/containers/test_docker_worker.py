"""A real worker, a real engine: reports, cancels, stops, kills, restarts."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from oz_worker.devplane.wire import REJECTED
from tests.containers.conftest import DockerRig
from tests.faults.stuck import poison, tripped
from tests.prometheus import SERVED, page, sees, value
from tests.rig import SAFETY, until


def test_tasks_run_in_containers_and_their_ends_are_reported(docker_rig: DockerRig) -> None:
    rig = docker_rig
    rig.config["task_output"] = "log"
    rig.config["backend"]["docker"]["image_pull_policy"] = "IfNotPresent"
    worker = rig.start(env=SERVED)
    good = rig.submit("echo $PWD; exit 0")
    bad = rig.submit('echo "the token is $PRIVATE_TOKEN"; exit 3')
    absent = rig.submit(extra={"docker_image": "127.0.0.1:1/absent:1"})
    rig.plane.wait_acknowledged(good, bad, absent)
    sees(
        worker,
        'oz_worker_image_pull_seconds_count{result="failed"}',
        'oz_worker_task_failures_total{phase="backend",reason="image_pull"}',
        'oz_worker_task_failures_total{phase="backend",reason="container_exit"}',
        'oz_worker_task_sandbox_startup_failures_total{reason="image_pull"}',
    )
    seen = page(worker)
    assert value(seen, "image_pull_seconds_count", result="failed") == 1
    for reason in ("image_pull", "container_exit"):
        assert value(seen, "task_failures_total", phase="backend", reason=reason) == 1
    assert value(seen, "task_sandbox_startup_failures_total", reason="image_pull") == 1
    assert value(seen, "task_sandbox_startup_failures_total", reason="container_exit") == 0
    assert good.state == "completed"
    assert (bad.terminal.reason, bad.terminal.exit_code) == ("container_exit", 3)
    assert "the token is ***" in bad.terminal.message
    worker.wait_log(r"task .* \| /workspace")
    assert worker.stop() == 0
    rig.audit()


def test_running_containers_cost_no_process_each(docker_rig: DockerRig) -> None:
    rig = docker_rig
    worker = rig.start()
    tasks = [rig.submit(f"echo up > $HOME/up-{n}; while [ ! -e $HOME/go ]; do sleep 0.1; done") for n in range(4)]
    for number in range(len(tasks)):
        rig.written(f"up-{number}")
    until(lambda: len(rig.unit_processes()) == 1, "nothing but the one stream of events")
    assert b"events" in Path(f"/proc/{rig.unit_processes()[0]}/cmdline").read_bytes()
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(*tasks)
    assert worker.stop() == 0
    rig.audit()


def test_a_cancel_is_term_then_kill_and_is_proven(docker_rig: DockerRig) -> None:
    rig = docker_rig
    worker = rig.start()
    polite = rig.submit("trap 'echo bye > $HOME/bye; exit 9' TERM; echo up > $HOME/polite; while :; do sleep 0.1; done")
    deaf = rig.submit("trap '' TERM; echo up > $HOME/deaf; while :; do sleep 0.1; done")
    rig.written("polite"), rig.written("deaf")
    for task in (polite, deaf):
        rig.plane.cancel(task)
    rig.plane.wait_for(lambda: polite.closed and deaf.closed, SAFETY, "execution_closed of both")
    assert (polite.state, deaf.state) == ("cancelled", "cancelled")
    assert rig.written("bye") == "bye\n"
    assert rig.containers("status=running") == []
    assert worker.stop() == 0
    rig.audit()


def test_a_stop_ends_what_runs_and_says_so(docker_rig: DockerRig) -> None:
    rig = docker_rig
    worker = rig.start()
    task = rig.submit("echo up > $HOME/up; while :; do sleep 0.1; done")
    rig.written("up")
    assert worker.stop() == 0
    assert task.terminal.reason == "graceful_shutdown"
    rig.audit()


def test_containers_survive_a_kill_of_the_worker(docker_rig: DockerRig) -> None:
    rig = docker_rig
    worker = rig.start()
    running = rig.submit("echo run >> $HOME/runs; while [ ! -e $HOME/go ]; do sleep 0.05; done; echo end; exit 7")
    ending = rig.submit("echo up > $HOME/up; while [ ! -e $HOME/die ]; do sleep 0.05; done; exit 8")
    rig.written("runs"), rig.written("up")
    worker.kill()
    (rig.place / "die").touch()
    until(lambda: len(rig.containers("status=exited")) == 1, "the end of one while nobody looks")
    worker = rig.start()
    rig.plane.wait_acknowledged(ending)
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(running)
    assert (running.terminal.exit_code, ending.terminal.exit_code) == (7, 8)
    assert "end" in running.terminal.message
    assert (rig.place / "runs").read_text() == "run\n"
    assert worker.stop() == 0
    rig.audit()


def test_preserve_leaves_containers_for_the_next_worker(docker_rig: DockerRig) -> None:
    rig = docker_rig
    rig.config["on_shutdown"] = "preserve"
    worker = rig.start()
    task = rig.submit("echo up > $HOME/up; while [ ! -e $HOME/go ]; do sleep 0.05; done; exit 2")
    rig.written("up")
    (name,) = rig.running(1)
    said = rig.run_command("logs", task.task_id, "--state-dir", str(rig.state_dir)).stdout
    assert f"is running; `docker logs -f {name}` shows its output" in said
    ending = rig.submit("echo up > $HOME/up-too; while [ ! -e $HOME/die ]; do sleep 0.05; done; exit 3")
    rig.written("up-too")
    assert worker.stop() == 0
    rig.running(2)
    (rig.place / "die").touch()
    until(lambda: len(rig.containers("status=exited")) == 1, "the end of one while nobody looks")
    worker = rig.start()
    rig.plane.wait_acknowledged(ending)
    assert rig.containers("status=running") == [name]
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(task)
    assert (task.terminal.exit_code, ending.terminal.exit_code) == (2, 3)
    units = rig.instance_dirs()[0] / "units"
    until(lambda: not list(units.iterdir()), "the removal, which a stop under preserve leaves to the next start")
    assert worker.stop() == 0
    rig.audit()


def test_without_its_database_a_container_is_adopted_from_its_labels(docker_rig: DockerRig) -> None:
    rig = docker_rig
    worker = rig.start()
    task = rig.submit("echo up > $HOME/up; while [ ! -e $HOME/go ]; do sleep 0.05; done; exit 3")
    rig.written("up")
    worker.kill()
    for path in rig.instance_dirs()[0].glob("state.db*"):
        path.unlink()
    worker = rig.start()
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(task)
    assert task.terminal.exit_code == 3
    assert worker.stop() == 0
    rig.audit()


def test_a_cancel_while_no_worker_ran_is_done_by_the_next(docker_rig: DockerRig) -> None:
    rig = docker_rig
    rig.config["stop_grace"] = "1h"
    worker = rig.start()
    task = rig.submit("trap '' TERM; echo up > $HOME/up; while :; do sleep 1; done")
    rig.written("up")
    rig.plane.cancel(task)
    worker.wait_log("cancelled by the server")
    until(lambda: rig.query("SELECT 1 FROM tasks WHERE state = 'cancelling'"), "the cancel in the database")
    worker.kill()
    rig.config["stop_grace"] = "300ms"
    worker = rig.start()
    rig.plane.wait_for(lambda: task.closed, SAFETY, "execution_closed")
    assert task.state == "cancelled"
    assert worker.stop() == 0
    rig.audit()


def test_drain_finishes_what_runs_and_takes_nothing_new(docker_rig: DockerRig) -> None:
    rig = docker_rig
    rig.config["on_shutdown"] = "drain"
    worker = rig.start()
    tasks = [
        rig.submit(f"echo up > $HOME/up-{n}; while [ ! -e $HOME/go ]; do sleep 0.05; done; exit {n}") for n in (0, 4)
    ]
    rig.written("up-0"), rig.written("up-4")
    worker.send(signal.SIGTERM)
    worker.wait_log("finishing what runs")
    late = rig.submit("echo up > $HOME/late", requeue=False)
    rig.plane.wait_for(lambda: late.state == "rejected", SAFETY, "a rejection")
    assert late.frames(REJECTED)[0].reason == "worker is shutting down"
    rig.running(2)
    (rig.place / "go").touch()
    assert worker.exit_code() == 0
    assert [task.acknowledged for task in tasks] == [True, True]
    assert [(task.state, task.terminal.exit_code) for task in tasks] == [("completed", None), ("failed", 4)]
    assert not (rig.place / "late").exists()
    rig.audit()


def test_a_deadline_counts_over_a_restart_and_ends_the_container(docker_rig: DockerRig) -> None:
    rig = docker_rig
    rig.config["task_timeout"] = "1h"
    worker = rig.start()
    task = rig.submit("trap 'echo bye > $HOME/bye; exit 0' TERM; echo up > $HOME/up; while :; do sleep 0.05; done")
    rig.written("up")
    worker.kill()
    rig.config["task_timeout"] = "10ms"
    worker = rig.start()
    rig.plane.wait_acknowledged(task)
    assert task.terminal.reason == "task_timeout"
    assert "raise task_timeout" in task.terminal.message
    assert rig.written("bye") == "bye\n"
    assert worker.stop() == 0
    rig.audit()


def test_no_cleanup_keeps_the_container(docker_rig: DockerRig) -> None:
    rig = docker_rig
    worker = rig.start("--no-cleanup")
    task = rig.submit("exit 1")
    rig.plane.wait_acknowledged(task)
    assert worker.stop() == 0
    assert len(rig.containers("status=exited")) == 1
    rig.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["TERM", "USR1"])
def test_an_idle_worker_leaves_nothing(docker_rig: DockerRig, number: signal.Signals) -> None:
    rig = docker_rig
    assert rig.start().stop(number) == 0
    rig.audit()


@pytest.mark.parametrize("act", ["stick containers", "die containers"])
def test_without_the_thread_that_watches_containers_the_worker_leaves_with_1(docker_rig: DockerRig, act: str) -> None:
    rig = docker_rig
    rig.config["flush_timeout"] = "300ms"
    worker = rig.start(odd="vital")
    task = rig.submit("echo up > $HOME/up; while [ ! -e $HOME/go ]; do sleep 0.05; done; exit 3")
    rig.written("up")
    rig.running(1)
    poison(rig, act)
    tripped(rig, worker, act, task)
