"""The command backend through the real worker: what is handed over, what happens when handing over goes wrong."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from oz_worker.devplane.tasks import Task
from tests.prometheus import SERVED, sees
from tests.rig import SAFETY, WORKER_ID, Rig, until

TAKE = 'cat > "$HOME/payload-$OZ_RUN_ID"; '
WAIT = "while [ ! -e $HOME/go ]; do sleep 0.05; done; "
CANCEL = 'echo "$OZ_RUN_ID $OZ_EXECUTION_ID $OZ_WORKER_BACKEND" >> $HOME/cancels'


def handing(rig: Rig, dispatch: str, *, cancel: str = CANCEL, **more: Any) -> None:
    """Let the rig's worker hand its tasks over to *dispatch*."""
    rig.config["backend"] = {"command": {"dispatch_command": dispatch, "cancel_command": cancel, **more}}


def cancels(rig: Rig) -> list[str]:
    """The runs of the cancel command, in order."""
    noted = rig.place / "cancels"
    return noted.read_text().splitlines() if noted.exists() else []


def kinds(task: Task) -> list[str]:
    """What was said about a task, in order."""
    return [entry.frame.kind for entry in task.history]


def named(task: Task) -> str:
    """The line that the cancel command writes for *task*."""
    return f"{task.task_id} {task.execution_id} command"


def test_a_task_that_was_handed_over_is_claimed_and_nothing_more_is_said(rig: Rig) -> None:
    """Failure 19 too: what was handed over is a row, known to a later worker."""
    handing(rig, "cat >/dev/null; env > $HOME/environment-$OZ_RUN_ID")
    rig.config["max_concurrent_tasks"] = 1
    worker = rig.start()
    tasks = []
    for number in range(3):  # more than the limit: a slot is held by the dispatch alone
        tasks.append(rig.submit(task_id=f"t{number}"))
        worker.wait_log(f"task t{number}/.* dispatched")
    rig.plane.redeliver(tasks[0])
    rig.plane.wait_for(lambda: len(tasks[0].frames("task_claimed")) == 2, SAFETY, "the claim again")
    assert worker.stop() == 0
    assert [kinds(task) for task in tasks[1:]] == [["task_claimed"]] * 2
    environment = (rig.place / "environment-t0").read_text()
    assert f"OZ_EXECUTION_ID={tasks[0].execution_id}\n" in environment
    assert rig.plane.key not in environment
    assert "WARP_API_KEY" not in environment
    assert tasks[0].secret not in environment, "a task's secrets come on stdin alone"
    rig.audit()


def test_the_payload_is_the_contract_to_the_letter(rig: Rig) -> None:
    handing(rig, TAKE)
    rig.own_files.add("payload-t1")
    worker = rig.start()
    task = rig.submit(
        "say ü",
        task_id="t1",
        execution_id="e1",
        env_vars={"ODD": "a=b,c\n", "PRIVATE_TOKEN": "token-of-t1"},
        extra={
            "docker_image": "registry/image:1",
            "sidecar_image": "registry/agent:2",
            "additional_sidecars": [{"image": "registry/more:3", "mount_path": "/more", "read_write": True}],
            "additional_oz_args": ["--debug"],
        },
        task_extra={"nobody_knows": {"this": [1, 2.5, None]}},
    )
    worker.wait_log("task t1/e1 dispatched")
    assert worker.stop() == 0
    payload = json.loads((rig.place / "payload-t1").read_text())
    assert payload["task"] == json.loads(task.text)["data"]["task"]
    assert payload["task"]["nobody_knows"] == {"this": [1, 2.5, None]}
    assert payload["base_args"] == [
        *("agent", "run", "--task-id", "t1", "--sandboxed", "--server-root-url", rig.plane.root_url),
        *("--debug", "--idle-on-complete"),
    ]
    assert payload["env"] == {
        "TASK_ID": "t1",
        "GIT_TERMINAL_PROMPT": "0",
        "GH_PROMPT_DISABLED": "1",
        "WARP_SERVER_ROOT_URL": rig.plane.root_url,
        "WARP_API_KEY": task.secret,
        "FAKE_OZ_SCRIPT": "say ü",
        "ODD": "a=b,c\n",
        "PRIVATE_TOKEN": "token-of-t1",
    }
    assert {name: payload[name] for name in payload if name not in ("task", "env", "base_args")} == {
        "version": 1,
        "run_id": "t1",
        "execution_id": "e1",
        "server_root_url": rig.plane.root_url,
        "worker_id": WORKER_ID,
        "docker_image": "registry/image:1",
        "sidecars": [
            {"image": "registry/agent:2", "mount_path": "/agent", "read_write": False},
            {"image": "registry/more:3", "mount_path": "/more", "read_write": True},
        ],
    }
    rig.audit()


