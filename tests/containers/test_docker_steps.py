"""kill -9 of the worker, and a cancel, at each single step of a task's life in a container; one table."""

from __future__ import annotations

import os
from typing import Any, Iterator, NamedTuple

import pytest

from tests.containers.conftest import DockerRig
from tests.engines.bad_registry import BadRegistry, Fault
from tests.engines.client import Client
from tests.engines.images import agent_files, load_image
from tests.engines.registry import Registry
from tests.rig import SAFETY, until

AGENT = "trap 'exit 9' TERM; echo run >> $HOME/runs; while [ ! -e $HOME/go ]; do sleep 0.05; done; exit 7"
LAYER = 1 << 16
Report = tuple[str, str, "int | None"]
NEVER_RAN: Report = ("failed", "unknown", None)
NOT_KNOWN: Report = ("failed", "container_wait", None)
ENDED: Report = ("failed", "container_exit", 7)
CANCELLED: Report = ("cancelled", "", None)


class Step(NamedTuple):
    """Where a task is held: at the first `call` of the engine's program, *before* it, *half* done, or *after* it.

    Without a call its agent runs, or, for `needs` pull, its image is on the way.
    """

    name: str
    call: str
    when: str = "before"
    killed: Report = NEVER_RAN
    """What is reported when the worker is killed there."""
    cancelled: Report = CANCELLED
    """The same, when the task is cancelled there."""
    needs: str = ""
    """What is not there at the beginning: `pull`, its image; `fill`, the volume of its sidecar."""
    by: str = ""
    """What brings the task there once its agent runs: `go`, its own end; `cancel`; `itself`."""
    waits: bool = False
    """Whether a cancel has to wait for what is held."""


REMOVAL = '"container rm --force --volumes "[0-9a-f]*'
STEPS = [
    Step("a pull begins", "pull*", needs="pull"),
    Step("a pull is under way", "", needs="pull"),
    Step("a pull has ended", "pull*", "after", needs="pull"),
    Step("a volume is made", '"volume create"*', "after", needs="fill"),
    Step("a volume is going to be filled", "cp*", needs="fill"),
    Step("a volume is filled", "cp*", "after", needs="fill"),
    Step("a volume is marked", "create*oz-sidecar-*", "after", needs="fill"),
    Step("all is ready", '"image inspect"*', "after"),
    Step("a container is going to be made", "run*", "before", NOT_KNOWN),
    Step("a container is made", "run*", "half"),
    Step("a container is started", "run*", "after", ENDED),
    Step("an agent runs", "", "", ENDED, by="itself"),
    Step("TERM is going to be sent", "kill*", "before", CANCELLED, by="cancel", waits=True),
    Step("TERM is sent", "kill*", "after", CANCELLED, by="cancel", waits=True),
    Step("an end is heard of", '"container inspect"*" oz-"*', "before", ENDED, by="go"),
    Step("an output is going to be read", "logs*", "before", ENDED, by="go", waits=True),
    Step("an output is read", "logs*", "after", ENDED, by="go", waits=True),
    Step("a container is going to be removed", REMOVAL, "before", ENDED, ENDED, by="go"),
    Step("a container is removed", REMOVAL, "after", ENDED, ENDED, by="go"),
]


@pytest.fixture(scope="module")
def with_agent(engine: Client) -> Iterator[str]:
    """An image that has an agent itself."""
    name = load_image(engine, f"oz-test/with-agent:p{os.getpid()}", files=agent_files("agent/"))
    yield name
    engine.cli("rmi", "--force", name)


@pytest.fixture(scope="module")
def published(engine: Client, registry: Registry) -> str:
    """The same in the registry alone."""
    files = {**agent_files("agent/"), "big": (0o644, os.urandom(LAYER))}
    registry.publish(engine, name := f"steps/agent:p{os.getpid()}", files=files)
    return name


@pytest.fixture
def held(docker_rig: DockerRig, request: pytest.FixtureRequest) -> Iterator[DockerRig]:
    """A rig in which what the step needs is not there, and what it does not need is."""
    needs = request.getfixturevalue("step").needs
    if needs == "fill":
        yield docker_rig
        return
    docker_rig.docker.update(sidecar_image="", default_image=request.getfixturevalue("with_agent"))
    if needs != "pull":
        yield docker_rig
        return
    bad: BadRegistry = request.getfixturevalue("bad_registry")
    image = bad.reference(request.getfixturevalue("published"))
    docker_rig.docker.update(default_image=image, image_pull_policy="IfNotPresent")
    if not request.getfixturevalue("step").call:
        bad.fault = Fault(stall_at=LAYER // 2)
    yield docker_rig
    docker_rig.engine.cli("rmi", "--force", image, check=False)


@pytest.mark.parametrize("then", ["kill", "cancel"])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_at_each_step(held: DockerRig, step: Step, then: str, request: pytest.FixtureRequest) -> None:
    rig = held
    turnstile = rig.hold(step.call or "nothing", step.when or "before")
    worker = rig.start()
    task = rig.submit(AGENT)
    if step.by:
        rig.written("runs")
    if step.by == "cancel":
        rig.plane.cancel(task)
    elif step.by == "go":
        (rig.place / "go").touch()
    if step.call:
        turnstile.reached()
    elif step.needs:
        until(lambda: request.getfixturevalue("bad_registry").count("blobs") > 1, "the layer on its way")
    if then == "kill":
        worker.kill()
        worker = rig.start()
        (rig.place / "go").touch()
    else:
        rig.plane.cancel(task)
        if step.waits:
            until(lambda: rig.query("SELECT 1 FROM tasks WHERE cause = 'cancel'"), "the cancel in the database")
            turnstile.release()
    rig.plane.wait_acknowledged(task, timeout=SAFETY)
    expected = step.killed if then == "kill" else step.cancelled
    assert (task.state, task.terminal.reason, task.terminal.exit_code) == expected
    if then == "cancel" or step.by == "cancel":
        rig.plane.wait_for(lambda: task.closed, SAFETY, "execution_closed")
    turnstile.release()
    assert runs_of(rig) in possible_runs(step, then)
    assert worker.stop() == 0
    rig.audit()


def runs_of(rig: DockerRig) -> int:
    """How often the agent began."""
    return len((rig.place / "runs").read_text().splitlines()) if (rig.place / "runs").exists() else 0


def possible_runs(step: Step, then: str) -> list[int]:
    """How often it may have begun: an agent that is cancelled at its start may have come that far, or not."""
    if step.killed is ENDED and not step.by and then == "cancel":
        return [0, 1]
    return [1] if step.by or step.killed is ENDED else [0]
