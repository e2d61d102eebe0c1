"""`status --explain` beside a real worker: why it takes no task, what it rejected, what a task waits for."""

from __future__ import annotations

import json
import signal
from typing import Any

from tests.rig import SAFETY, Rig, until


def link(rig: Rig) -> Any:
    """What the worker wrote of its link."""
    return json.loads(rig.query("SELECT value FROM facts WHERE name = 'link'")[0][0])


def test_a_task_and_a_worker_are_explained_from_the_offer_to_the_last_report(rig: Rig) -> None:
    rig.config["max_concurrent_tasks"] = 1
    rig.config["backend"]["direct"]["setup_command"] = "while [ ! -e $HOME/setup ]; do sleep 0.05; done"
    worker = rig.start("--stop-grace", "30s")
    task = rig.submit("while [ ! -e $HOME/go ]; do sleep 0.05; done")
    rig.plane.wait_for(lambda: task.claimed, SAFETY)
    refused = rig.submit("true", requeue=False)
    rig.plane.wait_for(lambda: refused.state == "rejected", SAFETY)
    until(lambda: "it waits for setup_command" in rig.explained(task.task_id), "what the task waits for")
    assert "it is being prepared for " in rig.explained(task.task_id)
    sentence = f"task {refused.task_id}/{refused.execution_id} was rejected "
    assert sentence in rig.explained(refused.task_id)
    assert "worker at maximum concurrency" in rig.explained(refused.task_id)
    until(lambda: "takes no task: all slots are taken, 1 tasks of at most 1" in rig.explained(), "the obstacle")
    assert sentence in rig.explained()

    (rig.place / "setup").touch()
    until(lambda: "it waits for nothing but the end of its agent" in rig.explained(task.task_id), "the agent")
    rig.plane.down()
    (rig.place / "go").touch()
    until(lambda: "its report (completed) waits for" in rig.explained(task.task_id), "its end")
    until(lambda: "; tried " in rig.explained(task.task_id), "a dial that failed")
    first = link(rig)
    until(lambda: link(rig)["tried_at"] > first["tried_at"], "another one")
    assert link(rig)["at"] == first["at"], "down since the break"
    assert "takes no task: not connected to the server (disconnected): " in rig.explained()
    rig.plane.up()
    rig.plane.wait_acknowledged(task)
    until(lambda: "the server has read its report" in rig.explained(task.task_id), "the end of it all")
    until(lambda: "  takes tasks\n" in rig.explained(), "a worker that is ready")

    cancelled = rig.submit("trap '' TERM; while [ ! -e $HOME/gone ]; do sleep 0.05; done")
    until(lambda: rig.query(f"SELECT 1 FROM tasks WHERE task_id = '{cancelled.task_id}'"), "the claim")
    until(lambda: "it is running" in rig.explained(cancelled.task_id), "the agent")
    rig.plane.cancel(cancelled)
    until(lambda: "it is being cancelled" in rig.explained(cancelled.task_id), "the cancel")
    assert "because the server cancelled it" in rig.explained(cancelled.task_id)
    worker.send(signal.SIGUSR1)
    until(lambda: "takes no task: stopping (draining): " in rig.explained(), "the drain")
    answer = rig.run_command("status", "--state-dir", str(rig.state_dir), "--explain", "--json")
    (account,) = json.loads(answer.stdout)
    assert sorted(account["explain"]) == ["full", "ready", "rejections", "why_not"]
    assert not account["explain"]["ready"]
    assert [one["task_id"] for one in account["explain"]["rejections"]] == [refused.task_id]
    (rig.place / "gone").touch()
    assert worker.exit_code() == 0

    # Beside no worker: what it knew is still told, and what nobody knows is said to be unknown.
    assert sentence in rig.explained(refused.task_id)
    assert "it ended " in rig.explained(cancelled.task_id)
    answer = rig.run_command("status", "--state-dir", str(rig.state_dir), "--explain", task.task_id, "--json")
    told = json.loads(answer.stdout)
    assert sorted(told) == ["attempts", "rejections", "task_id"]
    assert [attempt["state"] for attempt in told["attempts"]] == ["ended"]
    for words in (("--explain", "nobody"), ("--explain",)):
        none = rig.run_command("status", "--state-dir", str(rig.state_dir), *words)
        assert none.returncode == 3
        assert len(none.stderr.splitlines()) == 1
    rig.audit()
