"""A worker whose engine goes away and comes back while its tasks run."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Iterator, Protocol

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


class OutageRig(DockerRig):
    """A place for a worker over an engine of the test's own."""

    engine: Engine


class MakeOutageRig(Protocol):
    """Makes the rig of a test; *flags* go to its dockerd."""

    def __call__(self, *flags: str) -> OutageRig: ...


@pytest.fixture
def outage(tmp_path: Path, own_engine: OwnEngine) -> Iterator[MakeOutageRig]:
    with ControlPlane() as plane, contextlib.ExitStack() as parts:

        def make(*flags: str) -> OutageRig:
            engine = own_engine(*flags)
            (place := tmp_path / "place").mkdir()
            rig = OutageRig(place, plane, engine, load_images(engine))
            rig.docker["engine_down_timeout"] = "1m"
            parts.callback(rig.close)
            return rig

        yield make


def test_beyond_the_limit_the_task_fails_and_its_slot_waits_for_the_proof(outage: MakeOutageRig) -> None:
    rig = outage()
    rig.docker["engine_down_timeout"] = f"{LIMIT}s"
    rig.config["max_concurrent_tasks"] = 2
    killing = rig.hold("kill*")
    worker = rig.start()
    task = rig.submit(f"trap '' TERM; echo up > $HOME/up; {WAITS}")
    rig.written("up")
    worker.wait_log("running, output")  # a dockerd that does not know so yet would take its containers along
    gone_at = time.monotonic()
    rig.engine.stop()
    worker.wait_log("the docker engine does not answer")
    refused = rig.submit("exit 0", requeue=False)
    rig.plane.wait_for(lambda: refused.state == "rejected", SAFETY, "a rejection")
    assert refused.frames(REJECTED)[0].reason == "backend unavailable"
    until(lambda: "backend: the docker engine does not answer" in rig.explained(), "the engine's silence")
    assert "backend unavailable (the docker engine does not answer" in rig.explained(refused.task_id)
    rig.plane.wait_acknowledged(task, timeout=SAFETY)
    assert task.ended_at is not None
    assert task.ended_at - gone_at >= LIMIT
    assert task.terminal.reason == "container_wait"
    assert f"has not answered for {LIMIT:g}s" in task.terminal.message
    assert "raise backend.docker.engine_down_timeout" in task.terminal.message
    assert "Not confirmed gone: container oz-" in task.terminal.message
    proof = "it waits for the proof that container oz-"
    until(lambda: proof in rig.explained(task.task_id), "what the task waits for")
    rig.engine.start_again()
    killing.reached()
    until(lambda: "the docker engine answers again" in worker.log, "the engine's return")
    other = rig.submit(f"echo up > $HOME/other; {WAITS}")
    rig.written("other")
    third = rig.submit("exit 5", requeue=False)
    rig.plane.wait_for(lambda: third.state == "rejected", SAFETY, "a rejection")
    assert third.frames(REJECTED)[0].reason == "worker at maximum concurrency"
    rig.running(2)
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


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_without_live_restore_an_engine_takes_its_tasks_along_and_their_codes_are_reported(
    outage: MakeOutageRig, how: str
) -> None:
    rig = outage("--live-restore=false")
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
    outage: MakeOutageRig, tmp_path: Path
) -> None:
    starting = Turnstile(tmp_path / "runtime", find_program("runc"), '*" start "*', "after")
    rig = outage(f"--add-runtime=held={starting.program}", "--default-runtime=held")
    worker = rig.start()
    task = rig.submit(f"echo run >> $HOME/runs; {WAITS}")
    rig.written("runs")
    starting.reached()
    rig.engine.freeze()  # what it is told now it will never write down
    starting.release()
    starting.passed()
    rig.engine.kill()
    rig.engine.start_again()
    worker.wait_log("running, output")
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(task, timeout=SAFETY)
    # Most often the engine says "created" of what runs. It may hear of it late: then the agent's end is known.
    assert (task.terminal.reason, task.terminal.exit_code) in (("container_wait", None), ("container_exit", 7))
    assert (rig.place / "runs").read_text() == "run\n"
    assert worker.stop() == 0
    rig.audit()
    starting.close()