def test_a_dispatcher_that_fails_is_reported_and_nothing_is_cancelled(rig: Rig) -> None:
    handing(rig, "cat >/dev/null; echo no capacity at $OZ_RUN_ID; exit 9")
    worker = rig.start(env=SERVED)
    task = rig.submit(task_id="t1")
    rig.plane.wait_acknowledged(task)
    assert (task.terminal.reason, task.terminal.exit_code) == ("dispatch_command", 9)
    sees(
        worker,
        'oz_worker_task_failures_total{phase="backend",reason="dispatch_command"}',
        'oz_worker_task_sandbox_startup_failures_total{reason="dispatch_command"}',
    )
    assert "no capacity at t1" in task.terminal.message
    assert worker.stop() == 0
    assert cancels(rig) == []
    rig.audit()


LATE = """cat >/dev/null
trap '' TERM
sh -c 'trap "" TERM; echo $$ >> $HOME/pids; while :; do sleep 1; done' &
echo $$ >> $HOME/pids
while :; do sleep 1; done"""


def test_a_dispatcher_that_takes_too_long_is_ended_whole_and_cancelled_once(rig: Rig) -> None:
    """Failures 44 and 45."""
    handing(rig, LATE, dispatch_timeout="2s")
    rig.config["stop_grace"] = "300ms"
    worker = rig.start(env=SERVED)
    task = rig.submit()
    rig.plane.wait_acknowledged(task)
    assert task.terminal.reason == "dispatch_timeout"
    sees(worker, 'oz_worker_task_failures_total{phase="backend",reason="dispatch_timeout"}')
    assert "unknown" in task.terminal.message
    pids = [int(pid) for pid in (rig.place / "pids").read_text().split()]
    assert len(pids) == 2
    assert not [pid for pid in pids if pid in rig.unit_processes()]
    assert cancels(rig) == [named(task)]
    assert worker.stop() == 0
    rig.audit()


@pytest.mark.parametrize("restart", [False, True])
def test_a_cancel_after_the_hand_over_runs_the_cancel_command_and_says_nothing(rig: Rig, restart: bool) -> None:
    """Failures 18 and 19."""
    handing(rig, "cat >/dev/null")
    worker = rig.start()
    task = rig.submit()
    worker.wait_log("dispatched")
    if restart:
        worker.kill()
        worker = rig.start()
    rig.plane.cancel(task)
    until(lambda: cancels(rig), "the cancel command")
    worker.wait_log("cancel_command run")
    assert worker.stop() == 0
    assert cancels(rig) == [named(task)]
    assert set(kinds(task)) == {"task_claimed"}
    rig.audit()


@pytest.mark.parametrize("code", [0, 1])
def test_a_cancel_during_the_hand_over_waits_for_it_and_then_cancels_once(rig: Rig, code: int) -> None:
    """Failure 18. A dispatcher that failed has started nothing: there is nothing to cancel."""
    handing(rig, f"cat >/dev/null; echo up > $HOME/up; {WAIT} exit {code}")
    worker = rig.start()
    task = rig.submit()
    until((rig.place / "up").exists, "the dispatcher")
    rig.plane.cancel(task)
    worker.wait_log("cancelled by the server")
    assert cancels(rig) == []
    assert not task.ended
    (rig.place / "go").touch()
    rig.plane.wait_for(lambda: task.closed and task.acknowledged, SAFETY, "execution_closed")
    assert task.state == "cancelled"
    assert worker.stop() == 0
    assert cancels(rig) == ([named(task)] if code == 0 else [])
    rig.audit()


def test_a_cancel_in_the_moment_of_the_hand_over_is_never_lost(rig: Rig) -> None:
    """Failure 18: whatever came first, each agent that was started is cancelled once."""
    handing(rig, 'cat >/dev/null; echo "$OZ_RUN_ID" >> $HOME/runs')
    worker = rig.start()
    runs = rig.place / "runs"
    tasks = []
    for number in range(15):
        tasks.append(rig.submit(task_id=f"t{number}"))
        until(lambda: runs.exists() and len(runs.read_text().split()) == len(tasks), "the dispatcher")
        rig.plane.cancel(tasks[-1])
    until(lambda: len(cancels(rig)) == len(tasks), "every cancel command")
    rig.plane.wait_for(lambda: all(t.closed or not t.ended for t in tasks), SAFETY, "every execution_closed")
    assert worker.stop() == 0
    assert sorted(cancels(rig)) == sorted(map(named, tasks))
    rig.audit()


MANY_FILES = "cat >/dev/null; cd $(dirname $(readlink /proc/self/fd/2)); mkdir m; cd m; seq 4000 | xargs touch"


def test_a_cancel_while_the_traces_of_the_hand_over_are_removed_is_not_lost(rig: Rig) -> None:
    """Failure 18: removing takes a while, because the dispatcher left so many files beside its output."""
    handing(rig, MANY_FILES)
    worker = rig.start()
    task = rig.submit()
    worker.wait_log("dispatched")
    rig.plane.cancel(task)
    until(lambda: cancels(rig), "the cancel command")
    until(lambda: not list(rig.instance_dirs()[0].glob("units/*")), "the removal")
    assert worker.stop() == 0
    assert cancels(rig) == [named(task)]
    rig.audit()


