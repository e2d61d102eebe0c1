"""A worker whose engine goes away and comes back while its tasks run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Iterator

import pytest

from oz_worker.devplane.server import ControlPlane
from oz_worker.devplane.wire import REJECTED
from tests.containers.conftest import DockerRig
from tests.containers.turnstile import Turnstile
from tests.engines.client import find_program
from tests.engines.docker import Engine
from tests.engines.fixtures import OwnEngine
from tests.engines.images import load_images
from tests.rig import SAFETY, until

LIMIT = 1.0
WAITS = "while [ ! -e $HOME/go ]; do sleep 0.05; done; exit 7"


@pytest.fixture
def flags() -> tuple[str, ...]:
    """What dockerd is told besides."""
    return ()


class OutageRig(DockerRig):
    """A place for a worker over an engine of the test's own."""

    engine: Engine


@pytest.fixture
def outage(tmp_path: Path, own_engine: OwnEngine, flags: tuple[str, ...]) -> Iterator[OutageRig]:
    engine = own_engine(*flags)
    with ControlPlane() as plane:
        rig = OutageRig(tmp_path, plane, engine, load_images(engine))
        rig.docker.update(command_timeout="2s", engine_down_timeout=f"{LIMIT}s")
        try:
            yield rig
        finally:
            rig.close()


def test_beyond_the_limit_the_task_fails_and_its_slot_waits_for_the_proof(outage: OutageRig) -> None:
    rig = outage
    rig.config["max_concurrent_tasks"] = 2
    killing = rig.hold("kill*")
    worker = rig.start()
    task = rig.submit(f"trap '' TERM; echo up > $HOME/up; {WAITS}")
    rig.written("up")
    worker.wait_log("running, output")  # a dockerd that does not know so yet would take its containers along
    gone_at = time.monotonic()
    rig.engine.stop()
    worker.wait_log("the engine does not answer")
    refused = rig.submit("exit 0", requeue=False)
    rig.plane.wait_for(lambda: refused.state == "rejected", SAFETY, "a rejection")
    assert refused.frames(REJECTED)[0].reason == "backend unavailable"
    rig.plane.wait_acknowledged(task, timeout=SAFETY)
    assert task.ended_at is not None
    assert task.ended_at - gone_at >= LIMIT
    assert task.terminal.reason == "container_wait"
    assert f"has not answered for {LIMIT:g}s" in task.terminal.message
    assert "raise backend.docker.engine_down_timeout" in task.terminal.message
    assert "Not confirmed gone: container oz-" in task.terminal.message
    rig.engine.start_again()
    killing.reached()
    until(lambda: "the engine answers again" in worker.log, "the engine's return")
    other = rig.submit(f"echo up > $HOME/other; {WAITS}")
    rig.written("other")
    third = rig.submit("exit 5", requeue=False)
    rig.plane.wait_for(lambda: third.state == "rejected", SAFETY, "a rejection")
    assert third.frames(REJECTED)[0].reason == "worker at maximum concurrency"
    assert len(rig.containers("status=running")) == 2
    killing.release()
    worker.wait_log("everything is gone now")
    rig.plane.redeliver(third)
    rig.plane.wait_acknowledged(third, timeout=SAFETY)
    assert third.terminal.exit_code == 5
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(other, timeout=SAFETY)
    until(lambda: rig.containers() == [], "the removal of every container")
    assert worker.stop() == 0
    rig.audit()


@pytest.mark.parametrize("flags", [("--live-restore=false",)])
@pytest.mark.parametrize("how", ["stop", "kill"])
def test_without_live_restore_an_engine_takes_its_tasks_along_and_their_codes_are_reported(
    outage: OutageRig, how: str
) -> None:
    rig = outage
    rig.docker["engine_down_timeout"] = "1m"
    worker = rig.start()
    task = rig.submit("trap 'echo bye; exit 9' TERM; echo run >> $HOME/runs; while :; do sleep 0.05; done")
    rig.written("runs")
    worker.wait_log("running, output")
    getattr(rig.engine, how)()
    rig.engine.start_again()
    rig.plane.wait_acknowledged(task, timeout=SAFETY)
    assert (task.terminal.reason, task.terminal.exit_code) == ("container_exit", 9)
    assert task.terminal.message == "The agent ended with exit code 9; its last output says why.\nLast output:\nbye"
    assert (rig.place / "runs").read_text() == "run\n"
    until(lambda: rig.containers() == [], "the removal of its container")
    assert worker.stop() == 0
    rig.audit()


def test_an_engine_that_dies_while_it_starts_an_agent_does_not_run_it_twice(
    tmp_path: Path, own_engine: OwnEngine
) -> None:
    (tmp_path / "place").mkdir()
    starting = Turnstile(tmp_path / "runtime", find_program("runc"), '*" start "*', "after")
    engine = own_engine(f"--add-runtime=held={starting.program}", "--default-runtime=held")
    with ControlPlane() as plane:
        rig = OutageRig(tmp_path / "place", plane, engine, load_images(engine))
        worker = rig.start()
        task = rig.submit(f"echo run >> $HOME/runs; {WAITS}")
        rig.written("runs")
        starting.reached()
        engine.kill()
        starting.release()
        engine.start_again()
        rig.plane.wait_acknowledged(task, timeout=SAFETY)
        assert task.terminal.reason == "container_wait"
        assert "the engine lost it" in task.terminal.message
        assert (rig.place / "runs").read_text() == "run\n"
        assert worker.stop() == 0
        rig.audit()
        starting.close()
