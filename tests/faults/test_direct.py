"""Agents, workspaces and hooks that misbehave, through the real worker (faults 29-33)."""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.prometheus import SERVED, sees
from tests.rig import FAKE_OZ, SAFETY, Rig, until

WAIT = "while [ ! -e $HOME/go ]; do sleep 0.05; done"


def direct(rig: Rig, **options: Any) -> None:
    """Set options of the direct backend."""
    rig.config["backend"]["direct"].update(options)


def running(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rsplit(")", 1)[1].split()[0] not in "ZX"


# -- trees (29, 30)


def test_what_an_agent_leaves_behind_at_its_own_end_is_ended_and_holds_nothing_up(rig: Rig) -> None:
    """Fault 29, failures 36 and 45: daemons that hold its output open and ignore TERM."""
    rig.config["max_concurrent_tasks"] = 1
    rig.config["stop_grace"] = "300ms"
    worker = rig.start()
    daemon = "setsid sh -c 'trap \"\" TERM; echo $$ >> $HOME/pids; while :; do sleep 1; done' &"
    task = rig.submit(f"({daemon}); ({daemon}); until [ $(wc -l < $HOME/pids) = 2 ]; do sleep 0.05; done; exit 3")
    rig.plane.wait_acknowledged(task)
    assert task.terminal.exit_code == 3
    assert not [pid for pid in (rig.place / "pids").read_text().split() if running(int(pid))]
    following = rig.submit("exit 0")
    rig.plane.wait_acknowledged(following)
    assert worker.stop() == 0
    rig.audit()


def test_a_storm_of_forks_is_ended_by_a_cancel(rig: Rig) -> None:
    """Fault 30: new processes come while the sweep looks."""
    rig.config["stop_grace"] = "200ms"
    worker = rig.start()
    fork = "while :; do (setsid sleep 1000 &); sleep 0.02; done"
    task = rig.submit(f"trap '' TERM; {fork} & {fork} & echo up > $HOME/up; {fork}")
    until((rig.place / "up").exists, "the agent")
    until(lambda: len(rig.unit_processes()) > 20, "the storm")
    rig.plane.cancel(task)
    rig.plane.wait_for(lambda: task.closed, SAFETY, "execution_closed")
    assert task.state == "cancelled"
    assert worker.stop() == 0
    rig.audit()


# -- the agent's program (31)


@pytest.mark.parametrize("how", ["missing", "not executable"])
def test_an_agent_that_cannot_be_run_is_found_at_the_start(rig: Rig, how: str) -> None:
    """Fault 31, failure 43."""
    program = rig.place / "oz"
    if how == "not executable":
        program.write_text("#!/bin/sh\n")
    direct(rig, oz_path=str(program))
    worker = rig.start(connected=False)
    assert worker.exit_code() == 3
    assert str(program) in worker.log
    rig.audit()


def test_an_agent_that_vanishes_is_no_task_s_fault(rig: Rig) -> None:
    """Fault 31: refused while it is gone, taken when it is back."""
    program = rig.place / "oz"
    shutil.copy(FAKE_OZ, program)
    direct(rig, oz_path=str(program))
    worker = rig.start()
    program.rename(rig.place / "away")
    task = rig.submit("exit 0")
    rig.plane.wait_for(lambda: task.state == "rejected", SAFETY, "the refusal")
    assert task.frames("task_rejected")[0].reason == "backend unavailable"
    (rig.place / "away").rename(program)
    rig.plane.redeliver(task)
    rig.plane.wait_acknowledged(task)
    assert task.state == "completed"
    assert worker.stop() == 0
    rig.audit()


FAILING = [
    ("#!/no/such/interpreter\n", 127, "interpreter"),
    ("#!/bin/sh\necho 'error: unexpected argument' >&2; exit 2\n", 2, "unexpected argument"),
    ("#!/bin/sh\nkill -KILL $$\n", 137, "SIGKILL"),
    ("#!/bin/sh\nkill -TERM $$\n", 143, "SIGTERM"),
    ("\x7fELF is not what this is", 126, "126"),
]


def test_an_agent_that_fails_by_itself_is_named_by_how(rig: Rig) -> None:
    """Fault 31; a signal that the worker did not send is no shutdown."""
    path = rig.place / "oz"
    shutil.copy(FAKE_OZ, path)
    direct(rig, oz_path=str(path))
    worker = rig.start()
    for program, code, said in FAILING:
        path.write_text(program)
        task = rig.submit()
        rig.plane.wait_acknowledged(task)
        assert (task.terminal.reason, task.terminal.exit_code) == ("agent_invocation", code)
        assert said in task.terminal.message
    assert worker.stop() == 0
    rig.audit()


def test_a_shutdown_is_a_shutdown_whatever_code_the_agent_ends_with(rig: Rig) -> None:
    """Failure 22."""
    worker = rig.start()
    script = "trap 'exit {0}' TERM; echo up > $HOME/up-{0}; while :; do sleep 0.05; done"
    tasks = [rig.submit(script.format(code)) for code in (0, 7, 143)]
    until(lambda: len(list(rig.place.glob("up-*"))) == 3, "the agents")
    assert worker.stop() == 0
    assert {task.terminal.reason for task in tasks} == {"graceful_shutdown"}
    rig.audit()


# -- workspaces (32)


def test_removal_follows_no_link_and_leaves_what_is_not_ours(rig: Rig) -> None:
    """Fault 32, failure 35: links, a directory without rights, foreign files and directories in the root."""
    precious = rig.place / "precious"
    precious.mkdir()
    (precious / "file").write_text("keep")
    rig.workspaces.mkdir()
    (rig.workspaces / "notes.txt").write_text("keep")
    (rig.workspaces / "somebody").mkdir()
    worker = rig.start()
    done = rig.submit(f"ln -s {precious} link; ln -s {precious}/file f; mkdir -p a/b; touch a/b/c; chmod 0 a/b a")
    ended = rig.submit(f"ln -s {precious} link; echo up > $HOME/up; sleep 1000")
    rig.plane.wait_acknowledged(done)
    until((rig.place / "up").exists, "the agent")
    assert worker.stop() == 0
    assert ended.ended
    assert (precious / "file").read_text() == "keep"
    assert sorted(path.name for path in rig.workspaces.iterdir()) == [".oz-worker", "notes.txt", "somebody"]
    rig.audit(workspaces=False)


def test_what_cannot_be_removed_is_named_and_removed_when_it_can_be(rig: Rig) -> None:
    """Fault 32: a mount inside, whose other side is left alone."""
    precious = rig.place / "precious"
    precious.mkdir()
    (precious / "file").write_text("keep")
    worker = rig.start(odd="upkeep", env=SERVED)
    task = rig.submit(f"mkdir inside && mount --bind {precious} inside || echo no > $HOME/no-mount")
    rig.plane.wait_acknowledged(task)
    if (rig.place / "no-mount").exists():
        worker.kill()
        pytest.skip("mounting needs root")
    worker.wait_log("clean-up: .*inside")
    sees(worker, 'oz_worker_task_failures_total{phase="cleanup",reason="cleanup"}')
    (workspace,) = (path for path in rig.workspaces.iterdir() if path.name != ".oz-worker")
    assert subprocess.run(["umount", str(workspace / "inside")], check=False).returncode == 0
    until(lambda: not workspace.exists(), "the second try")
    worker.wait_log("removed what had been kept")
    assert worker.stop() == 0
    assert (precious / "file").read_text() == "keep"
    rig.audit()


def test_a_workspace_that_cannot_be_made_is_the_report_and_not_a_crash(rig: Rig) -> None:
    """Fault 32: a root without inodes."""
    rig.workspaces.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=3", "tmpfs", str(rig.workspaces)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    try:
        worker = rig.start()
        task = rig.submit("exit 0")
        rig.plane.wait_acknowledged(task)
        assert task.terminal.reason == "workspace_setup"
        assert "inodes" in task.terminal.message
        assert worker.stop() == 0
    finally:
        rig.close()
        subprocess.run(["umount", "-l", str(rig.workspaces)], check=True)
    rig.audit()


def test_a_workspace_root_that_is_a_file_is_exit_3(rig: Rig) -> None:
    rig.workspaces.write_text("")
    worker = rig.start(connected=False)
    assert worker.exit_code() == 3
    assert f"workspace_root {rig.workspaces} is not a directory" in worker.log
    rig.workspaces.unlink()
    rig.audit()


def test_no_id_leads_out_of_the_workspace_root(rig: Rig) -> None:
    """Failure 16."""
    worker = rig.start()
    script = 'test "$(dirname "$PWD")" = "$HOME/workspaces"'
    odd = [rig.submit(script, task_id=task_id) for task_id in ("a b;$(touch x)'\"", "ü" * 300, ".hidden")]
    hostile = [rig.submit(script, task_id=task_id) for task_id in ("../../../escape", "..", "/etc")]
    rig.plane.wait_acknowledged(*odd, *hostile)
    assert {task.state for task in odd} == {"completed"}
    assert {(task.state, task.terminal.reason) for task in hostile} == {("failed", "workspace_setup")}
    assert worker.stop() == 0
    rig.audit()


def test_one_task_of_two_executions_has_two_workspaces(rig: Rig) -> None:
    """Failure 17."""
    worker = rig.start()
    tasks = [rig.submit(f"pwd >> $HOME/places; {WAIT}", task_id="t", execution_id=e) for e in ("e1", "e2")]
    until(lambda: (rig.place / "places").exists() and len(set(_places(rig))) == 2, "two places")
    rig.plane.cancel("t", "e1")
    rig.plane.wait_for(lambda: tasks[0].closed, SAFETY, "the end of the first")
    assert not tasks[1].ended
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(*tasks)
    assert [task.state for task in tasks] == ["cancelled", "completed"]
    assert worker.stop() == 0
    rig.audit()


def _places(rig: Rig) -> list[str]:
    return (rig.place / "places").read_text().split()


def test_the_output_of_tasks_side_by_side_is_kept_apart(rig: Rig) -> None:
    """Failure 42."""
    worker = rig.start()
    lines = "n=0; while [ $n -lt 50 ]; do echo $TASK_ID; n=$((n+1)); done"
    tasks = [rig.submit(f"{WAIT}; {lines}", task_id=f"t{number}") for number in range(4)]
    rig.plane.wait_for(lambda: all(task.claimed for task in tasks), SAFETY)
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(*tasks)
    assert worker.stop() == 0
    for task in tasks:
        kept = rig.run_command("logs", task.task_id, "--state-dir", str(rig.state_dir))
        assert kept.stdout == f"{task.task_id}\n" * 50
    rig.audit()


# -- hooks (33)


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("sleep 1000", 143, "setup_timeout"),
        ("yes flood | head -c 3000000; exit 4", 4, "flood"),
        ("kill -9 $PPID; sleep 1000", None, "killed"),
        ("echo 'A=$(oops' > $OZ_ENVIRONMENT_FILE; echo \"B='open\" >> $OZ_ENVIRONMENT_FILE", None, ":2:"),
    ],
)
def test_a_setup_that_fails_is_reported_as_that_and_torn_down(
    rig: Rig, command: str, code: int | None, said: str
) -> None:
    """Fault 33, failures 21, 23, 37, 39 and 41: never as the task's own timeout."""
    limit = "500ms" if said == "setup_timeout" else "1m"
    direct(rig, setup_command=command, setup_timeout=limit, teardown_command="echo down >> $HOME/down")
    worker = rig.start()
    task = rig.submit("echo agent > $HOME/agent")
    rig.plane.wait_acknowledged(task)
    assert (task.terminal.reason, task.terminal.exit_code) == ("setup_command", code)
    assert said in task.terminal.message
    assert not (rig.place / "agent").exists()
    assert worker.stop() == 0
    assert (rig.place / "down").read_text() == "down\n"
    rig.audit()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("sleep 1000", "teardown_timeout"),
        ("setsid sleep 1000 & setsid sh -c 'trap \"\" TERM; sleep 1000' & exit 8", "exit code 8"),
    ],
)
def test_a_teardown_that_fails_changes_no_report_and_leaves_nothing(rig: Rig, command: str, said: str) -> None:
    """Fault 33, failure 39."""
    direct(rig, teardown_command=command, teardown_timeout="500ms" if said == "teardown_timeout" else "1m")
    rig.config["stop_grace"] = "200ms"
    worker = rig.start()
    task = rig.submit("exit 0")
    rig.plane.wait_acknowledged(task)
    assert task.state == "completed"
    worker.wait_log(f"teardown: .*{said}")
    assert worker.stop() == 0
    rig.audit()


