"""The main job, end to end: real worker, real sockets, real processes, a strict server."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.rig import SAFETY, Rig, until


def test_a_task_runs_and_is_reported_once(both_rigs: Rig) -> None:
    rig = both_rigs
    worker = rig.start()
    task = rig.submit('echo working in $PWD; test -z "$(ls -A)"')
    rig.plane.wait_acknowledged(task)
    assert task.state == "completed"
    assert task.terminal.message == "Task completed successfully"
    assert worker.stop() == 0
    rig.audit()


def test_a_failure_says_exit_code_and_last_lines_without_secrets(rig: Rig) -> None:
    worker = rig.start()
    task = rig.submit('echo "compiling"; echo "token is $PRIVATE_TOKEN"; echo "no such file: x.c" >&2; exit 3')
    rig.plane.wait_acknowledged(task)
    assert task.state == "failed"
    assert task.terminal.reason == "agent_invocation"
    assert task.terminal.exit_code == 3
    assert "no such file: x.c" in task.terminal.message
    assert "token is ***" in task.terminal.message
    assert worker.stop() == 0
    rig.audit()


def test_an_agent_killed_by_a_signal_is_reported_as_128_plus_signal(rig: Rig) -> None:
    worker = rig.start()
    task = rig.submit("kill -SEGV $$")
    rig.plane.wait_acknowledged(task)
    assert (task.state, task.terminal.exit_code) == ("failed", 139)
    assert worker.stop() == 0
    rig.audit()


STUBBORN = """
trap '' TERM
(trap '' TERM; setsid sh -c 'trap "" TERM; echo $$ >> pids; while :; do sleep 1; done') &
(nohup sh -c 'echo $$ >> pids; while :; do sleep 1; done' >/dev/null 2>&1 &)
echo $$ >> pids
while :; do sleep 1; done
"""


def test_cancel_ends_the_whole_tree_and_is_proven(both_rigs: Rig) -> None:
    rig = both_rigs
    worker = rig.start()
    task = rig.submit(STUBBORN)
    pids = until(
        lambda: [f for f in rig.workspaces.glob("*/pids") if len(f.read_text().split()) == 3], "three processes"
    )
    processes = [int(pid) for pid in pids[0].read_text().split()]
    rig.plane.cancel(task)
    rig.plane.wait_for(lambda: task.closed, SAFETY, "execution_closed")
    assert task.state == "cancelled"
    assert task.terminal.message == "Task cancelled by user request."
    assert not [pid for pid in processes if alive(pid)]
    rig.plane.cancel(task)
    rig.plane.wait_for(lambda: len(task.frames("execution_closed")) == 2, SAFETY, "the repeated answer")
    assert worker.stop() == 0
    rig.audit()


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rsplit(")", 1)[1].split()[0] not in "ZX"


def test_the_same_assignment_runs_once_however_often_it_comes(rig: Rig) -> None:
    worker = rig.start()
    task = rig.submit("echo run >> $HOME/runs; while [ ! -e $HOME/go ]; do sleep 0.05; done")
    rig.plane.wait_for(lambda: task.claimed, SAFETY)
    rig.plane.redeliver(task)
    rig.plane.wait_for(lambda: len(task.frames("task_claimed")) >= 2, SAFETY, "a second claim")
    rig.plane.cut()
    rig.plane.wait_connected(after=1)
    rig.plane.redeliver(task)
    rig.plane.wait_for(lambda: len(task.frames("task_claimed")) >= 3, SAFETY, "a third claim")
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(task)
    rig.plane.redeliver(task)
    rig.plane.wait_for(lambda: len(task.frames("task_completed")) >= 2, SAFETY, "the report again")
    assert (rig.place / "runs").read_text() == "run\n"
    assert worker.stop() == 0
    rig.audit()


def test_an_empty_execution_id_runs_anew_after_its_report_was_read(rig: Rig) -> None:
    worker = rig.start()
    task = rig.submit("echo run >> $HOME/runs", execution_id="")
    rig.plane.wait_acknowledged(task)
    until(lambda: "completed_acked" if _acknowledged(rig) else "", "the acknowledgement in the database")
    rig.plane.redeliver(task)
    rig.plane.wait_for(lambda: len(task.frames("task_completed")) >= 2, SAFETY, "the second run's report")
    until(lambda: (rig.place / "runs").read_text() == "run\nrun\n", "the second run")
    assert worker.stop() == 0
    rig.audit()


def _acknowledged(rig: Rig) -> bool:
    import sqlite3

    db = sqlite3.connect(f"file:{rig.instance_dirs()[0] / 'state.db'}?mode=ro", uri=True)
    try:
        return bool(db.execute("SELECT min(report_acked) FROM tasks WHERE state = 'ended'").fetchone()[0])
    finally:
        db.close()


def test_beyond_the_limit_a_task_is_rejected_and_taken_later(rig: Rig) -> None:
    rig.config["max_concurrent_tasks"] = 1
    worker = rig.start()
    first = rig.submit("while [ ! -e $HOME/go ]; do sleep 0.05; done")
    rig.plane.wait_for(lambda: first.claimed, SAFETY)
    second = rig.submit("true")
    rig.plane.wait_for(lambda: second.state == "rejected", SAFETY, "a rejection")
    assert second.frames("task_rejected")[0].reason == "worker at maximum concurrency"
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(first, second)
    assert worker.stop() == 0
    rig.audit()


def test_a_report_waits_for_a_server_that_is_away(rig: Rig) -> None:
    worker = rig.start()
    task = rig.submit("while [ ! -e $HOME/go ]; do sleep 0.05; done; exit 4")
    rig.plane.wait_for(lambda: task.claimed, SAFETY)
    rig.plane.down()
    (rig.place / "go").touch()
    worker.wait_log("failed: agent_invocation")
    rig.plane.up()
    rig.plane.wait_acknowledged(task)
    assert task.terminal.exit_code == 4
    assert worker.stop() == 0
    rig.audit()


def test_a_report_whose_connection_breaks_before_the_pong_comes_again(rig: Rig) -> None:
    worker = rig.start()
    rig.plane.cut_on(lambda frame: frame.terminal)
    rig.plane.cut_on(lambda frame: frame.terminal, unread=True)
    task = rig.submit("exit 5")
    rig.plane.wait_acknowledged(task)
    assert len(set(task.frames("task_failed"))) == 1
    assert worker.stop() == 0
    rig.audit()


def test_stopped_while_the_server_is_away_the_report_is_sent_at_the_next_start(rig: Rig) -> None:
    rig.config["flush_timeout"] = "200ms"
    worker = rig.start()
    task = rig.submit("while [ ! -e $HOME/go ]; do sleep 0.05; done; exit 6")
    rig.plane.wait_for(lambda: task.claimed, SAFETY)
    rig.plane.down()
    (rig.place / "go").touch()
    worker.wait_log("failed: agent_invocation")
    assert worker.stop() == 1
    assert "1 reports could not be delivered" in worker.log
    rig.plane.up()
    worker = rig.start()
    rig.plane.wait_acknowledged(task)
    assert task.terminal.exit_code == 6
    assert worker.stop() == 0
    rig.audit()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_ends_the_tasks_and_reports_graceful_shutdown(rig: Rig, number: signal.Signals) -> None:
    worker = rig.start()
    task = rig.submit("echo started > $HOME/up; sleep 1000")
    until((rig.place / "up").exists, "the agent")
    assert worker.stop(number) == 0
    assert task.terminal.reason == "graceful_shutdown"
    assert task.acknowledged
    rig.audit()


def test_drain_finishes_what_runs_and_refuses_the_rest(rig: Rig) -> None:
    worker = rig.start()
    running = rig.submit("while [ ! -e $HOME/go ]; do sleep 0.05; done")
    rig.plane.wait_for(lambda: running.claimed, SAFETY)
    answer = rig.run_command("drain", "--state-dir", str(rig.state_dir))
    assert (answer.returncode, answer.stderr) == (0, "")
    worker.wait_log("taking no new tasks")
    late = rig.submit("true", requeue=False)
    rig.plane.wait_for(lambda: late.state == "rejected", SAFETY)
    assert late.frames("task_rejected")[0].reason == "worker is shutting down"
    (rig.place / "go").touch()
    assert worker.exit_code() == 0
    assert running.state == "completed"
    rig.audit()


def test_the_second_signal_kills_and_the_third_leaves(rig: Rig) -> None:
    rig.config["stop_grace"] = "1h"
    worker = rig.start()
    task = rig.submit("trap '' TERM; echo up > $HOME/up; while :; do sleep 1; done")
    until((rig.place / "up").exists, "the agent")
    worker.send(signal.SIGTERM)
    worker.wait_log("ending all tasks")
    worker.send(signal.SIGTERM)
    assert worker.exit_code() == 0
    assert task.terminal.reason == "graceful_shutdown"
    rig.audit()


def test_task_timeout_ends_a_task_that_never_would(rig: Rig) -> None:
    rig.config["task_timeout"] = "500ms"
    worker = rig.start()
    task = rig.submit("sleep 1000")
    rig.plane.wait_acknowledged(task)
    assert task.terminal.reason == "task_timeout"
    assert worker.stop() == 0
    rig.audit()


def test_one_shot_takes_one_task_and_leaves_with_0(rig: Rig) -> None:
    worker = rig.start("--one-shot")
    first = rig.submit("while [ ! -e $HOME/go ]; do sleep 0.05; done; exit 9")
    rig.plane.wait_for(lambda: first.claimed, SAFETY)
    second = rig.submit("true", requeue=False)
    rig.plane.wait_for(lambda: second.state == "rejected", SAFETY)
    assert second.frames("task_rejected")[0].reason == "one_shot_complete"
    (rig.place / "go").touch()
    assert worker.exit_code() == 0
    assert first.acknowledged
    rig.audit()


@pytest.mark.parametrize("flag", ["--exit-after-tasks=2", "--exit-after-idle=1s", "--exit-after-uptime=3s"])
def test_exit_after_drains_and_leaves_with_0(rig: Rig, flag: str) -> None:
    tasks = [rig.submit("true") for _number in range(2)]  # there before it is: its time runs from its start
    worker = rig.start(flag)
    rig.plane.wait_acknowledged(*tasks)
    assert worker.exit_code() == 0
    rig.audit()


def test_a_refusal_for_good_is_exit_77_and_says_what_to_do(rig: Rig) -> None:
    worker = rig.start("--exit-on-refusal", env={"WARP_API_KEY": "wk-not-the-key"}, connected=False)
    assert worker.exit_code() == 77
    assert "401" in worker.log
    assert "make a new one; the key came from WARP_API_KEY: a new one there needs a restart" in worker.log
    assert "Next try" not in worker.log
    rig.audit()


def test_status_shows_what_runs_and_logs_shows_the_output(rig: Rig) -> None:
    worker = rig.start()
    task = rig.submit("echo to be kept $PRIVATE_TOKEN; while [ ! -e $HOME/go ]; do sleep 0.05; done")
    rig.plane.wait_for(lambda: task.claimed, SAFETY)
    shown = until(lambda: _status(rig, "running"), "the task in status")
    assert task.task_id in shown
    assert "connected" in shown
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(task)
    assert worker.stop() == 0
    kept = rig.run_command("logs", task.task_id, "--state-dir", str(rig.state_dir))
    assert kept.stdout == "to be kept ***\n"
    none = rig.run_command("status", "--state-dir", str(rig.state_dir))
    assert none.returncode == 3
    assert "no worker runs" in none.stderr
    rig.audit()


def _status(rig: Rig, wanted: str) -> str:
    answer = rig.run_command("status", "--state-dir", str(rig.state_dir))
    assert answer.returncode == 0, answer.stderr
    return answer.stdout if wanted in answer.stdout else ""


def test_frames_that_make_no_sense_hurt_nobody(rig: Rig) -> None:
    worker = rig.start()
    running = rig.submit("while [ ! -e $HOME/go ]; do sleep 0.05; done")
    rig.plane.wait_for(lambda: running.claimed, SAFETY)
    for text in ("", "{", "[]", "null", '{"type":"x"}', '{"type":"task_assignment","data":null}', "[" * 100_000):
        rig.plane.send_text(text)
    rig.plane.send_binary(b"\0\1\2")
    nothing = rig.submit(
        frame='{"type":"task_assignment","data":{"task_id":"n","execution_id":"e","task":null}}',
        task_id="n",
        execution_id="e",
    )
    rig.plane.wait_acknowledged(nothing)
    assert nothing.terminal.reason == "unknown"
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(running)
    assert len(rig.plane.connections) == 1
    assert worker.stop() == 0
    rig.audit()


def test_task_output_log_copies_the_output_redacted(rig: Rig) -> None:
    rig.config["task_output"] = "log"
    worker = rig.start()
    task = rig.submit("echo first $PRIVATE_TOKEN; while [ ! -e $HOME/go ]; do sleep 0.05; done; printf 'no line end'")
    worker.wait_log(rf"task {task.task_id}/\S+ \| first \*\*\*")
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(task)
    worker.wait_log(r"\| no line end")
    assert worker.stop() == 0
    rig.audit()
