"""Hostile, repeated, late and misplaced messages, through the real worker (faults 11-18)."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from oz_worker.devplane.server import ControlPlane
from oz_worker.devplane.tasks import Task
from oz_worker.devplane.wire import CLOSED
from tests.rig import SAFETY, Rig, Worker, until

WAIT = "while [ ! -e $HOME/go ]; do sleep 0.05; done"


def peak_memory(worker: Worker) -> int:
    """The most memory that the worker ever had, in MiB."""
    status = Path(f"/proc/{worker.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


def assignment(**data: Any) -> str:
    """An assignment with exactly these fields."""
    return json.dumps({"type": "task_assignment", "data": data})


GARBAGE = [
    '{"type":"task_assignmen","data":{}}',
    '{"type":"task_assignment"}',
    '{"type":"task_assignment","data":{"task":{"id":"t"}}}',
    '{"type":"task_assignment","data":{"task_id":7,"task":{}}}',
    '{"type":["task_assignment"],"data":{"task_id":"t"}}',
    '{"type":"task_cancellation","data":{"task_id":"t","execution_id":{}}}',
    '{"type":"task_assignment","data":{"task_id":"\\ud800","task":{}}}',
    '{"type":"x","type":"y"}',
    '{"a":' * 50_000,
    "nul\0l",
]


def test_garbage_is_said_once_counted_and_costs_neither_task_nor_link_nor_memory(rig: Rig) -> None:
    """Fault 11. Ten megabytes of it too; a huge assignment is an assignment."""
    worker = rig.start()
    running = rig.submit(WAIT)
    rig.plane.wait_for(lambda: running.claimed, SAFETY)
    for _ in range(30):
        for text in GARBAGE:
            rig.plane.send_text(text)
    rig.plane.send_text(json.dumps({"type": "novelty", "data": ["x" * 10_000_000]}))
    rig.plane.send_text("x" * 10_000_000)
    large = rig.submit("exit 0", task_extra={"attachment": "y" * 10_000_000})
    rig.plane.wait_acknowledged(large)
    assert large.state == "completed"
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(running)
    assert len(rig.plane.connections) == 1
    assert peak_memory(worker) < 300
    assert worker.stop() == 0
    assert 3 < worker.log.count("ignored") < 20
    rig.audit()


def test_bytes_that_are_no_text_end_the_connection_and_nothing_else(rig: Rig) -> None:
    """Fault 11: invalid UTF-8, then a frame with a reserved bit."""
    worker = rig.start()
    running = rig.submit(WAIT)
    rig.plane.wait_for(lambda: running.claimed, SAFETY)
    for number, raw in enumerate((b"\x81\x02\xc3\x28", b"\xf1\x00"), 1):
        rig.plane.send_bytes(raw)
        rig.plane.wait_connected(SAFETY, after=number)
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(running)
    assert worker.stop() == 0
    rig.audit()


WRONG: dict[str, dict[str, Any]] = {
    "task null": {"task": None},
    "task a list": {"task": []},
    "variable a number": {"task": {}, "env_vars": {"A": 1}},
    "variable with NUL": {"task": {}, "env_vars": {"A": "\0"}},
    "argument too long": {"task": {}, "additional_oz_args": ["x" * 140_000]},
    "arguments an object": {"task": {}, "additional_oz_args": {"a": 1}},
    "deep": {"task": {"x": json.loads("[" * 500 + "]" * 500)}},
}


def test_what_cannot_be_run_is_reported_by_field_and_the_next_task_runs(rig: Rig) -> None:
    """Fault 11, failures 13 and 14."""
    worker = rig.start()
    tasks = [
        rig.submit(task_id=f"t{n}", execution_id="e", frame=assignment(task_id=f"t{n}", execution_id="e", **data))
        for n, data in enumerate(WRONG.values())
    ]
    rig.plane.wait_acknowledged(*tasks)
    assert {(task.state, task.terminal.reason) for task in tasks} == {("failed", "unknown")}
    fine = rig.submit("exit 0")
    rig.plane.wait_acknowledged(fine)
    assert worker.stop() == 0
    rig.audit()


def test_the_last_of_duplicate_keys_counts_and_there_is_one_answer(rig: Rig) -> None:
    """Fault 11."""
    worker = rig.start()
    text = '{"type":"task_assignment","data":{"task_id":"no","execution_id":"e","task_id":"yes","task":{}}}'
    task = rig.submit(task_id="yes", execution_id="e", frame=text)
    rig.plane.wait_acknowledged(task)
    assert task.state == "completed"
    assert worker.stop() == 0
    rig.audit()


def test_a_server_of_another_age_is_served_the_same(rig: Rig) -> None:
    """Fault 18: unknown fields everywhere, then nothing but what is needed."""
    worker = rig.start()
    new = {"protocol": 9, "hints": [{"deep": {"x": None}}]}
    newer = rig.submit("exit 0", extra=new, task_extra=new, snapshot={"model_id": "m", **new, "mcp_servers": None})
    older = rig.submit(task_id="old", execution_id="", frame=assignment(task_id="old", task={}))
    rig.plane.wait_acknowledged(newer, older)
    assert (newer.state, older.state) == ("completed", "completed")
    assert worker.stop() == 0
    rig.audit()


@pytest.mark.parametrize(
    ("trouble", "reason"), [("disk", "worker is out of disk space"), ("backend", "backend unavailable")]
)
def test_without_room_or_without_a_workspace_root_a_task_is_refused_once_and_taken_later(
    rig: Rig, trouble: str, reason: str
) -> None:
    """Fault 13; at capacity and draining stand in test_main_job."""
    worker = rig.start()
    if trouble == "disk":
        assert worker.stop() == 0
        rig.config["min_free_disk"] = "4000000GiB"
        worker = rig.start()
    else:
        shutil.rmtree(rig.workspaces)
    refused = rig.submit("exit 0")
    rig.plane.wait_for(lambda: refused.state == "rejected", SAFETY, "the refusal")
    assert [frame.reason for frame in refused.frames("task_rejected")] == [reason]
    worker.wait_log(f"WARNING task {refused.task_id}.* rejected: {reason}")
    if trouble == "disk":
        assert worker.stop() == 0
        rig.config["min_free_disk"] = 0
        worker = rig.start()
    else:
        rig.workspaces.mkdir(mode=0o700)
        (rig.workspaces / ".oz-worker").mkdir(mode=0o700)
        rig.plane.redeliver(refused)
    rig.plane.wait_acknowledged(refused)
    assert refused.state == "completed"
    assert len(refused.frames("task_rejected")) == 1
    assert worker.stop() == 0
    rig.audit()


def test_an_assignment_of_what_runs_is_answered_also_while_draining(rig: Rig) -> None:
    """Fault 13."""
    worker = rig.start()
    task = rig.submit(WAIT)
    rig.plane.wait_for(lambda: task.claimed, SAFETY)
    rig.run_command("drain", "--state-dir", str(rig.state_dir))
    worker.wait_log("taking no new tasks")
    rig.plane.redeliver(task)
    rig.plane.wait_for(lambda: len(task.frames("task_claimed")) == 2, SAFETY, "the claim again")
    (rig.place / "go").touch()
    assert worker.exit_code() == 0
    assert task.state == "completed"
    rig.audit()


def closings(rig: Rig) -> list[tuple[str, str]]:
    """The keys for which `execution_closed` came."""
    return [(r.frame.key.task_id, r.frame.key.execution_id) for r in rig.plane.received if r.frame.kind == CLOSED]


def test_a_cancel_of_nobody_is_answered_where_it_names_an_execution(rig: Rig) -> None:
    """Fault 14, failure 20."""
    worker = rig.start()
    rig.plane.cancel("nobody", "")
    rig.plane.cancel("nobody", "e1")
    rig.plane.wait_for(lambda: closings(rig), SAFETY, "execution_closed")
    worker.wait_log("not known here: nothing to do")
    assert worker.stop() == 0
    assert closings(rig) == [("nobody", "e1")]
    rig.audit()


def test_a_cancel_that_comes_with_its_task_ends_it_before_or_after_its_start(rig: Rig) -> None:
    """Fault 14: ten times, so that it meets admission, workspace and start."""
    worker = rig.start()
    tasks = []
    for _ in range(10):
        tasks.append(rig.submit("sleep 1000"))
        rig.plane.cancel(tasks[-1])
    rig.plane.wait_for(lambda: all(task.closed for task in tasks), SAFETY, "every execution_closed")
    assert {task.state for task in tasks} == {"cancelled"}
    assert worker.stop() == 0
    rig.audit()


def hooks(rig: Rig, **commands: Any) -> None:
    """Give the direct backend its hooks."""
    rig.config["backend"]["direct"].update(commands)


def cancelled_once(task: Task) -> bool:
    return task.state == "cancelled" and task.closed and task.acknowledged


def test_a_cancel_during_setup_starts_no_agent_and_runs_the_teardown(rig: Rig) -> None:
    """Fault 14, failure 37."""
    hooks(rig, setup_command="echo up > $HOME/up; sleep 1000", teardown_command="echo down >> $HOME/down")
    worker = rig.start()
    task = rig.submit("echo agent > $HOME/agent")
    until((rig.place / "up").exists, "the setup")
    rig.plane.cancel(task)
    rig.plane.wait_for(lambda: cancelled_once(task), SAFETY, "the cancel")
    assert not (rig.place / "agent").exists()
    assert worker.stop() == 0
    assert (rig.place / "down").read_text() == "down\n"
    rig.audit()


def test_a_cancel_during_teardown_changes_no_result_and_is_answered_when_all_is_gone(rig: Rig) -> None:
    """Fault 14: the earlier result."""
    hooks(rig, teardown_command=f"echo down > $HOME/down; {WAIT}")
    worker = rig.start()
    task = rig.submit("exit 3")
    until((rig.place / "down").exists, "the teardown")
    rig.plane.cancel(task)
    worker.wait_log("cancelled by the server")
    assert not task.closed
    (rig.place / "go").touch()
    rig.plane.wait_for(lambda: task.closed and task.acknowledged, SAFETY, "execution_closed")
    assert (task.state, task.terminal.exit_code) == ("failed", 3)
    assert worker.stop() == 0
    rig.audit()


def test_a_cancel_after_the_end_is_answered_and_changes_nothing(rig: Rig) -> None:
    """Fault 14; also by a later worker, from its database."""
    worker = rig.start()
    task = rig.submit("exit 0")
    rig.plane.wait_acknowledged(task)
    rig.plane.cancel(task)
    rig.plane.wait_for(lambda: task.closed, SAFETY, "execution_closed")
    assert worker.stop() == 0
    worker = rig.start()
    rig.plane.cancel(task)
    rig.plane.wait_for(lambda: len(task.frames(CLOSED)) == 2, SAFETY, "the second answer")
    assert task.state == "completed"
    assert len(task.frames("task_completed")) == 1
    assert worker.stop() == 0
    rig.audit()


def test_repeated_cancels_never_extend_the_grace(rig: Rig) -> None:
    """Fault 14: while they come faster than the grace, the task still ends."""
    rig.config["stop_grace"] = "500ms"
    worker = rig.start()
    task = rig.submit("trap '' TERM; echo up > $HOME/up; while :; do sleep 1; done")
    until((rig.place / "up").exists, "the agent")
    limit = time.monotonic() + SAFETY
    while not task.ended:
        assert time.monotonic() < limit, "the repeats keep it alive"
        rig.plane.cancel(task)
        time.sleep(0.1)
    rig.plane.wait_for(lambda: cancelled_once(task), SAFETY, "the cancel")
    assert worker.stop() == 0
    rig.audit()


def test_a_cancel_around_a_broken_connection_has_one_answer(rig: Rig) -> None:
    """Fault 14: its report is lost with the first connection, and the cancel comes again on the second."""
    worker = rig.start()
    rig.plane.cut_on(lambda frame: frame.terminal, unread=True)
    task = rig.submit("sleep 1000")
    rig.plane.wait_for(lambda: task.claimed, SAFETY)
    rig.plane.cancel(task)
    rig.plane.wait_connected(SAFETY, after=1)
    rig.plane.cancel(task)
    rig.plane.wait_for(lambda: cancelled_once(task), SAFETY, "the cancel")
    assert len(set(task.frames("task_completed"))) == 1
    assert worker.stop() == 0
    rig.audit()


def test_a_cancel_that_waited_for_the_server_to_return_ends_the_task(rig: Rig) -> None:
    """Fault 14: cancelled while disconnected, told at the reconnect."""
    worker = rig.start()
    task = rig.submit("sleep 1000")
    rig.plane.wait_for(lambda: task.claimed, SAFETY)
    rig.plane.down()
    worker.wait_log("Next try in")
    rig.plane.up()
    rig.plane.wait_connected(SAFETY, after=1)
    rig.plane.cancel(task)
    rig.plane.wait_for(lambda: cancelled_once(task), SAFETY, "the cancel")
    assert worker.stop() == 0
    rig.audit()


def test_a_server_that_forgot_everything_is_told_what_runs(rig: Rig) -> None:
    """Fault 15: a new server on the old address assigns what runs already, and cancels what it never assigned."""
    worker = rig.start()
    running = rig.submit(f"echo run >> $HOME/runs; {WAIT}", task_id="t1", execution_id="e1")
    unknown = rig.submit("echo up > $HOME/up; sleep 1000", task_id="t2", execution_id="e2")
    rig.plane.wait_for(lambda: running.claimed and unknown.claimed, SAFETY)
    until((rig.place / "up").exists, "the agent")
    until(lambda: rig.query("SELECT sum(claim_acked) FROM tasks") == [(2,)], "the acknowledged claims")
    rig.plane.down()
    port = int(rig.plane.port.address.rpartition(":")[2])
    with ControlPlane(port=port, key=rig.plane.key) as fresh:
        fresh.wait_connected(SAFETY)
        again = fresh.submit("echo run >> $HOME/runs", task_id="t1", execution_id="e1")
        fresh.wait_for(lambda: again.claimed, SAFETY, "the claim")
        (rig.place / "go").touch()
        fresh.wait_acknowledged(again)
        assert (rig.place / "runs").read_text() == "run\n"
        fresh.check()
        fresh.cancel("t2", "e2")
        fresh.wait_for(
            lambda: {"task_completed", CLOSED} <= {r.frame.kind for r in fresh.received if r.frame.key.task_id == "t2"},
            SAFETY,
            "the end of what it never assigned",
            strict=False,  # this plane calls the end of a stranger a violation; a real server just notes it
        )
        assert worker.stop() == 0
    rig.audit()


def test_a_cancel_of_an_unknown_execution_in_the_moment_of_a_stop_is_answered(rig: Rig) -> None:
    """Rule 16, while the database holds the answer up and nothing else is left to do."""
    worker = rig.start()
    with contextlib.closing(sqlite3.connect(rig.instance_dirs()[0] / "state.db", isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        rig.plane.cancel("nobody", "e1")
        worker.wait_stacks(r"^store\n.*BEGIN IMMEDIATE")
        worker.send(signal.SIGTERM)
        worker.wait_log("TERM: ending all tasks")
        db.execute("ROLLBACK")
    assert worker.exit_code() == 0
    assert [entry.frame.kind for entry in rig.plane.received if entry.frame.key.task_id == "nobody"] == [CLOSED]
    assert rig.query("SELECT count(*) FROM outbox") == [(0,)]
    rig.audit()


def test_two_workers_with_one_id_both_work_and_do_not_fight(rig: Rig) -> None:
    """Fault 16: each has an instance of its own."""
    first = rig.start()
    one = rig.submit(f"echo run >> $HOME/runs; {WAIT}")
    rig.plane.wait_for(lambda: one.claimed, SAFETY)
    second = rig.start()
    two = rig.submit(f"echo run >> $HOME/runs; {WAIT}")
    rig.plane.wait_for(lambda: two.claimed, SAFETY)
    assert len(rig.instance_dirs()) == 2
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(one, two)
    assert (rig.place / "runs").read_text() == "run\nrun\n"
    assert len(rig.plane.connections) == 2, "neither pushed the other out"
    assert (first.stop(), second.stop()) == (0, 0)
    rig.audit()


def test_a_revoked_key_costs_no_task_and_its_successor_is_read_from_the_file(rig: Rig) -> None:
    """Fault 17, failures 8 and 66."""
    key_file = rig.place / "key"
    key_file.write_text(rig.plane.key + "\n")
    rig.own_files.add("key")
    rig.config["api_key_file"] = str(key_file)
    del rig.env["WARP_API_KEY"]
    worker = rig.start()
    task = rig.submit(f"{WAIT}; exit 4")
    rig.plane.wait_for(lambda: task.claimed, SAFETY)
    rig.plane.key = "wk-the-successor"
    rig.secrets.append(rig.plane.key)
    rig.plane.cut()
    worker.wait_log(f"401.*make a new one; the key is read from {key_file} anew at each dial. Next try in")
    (rig.place / "go").touch()
    worker.wait_log("failed: agent_invocation")
    key_file.write_text(rig.plane.key + "\n")
    rig.plane.wait_acknowledged(task)
    assert task.terminal.exit_code == 4
    assert worker.stop() == 0
    rig.audit()