def test_the_teardown_runs_after_every_end(rig: Rig) -> None:
    """Failures 37 and 39: after success, failure, deadline, cancel and a stop of the worker."""
    direct(rig, teardown_command='echo "$OZ_RUN_ID" >> $HOME/down')
    worker = rig.start()
    by_themselves = [rig.submit("exit 0", task_id="success"), rig.submit("exit 1", task_id="failure")]
    cancelled = rig.submit("echo up > $HOME/up; sleep 1000", task_id="cancel")
    until((rig.place / "up").exists, "the agent")
    rig.plane.cancel(cancelled)
    rig.plane.wait_acknowledged(cancelled, *by_themselves)
    stopped = rig.submit("echo up > $HOME/up-2; sleep 1000", task_id="stop")
    until((rig.place / "up-2").exists, "the agent")
    assert worker.stop() == 0
    assert stopped.acknowledged
    rig.config["task_timeout"] = "1s"  # long enough for its workspace to be made
    worker = rig.start()
    late = rig.submit("sleep 1000", task_id="late")
    rig.plane.wait_acknowledged(late)
    assert late.terminal.reason == "task_timeout"
    assert worker.stop() == 0
    assert sorted((rig.place / "down").read_text().split()) == ["cancel", "failure", "late", "stop", "success"]
    rig.audit()