def test_a_deadline_that_passes_during_the_hand_over_cancels_what_it_started_once(rig: Rig) -> None:
    handing(rig, f"cat >/dev/null; echo up > $HOME/up; {WAIT}")
    rig.config["task_timeout"] = "2s"
    worker = rig.start()
    task = rig.submit()
    until((rig.place / "up").exists, "the dispatcher")
    until(lambda: rig.query("SELECT 1 FROM tasks WHERE cause = 'deadline'"), "the deadline in the database")
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(task)
    assert task.terminal.reason == "task_timeout"
    assert worker.stop() == 0
    assert cancels(rig) == [named(task)]
    rig.audit()


@pytest.mark.parametrize(
    ("before_restart", "row"), [(True, "running"), (False, "running"), (True, "preparing"), (False, "accepted")]
)
def test_a_worker_killed_during_the_hand_over_learns_how_it_went(rig: Rig, before_restart: bool, row: str) -> None:
    """Failure 6; the dispatcher ends while nobody watches, or after the next worker took it up.

    The kill may come before the row says that anything was started.
    """
    handing(rig, f"cat >/dev/null; echo run >> $HOME/runs; {WAIT}")
    worker = rig.start()
    task = rig.submit()
    until((rig.place / "runs").exists, "the dispatcher")
    worker.kill()
    rig.execute(f"UPDATE tasks SET state = '{row}', started_at = NULL")
    if before_restart:
        (rig.place / "go").touch()
        until(lambda: not rig.unit_processes(), "the dispatcher's end")
    worker = rig.start()
    (rig.place / "go").touch()
    worker.wait_log("dispatched")
    assert worker.stop() == 0
    assert (rig.place / "runs").read_text() == "run\n"
    assert cancels(rig) == []
    assert set(kinds(task)) == {"task_claimed"}
    rig.audit()


@pytest.mark.parametrize("state", ["accepted", "preparing"])
def test_a_worker_killed_before_it_noted_that_the_dispatcher_runs_hands_over_all_the_same(rig: Rig, state: str) -> None:
    """The dispatcher runs before the row says so; what it started must be neither cancelled nor reported."""
    handing(rig, f"cat >/dev/null; echo run >> $HOME/runs; {WAIT}")
    worker = rig.start()
    task = rig.submit()
    until((rig.place / "runs").exists, "the dispatcher")
    worker.kill()
    with contextlib.closing(sqlite3.connect(rig.instance_dirs()[0] / "state.db", isolation_level=None)) as db:
        db.execute("UPDATE tasks SET state = ?, started_at = NULL", (state,))
    worker = rig.start()
    (rig.place / "go").touch()
    until(
        lambda: rig.query("SELECT state FROM tasks") not in ([("accepted",)], [("preparing",)], [("running",)]),
        "the decision",
    )
    assert rig.query("SELECT state FROM tasks") == [("dispatched",)]
    assert worker.stop() == 0
    assert (rig.place / "runs").read_text() == "run\n"
    assert cancels(rig) == []
    assert set(kinds(task)) == {"task_claimed"}
    rig.audit()


def test_a_worker_that_is_stopped_during_the_hand_over_waits_for_it(rig: Rig) -> None:
    handing(rig, f"cat >/dev/null; echo up > $HOME/up; {WAIT}")
    worker = rig.start()
    task = rig.submit()
    until((rig.place / "up").exists, "the dispatcher")
    worker.send(signal.SIGTERM)
    worker.wait_log("taking no new tasks")
    (rig.place / "go").touch()
    assert worker.exit_code() == 0
    assert "dispatched" in worker.log
    assert kinds(task) == ["task_claimed"]
    rig.audit()


def test_what_the_dispatcher_leaves_running_is_the_work_and_lives_on(rig: Rig) -> None:
    """Failure 45: it holds the output open, and nobody waits for that."""
    handing(rig, "cat >/dev/null; (echo $$ > $HOME/pid; exec sleep 1000) &")
    worker = rig.start()
    rig.submit()
    worker.wait_log("dispatched")
    assert worker.stop() == 0
    left = rig.unit_processes()
    assert [Path(f"/proc/{pid}/comm").read_text() for pid in left] == ["sleep\n"]
    os.kill(left[0], signal.SIGKILL)
    until(lambda: not rig.unit_processes(), "the end of the work")
    rig.audit()


@pytest.mark.parametrize(
    ("command", "said"),
    [("no-such-program", "127"), ("sleep 1000", "took longer")],
)
def test_a_cancel_command_that_fails_is_said_and_hurts_nothing(rig: Rig, command: str, said: str) -> None:
    handing(rig, "cat >/dev/null", cancel=command, cancel_timeout="300ms" if said == "took longer" else "1m")
    worker = rig.start(env=SERVED)
    task = rig.submit()
    worker.wait_log("dispatched")
    rig.plane.cancel(task)
    worker.wait_log(f"WARNING .*cancel_command run: .*{said}")
    sees(
        worker,
        'oz_worker_task_failures_total{phase="cleanup",reason="cancel_command"}',
        'oz_worker_tasks_completed_total{result="dispatched"}',
        'oz_worker_task_duration_seconds_count{result="dispatched"}',
    )
    assert worker.stop() == 0
    rig.audit()
