"""kill -9 of the worker at every point of a unit's life, and what the next worker makes of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Iterator

import pytest

from oz_worker.backends.base import Unit
from oz_worker.backends.direct import Direct
from oz_worker.model import Cause, Reason
from oz_worker.process import environment_of
from tests.audit import guard
from tests.hosting import INSTANCE, PATIENCE, Stage, alive, end_marked, eventually, marked, written


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path)
    yield stage
    stage.close()


@pytest.fixture(params=["auto", "off"])
def cgroup(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Killed:
    """A worker that got as far as *until* (or to whatever *seen* shows) and was killed there."""

    def __init__(self, stage: Stage, until: str, cgroup: str = "off", *, seen: Path | None = None) -> None:
        guard().keep(stage.root, "task-secret", "odd-secret", "mcp-secret")
        guard().in_arguments.add("mcp-secret")  # the one that the command line of the agent wants there
        driver = subprocess.Popen(
            [sys.executable, "-m", "tests.driver", str(stage.root), until],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "CGROUP": cgroup},
        )
        assert driver.stdout is not None
        name = driver.stdout.readline().strip()
        if seen:
            written(seen)
        else:
            assert driver.stdout.readline() == "ready\n"
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        driver.stdout.close()
        self.unit = stage.unit()  # for the stage's cleaning
        assert self.unit.name == name


def taken_up(stage: Stage, backend: Direct, killed: Killed) -> Unit:
    assert [(found.name, found.key) for found in backend.recover()] == [(killed.unit.name, killed.unit.key)]
    unit = stage.again(killed.unit)
    backend.attach(unit)
    return unit


def nothing_left(stage: Stage, backend: Direct, unit: Unit) -> None:
    assert backend.stragglers(unit) == ""
    assert not marked(stage.mark(unit))
    assert backend.clean_up(unit, keep=False) == ""
    assert os.listdir(stage.workspaces) == [".oz-worker"]
    assert os.listdir(stage.instance_dir / "units") == []


def test_a_running_agent_goes_on_and_its_true_code_is_learned(stage: Stage, cgroup: str) -> None:
    stage.agent("echo up >$NOTES/up; while [ ! -e $NOTES/done ]; do sleep 0.02; done; exit 17")
    killed = Killed(stage, "started", cgroup)
    written(stage.root / "up")
    backend = stage.direct(cgroup=cgroup)
    unit = taken_up(stage, backend, killed)
    (stage.root / "done").touch()
    unit.wait_for_end_or_stop(PATIENCE)
    assert unit.facts is not None
    assert (unit.facts.code, unit.facts.reason) == (17, Reason.AGENT_INVOCATION)
    nothing_left(stage, backend, unit)


def test_its_secrets_are_known_again(stage: Stage) -> None:
    stage.agent("echo up >$NOTES/up; exec sleep 60")
    killed = Killed(stage, "started")
    written(stage.root / "up")
    backend = stage.direct()
    unit = taken_up(stage, backend, killed)
    assert unit.secrets is not None
    assert {"task-secret", "odd-secret", "mcp-secret"} <= set(unit.secrets)
    assert os.environ["PATH"] not in unit.secrets
    unit.order_stop(Cause.CANCEL, 10)
    assert backend.stop(unit).remains == ""
    nothing_left(stage, backend, unit)


def test_an_end_while_nobody_watched_keeps_its_code(stage: Stage, cgroup: str) -> None:
    stage.agent("sleep 0.2; echo out; echo up >$NOTES/up; exit 5")
    killed = Killed(stage, "started", cgroup)
    written(stage.root / "up")
    status = stage.instance_dir / "units" / killed.unit.name / "status"
    eventually(lambda: status.read_bytes().startswith(b"5\n"))
    backend = stage.direct(cgroup=cgroup)
    unit = taken_up(stage, backend, killed)
    assert unit.facts is not None
    assert unit.facts.code == 5
    assert unit.secrets is None
    assert backend.tail(unit, 10) == b"out\n"
    nothing_left(stage, backend, unit)


@pytest.mark.parametrize("until", ["prepared", "launched"])
def test_no_handle_proves_no_agent(stage: Stage, until: str) -> None:
    stage.agent("touch $NOTES/ran")
    killed = Killed(stage, until)
    backend = stage.direct()
    unit = taken_up(stage, backend, killed)
    assert unit.facts is not None
    assert (unit.facts.reason, unit.facts.agent_started) == (Reason.UNKNOWN, False)
    assert "run it again" in unit.facts.detail
    nothing_left(stage, backend, unit)
    assert not (stage.root / "ran").exists()


def test_a_death_during_setup_ends_the_setup_and_starts_nothing(stage: Stage, cgroup: str) -> None:
    stage.agent("touch $NOTES/ran")
    (stage.root / "setup").write_text(f"setsid sleep 60 & echo up >{stage.root}/up; sleep 60")
    killed = Killed(stage, "prepared", cgroup, seen=stage.root / "up")
    assert marked(stage.mark(killed.unit))
    backend = stage.direct(cgroup=cgroup)
    unit = taken_up(stage, backend, killed)
    assert unit.facts is not None
    assert (unit.facts.reason, unit.facts.agent_started, unit.facts.remains) == (Reason.UNKNOWN, False, "")
    assert not marked(stage.mark(unit))
    nothing_left(stage, backend, unit)
    assert not (stage.root / "ran").exists()


def test_killed_together_with_its_recorder_is_a_lost_end(stage: Stage) -> None:
    stage.agent("echo up >$NOTES/up; exec sleep 60")
    killed = Killed(stage, "started")
    written(stage.root / "up")
    end_marked(stage.mark(killed.unit))
    backend = stage.direct()
    unit = taken_up(stage, backend, killed)
    assert unit.facts is not None
    assert (unit.facts.reason, unit.facts.code) == (Reason.AGENT_INVOCATION, None)
    assert "killed or the host restarted" in unit.facts.detail
    nothing_left(stage, backend, unit)


def test_a_recorder_that_is_gone_while_its_session_lives_ends_the_session_first(stage: Stage, cgroup: str) -> None:
    stage.agent("echo $PPID >$NOTES/recorder; echo $$ >$NOTES/agent; exec env -i sleep 60")
    killed = Killed(stage, "started", cgroup)
    agent = int(written(stage.root / "agent"))
    os.kill(int(written(stage.root / "recorder")), signal.SIGKILL)
    eventually(lambda: not (environment_of(agent) or {}))
    backend = stage.direct(cgroup=cgroup)
    unit = taken_up(stage, backend, killed)
    unit.wait_for_end_or_stop(PATIENCE)
    assert not alive(agent)
    assert unit.facts is not None
    assert (unit.facts.reason, unit.facts.code) == (Reason.AGENT_INVOCATION, None)
    nothing_left(stage, backend, unit)


def test_a_restart_of_the_host_makes_strangers_of_all_numbers(stage: Stage) -> None:
    stage.agent("exec sleep 60")
    killed = Killed(stage, "started")
    pid = stage.instance_dir / "units" / killed.unit.name / "pid"
    _pid, ticks, _boot, kills = pid.read_text().split()
    end_marked(stage.mark(killed.unit))
    # The same number and even the same ticks, in another boot: whoever has it now is a stranger.
    stranger = subprocess.Popen(["sleep", "60"])
    pid.write_text(f"{stranger.pid} {ticks} another-boot {kills}\n")
    backend = stage.direct()
    unit = taken_up(stage, backend, killed)
    assert unit.facts is not None
    assert unit.facts.code is None
    nothing_left(stage, backend, unit)
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


def test_a_number_that_was_reused_is_not_taken_for_the_agent(stage: Stage) -> None:
    stage.agent("exec sleep 60")
    killed = Killed(stage, "started")
    path = stage.instance_dir / "units" / killed.unit.name / "pid"
    _pid, ticks, boot, kills = path.read_text().split()
    end_marked(stage.mark(killed.unit))
    stranger = subprocess.Popen(["sleep", "60"], start_new_session=True)
    path.write_text(f"{stranger.pid} {ticks} {boot} {kills}\n")
    backend = stage.direct()
    unit = taken_up(stage, backend, killed)
    assert unit.facts is not None
    assert unit.facts.code is None
    nothing_left(stage, backend, unit)
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


def test_a_cancel_after_the_restart_ends_all_of_it(stage: Stage, cgroup: str) -> None:
    stage.agent(
        "trap '' TERM; setsid sh -c 'while :; do sleep 60; done' & echo up >$NOTES/up; while :; do sleep 60; done"
    )
    killed = Killed(stage, "started", cgroup)
    written(stage.root / "up")
    backend = stage.direct(cgroup=cgroup)
    unit = taken_up(stage, backend, killed)
    unit.order_stop(Cause.CANCEL, 0.2)
    facts = backend.stop(unit)
    assert facts.remains == ""
    assert facts.agent_started
    nothing_left(stage, backend, unit)


def test_a_teardown_that_runs_is_waited_for_and_not_run_twice(stage: Stage) -> None:
    backend = stage.direct(
        teardown_command=f"echo ran >>{stage.root}/torn; while [ ! -e {stage.root}/done ]; do sleep 0.02; done; exit 3"
    )
    unit = stage.unit()
    backend.prepare(unit)
    backend.start(unit)
    unit.wait_for_end_or_stop(PATIENCE)
    first: list[str] = []
    thread = threading.Thread(target=lambda: first.append(backend.teardown(unit)))
    thread.start()
    written(stage.root / "torn")
    second = stage.direct(teardown_command="echo twice >>" + str(stage.root / "torn"))
    taken = stage.again(unit)
    second.attach(taken)
    ended: list[str] = []
    other = threading.Thread(target=lambda: ended.append(second.teardown(taken)))
    other.start()
    (stage.root / "done").touch()
    thread.join(PATIENCE)
    other.join(PATIENCE)
    assert "exit code 3" in first[0]
    assert "exit code 3" in ended[0]
    assert (stage.root / "torn").read_text() == "ran\n"


def test_half_made_and_damaged_directories_do_not_stop_the_start(stage: Stage) -> None:
    units = stage.instance_dir / "units"
    (units / "half").mkdir(parents=True)
    (units / "damaged").mkdir()
    (units / "damaged" / "unit.json").write_text("{")
    (units / "listed").mkdir()
    (units / "listed" / "unit.json").write_text('{"task_id": "t", "execution_id": "e"}')
    backend = stage.direct()
    assert [found.name for found in backend.units()] == ["listed"]
    assert (units / "half").exists()  # looking touches nothing
    assert [found.name for found in backend.recover()] == ["listed"]
    assert sorted(os.listdir(units)) == ["damaged", "listed"]


def test_surviving_helpers_of_the_dead_worker_are_ended(stage: Stage) -> None:
    helper = subprocess.Popen(["sleep", "60"], env={**os.environ, "OZ_WORKER_HELPER": INSTANCE})
    stage.direct().recover()
    assert helper.wait(PATIENCE) == -signal.SIGKILL