def test_what_a_setup_leaves_running_serves_the_agent_and_ends_with_it(rig: Rig) -> None:
    """Fault 33: a setup may start a server for its task."""
    direct(rig, setup_command="setsid sleep 1000 & echo $! > $HOME/server; echo SERVER=$! > $OZ_ENVIRONMENT_FILE")
    worker = rig.start()
    task = rig.submit("kill -0 $SERVER || exit 3")
    rig.plane.wait_acknowledged(task)
    assert task.state == "completed"
    assert not running(int((rig.place / "server").read_text()))
    assert worker.stop() == 0
    rig.audit()


def test_no_child_sees_the_worker_s_key_and_each_sees_what_it_is_promised(rig: Rig) -> None:
    """Failures 40, 41 and 43: key, proxies, configured variables, the environment file."""
    dump = 'env > $HOME/env-{}; test -z "$OZ_ENVIRONMENT_FILE" || echo \'FROM_FILE="x y"\' > $OZ_ENVIRONMENT_FILE'
    direct(
        rig,
        setup_command=dump.format("setup"),
        teardown_command=dump.format("teardown"),
        environment=[{"name": "CONFIGURED", "value": "a,b"}],
    )
    rig.own_files |= {"env-setup", "env-agent", "env-teardown"}
    worker = rig.start(env={"https_proxy": "http://127.0.0.1:9", "NO_PROXY": "a,b", "UNASKED": "1"})
    task = rig.submit("env > $HOME/env-agent; ls -A > $HOME/seen")
    rig.plane.wait_acknowledged(task)
    assert task.state == "completed"
    assert worker.stop() == 0
    seen = {name: (rig.place / f"env-{name}").read_text() for name in ("setup", "agent", "teardown")}
    for text in seen.values():
        assert rig.plane.key not in text
        assert "CONFIGURED=a,b\n" in text
        assert f"HOME={rig.place}\n" in text
    assert f"WARP_API_KEY={task.secret}\n" in seen["agent"]
    assert "https_proxy=http://127.0.0.1:9\n" in seen["agent"]
    assert "NO_PROXY=a,b\n" in seen["agent"]
    assert "FROM_FILE=x y\n" in seen["agent"]
    assert "UNASKED" not in seen["agent"]
    assert "OZ_ENVIRONMENT_FILE" not in seen["agent"]
    assert (rig.place / "seen").read_text() == "", "nothing of ours lies in the agent's directory"
    assert task.secret not in seen["teardown"]
    rig.audit()


