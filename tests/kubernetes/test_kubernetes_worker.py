"""A real worker, a real kubectl, the cluster of the suite: reports, cancels, stops, kills, restarts."""

from __future__ import annotations

import signal

import pytest

from tests.faults.stuck import poison, tripped
from tests.kubernetes.conftest import KubernetesRig
from tests.rig import SAFETY, until


def test_tasks_run_in_jobs_and_their_ends_are_reported(kubernetes_rig: KubernetesRig) -> None:
    rig = kubernetes_rig
    rig.config["task_output"] = "log"
    worker = rig.start()
    good = rig.submit("echo $PWD; exit 0")
    bad = rig.submit('echo "the token is $PRIVATE_TOKEN"; exit 3')
    rig.plane.wait_acknowledged(good, bad)
    assert good.state == "completed"
    assert (bad.terminal.reason, bad.terminal.exit_code) == ("container_exit", 3)
    assert "the token is ***" in bad.terminal.message
    worker.wait_log(r"task .* \| /workspace")
    rig.settled()
    assert worker.stop() == 0
    (kept,) = rig.jobs()
    assert kept["spec"]["ttlSecondsAfterFinished"] == 86400
    rig.audit()


def test_running_jobs_cost_no_process_each(kubernetes_rig: KubernetesRig) -> None:
    rig = kubernetes_rig
    worker = rig.start()
    tasks = [rig.submit(f"echo up > $HOME/up-{n}; while [ ! -e $HOME/go ]; do sleep 0.1; done") for n in range(4)]
    for number in range(len(tasks)):
        rig.written(f"up-{number}")
    until(rig.only_watches, "nothing but the two watches")
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(*tasks)
    rig.settled()
    assert worker.stop() == 0
    rig.audit()


def test_a_cancel_deletes_the_job_and_is_proven(kubernetes_rig: KubernetesRig) -> None:
    rig = kubernetes_rig
    worker = rig.start()
    polite = rig.submit("trap 'echo bye > $HOME/bye; exit 9' TERM; echo up > $HOME/polite; while :; do sleep 0.1; done")
    deaf = rig.submit("trap '' TERM; echo up > $HOME/deaf; while :; do sleep 0.1; done")
    rig.written("polite"), rig.written("deaf")
    for task in (polite, deaf):
        rig.plane.cancel(task)
    rig.plane.wait_for(lambda: polite.closed and deaf.closed, SAFETY, "execution_closed of both")
    assert (polite.state, deaf.state) == ("cancelled", "cancelled")
    assert rig.written("bye") == "bye\n"
    assert (rig.jobs(), rig.pods()) == ([], [])
    assert worker.stop() == 0
    rig.audit()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["KILL", "TERM"])
def test_jobs_survive_the_end_of_the_worker(kubernetes_rig: KubernetesRig, number: signal.Signals) -> None:
    rig = kubernetes_rig
    worker = rig.start()
    running = rig.submit("echo run >> $HOME/runs; while [ ! -e $HOME/go ]; do sleep 0.05; done; echo end; exit 7")
    ending = rig.submit("echo up > $HOME/up; while [ ! -e $HOME/die ]; do sleep 0.05; done; exit 8")
    rig.written("runs"), rig.written("up")
    said = rig.run_command("logs", running.task_id, "--state-dir", str(rig.state_dir)).stdout
    (name,) = [job["metadata"]["name"] for job in rig.jobs() if running.execution_id[-8:] in job["metadata"]["name"]]
    assert f"is running; `kubectl --namespace=default logs --follow job/{name} --container=task` shows" in said
    worker.send(number)
    worker.exit_code()
    (rig.place / "die").touch()
    until(lambda: len(rig.active()) == 1, "the end of one while nobody looks")
    worker = rig.start()
    rig.plane.wait_acknowledged(ending)
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(running)
    assert (running.terminal.exit_code, ending.terminal.exit_code) == (7, 8)
    assert "end" in running.terminal.message
    assert (rig.place / "runs").read_text() == "run\n"
    rig.settled()
    assert worker.stop() == 0
    rig.audit()


def test_a_cancel_while_no_worker_ran_is_done_by_the_next(kubernetes_rig: KubernetesRig) -> None:
    rig = kubernetes_rig
    worker = rig.start()
    task = rig.submit("trap '' TERM; echo up > $HOME/up; while :; do sleep 0.1; done")
    rig.written("up")
    with rig.cluster.faults.hang("delete", "jobs"):
        rig.plane.cancel(task)
        worker.wait_log("cancelled by the server")
        until(lambda: rig.query("SELECT 1 FROM tasks WHERE state = 'cancelling'"), "the cancel in the database")
        worker.kill()
    worker = rig.start()
    rig.plane.wait_for(lambda: task.closed, SAFETY, "execution_closed")
    assert task.state == "cancelled"
    assert worker.stop() == 0
    rig.audit()


def test_no_cleanup_keeps_jobs_for_ever(kubernetes_rig: KubernetesRig) -> None:
    rig = kubernetes_rig
    worker = rig.start("--no-cleanup")
    good, bad = rig.submit("exit 0"), rig.submit("exit 1")
    rig.plane.wait_acknowledged(good, bad)
    assert worker.stop() == 0
    assert ["ttlSecondsAfterFinished" in job["spec"] for job in rig.jobs()] == [False, False]
    rig.close()


def test_task_timeout_ends_a_job_that_never_would(kubernetes_rig: KubernetesRig) -> None:
    rig = kubernetes_rig
    rig.config["task_timeout"] = "4s"
    worker = rig.start()
    task = rig.submit("echo forever; while :; do sleep 0.1; done")
    rig.plane.wait_acknowledged(task)
    assert task.terminal.reason == "task_timeout"
    assert "forever" in task.terminal.message
    assert rig.jobs() == []
    assert worker.stop() == 0
    rig.audit()


def test_one_shot_leaves_no_job_that_ended_well(kubernetes_rig: KubernetesRig) -> None:
    rig = kubernetes_rig
    worker = rig.start("--one-shot")
    task = rig.submit("exit 0")
    assert worker.exit_code() == 0
    assert task.state == "completed"
    until(lambda: rig.jobs() == [], "the end of a deletion that was ordered")
    rig.audit()


@pytest.mark.parametrize("act", ["stick jobs", "die jobs"])
def test_without_the_thread_that_watches_jobs_the_worker_leaves_with_1(kubernetes_rig: KubernetesRig, act: str) -> None:
    rig = kubernetes_rig
    rig.config["flush_timeout"] = "300ms"
    worker = rig.start(odd="vital")
    task = rig.submit("echo up > $HOME/up; while [ ! -e $HOME/go ]; do sleep 0.05; done; exit 3")
    rig.written("up")
    poison(rig, act)
    tripped(rig, worker, act, task)