def test_an_agent_that_floods_its_output_costs_a_bounded_file_and_a_short_report(rig: Rig) -> None:
    """Fault 44 on the host: one endless line, NULs, bytes that are no text."""
    rig.config["task_log_max"] = "256KiB"
    worker = rig.start()
    flood = "head -c 3000000 /dev/zero; head -c 3000000 /dev/urandom; echo up > $HOME/up"
    task = rig.submit(f"{flood}; {WAIT}; printf '\\033[31mlast\\n'; exit 3")
    until((rig.place / "up").exists, "the flood")
    (raw,) = rig.instance_dirs()[0].glob("units/*/output.log")
    until(lambda: raw.stat().st_size < 600_000, "the sweep")
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(task)
    assert task.terminal.exit_code == 3
    assert "last" in task.terminal.message
    assert len(task.terminal.message.encode()) <= 4096
    assert worker.stop() == 0
    assert sum(path.stat().st_size for path in rig.instance_dirs()[0].glob("logs/*")) < 600_000
    rig.audit()


def test_a_signal_to_one_agent_s_group_reaches_no_other(rig: Rig) -> None:
    """The agent is a session of its own: `kill 0` in it ends neither the worker nor its neighbour."""
    worker = rig.start()
    other = rig.submit(f"echo up > $HOME/up; {WAIT}")
    until((rig.place / "up").exists, "the neighbour")
    task = rig.submit("kill -TERM 0; sleep 1000")
    rig.plane.wait_acknowledged(task)
    assert task.terminal.exit_code == 128 + signal.SIGTERM
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(other)
    assert other.state == "completed"
    assert worker.stop() == 0
    rig.audit()
