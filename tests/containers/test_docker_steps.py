"""kill -9 of the worker, and a cancel, at each single step of a task's life in a container; one table."""

from __future__ import annotations

import os
from typing import Iterator, NamedTuple, Optional

import pytest

from oz_worker.devplane.tasks import Task
from tests.containers.conftest import DockerRig
from tests.engines.bad_registry import BadRegistry, Fault
from tests.engines.client import Client
from tests.engines.images import agent_files, load_image
from tests.engines.registry import Registry
from tests.rig import SAFETY, Worker, until

AGENT = "trap 'exit 9' TERM; echo run >> $HOME/runs; while [ ! -e $HOME/go ]; do sleep 0.05; done; exit 7"
LAYER = 1 << 16
Report = tuple[str, str, Optional[int]]  # state, reason, exit code
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
    deaf: bool = False
    """Whether what is held is how the worker would hear of the end, be it by an event or by a list."""


REMOVAL = '"container rm --force --volumes "[0-9a-f]*'
STEPS = [
    Step("a pull is under way", "", needs="pull"),
    Step("a pull has ended", "pull*", "after", needs="pull"),
    Step("a volume is going to be filled", "cp*", needs="fill"),
    Step("a volume is marked", "create*oz-sidecar-*", "after", needs="fill"),
    Step("all is ready", '"image inspect"*', "after"),
    Step("a container is going to be made", "run*", "before", NOT_KNOWN),
    Step("a container is made", "run*", "half"),
    Step("a container is started", "run*", "after", ENDED),
    Step("an agent runs", "", killed=ENDED, by="itself"),
    Step("TERM is sent", "kill*", "after", CANCELLED, by="cancel", waits=True),
    Step("an end is not heard of yet", '"container inspect"*', "before", ENDED, by="go", deaf=True),
    Step("an output is going to be read", "logs*", "before", ENDED, by="go", waits=True),
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


class Pause:
    """A worker's place in which a task is held at *step*; what the step needs is not there, the rest is."""

    def __init__(self, rig: DockerRig, step: Step, registry: BadRegistry | None) -> None:
        self.rig = rig
        self._step = step
        self._registry = registry
        self._turnstile = rig.hold(step.call, step.when, armed=not step.deaf) if step.call else None
        if registry and not step.call:
            registry.fault = Fault(stall_at=LAYER // 2)

    def lead(self, task: Task) -> None:
        """Bring *task* there."""
        if self._step.by:
            self.rig.written("runs")
        if self._turnstile:
            self._turnstile.arm()
        if self._step.by == "cancel":
            self.rig.plane.cancel(task)
        elif self._step.by == "go":
            (self.rig.place / "go").touch()
        if self._turnstile:
            self._turnstile.reached()
            if self._step.deaf:
                until(lambda: self.rig.containers("status=exited"), "the end of the container")
        elif self._registry:
            until(lambda: self._registry and self._registry.count("blobs") > 1, "the layer on its way")

    def kill(self) -> Worker:
        """Kill the worker; the next one, with whom the task may go on."""
        self.rig.workers[-1].kill()
        worker = self.rig.start()
        (self.rig.place / "go").touch()
        return worker

    def cancel(self, task: Task) -> None:
        """Cancel *task*."""
        self.rig.plane.cancel(task)
        if self._step.waits:
            until(lambda: self.rig.query("SELECT 1 FROM tasks WHERE cause = 'cancel'"), "the cancel in the database")
            self.release()

    def release(self) -> None:
        """Let go on what is still held."""
        if self._turnstile:
            self._turnstile.release()

    def runs(self) -> int:
        """How often the agent has begun."""
        path = self.rig.place / "runs"
        return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture
def pause(docker_rig: DockerRig, step: Step, request: pytest.FixtureRequest) -> Iterator[Pause]:
    registry: BadRegistry | None = None
    if step.needs != "fill":
        docker_rig.docker.update(sidecar_image="", default_image=request.getfixturevalue("with_agent"))
    if step.needs == "pull":
        registry = request.getfixturevalue("bad_registry")
        assert registry
        image = registry.reference(request.getfixturevalue("published"))
        docker_rig.docker.update(default_image=image, image_pull_policy="IfNotPresent")
    yield Pause(docker_rig, step, registry)
    if registry:
        docker_rig.engine.cli("rmi", "--force", image, check=False)


@pytest.mark.parametrize("then", ["kill", "cancel"])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_at_each_step(pause: Pause, step: Step, then: str) -> None:
    rig = pause.rig
    worker = rig.start()
    task = rig.submit(AGENT)
    pause.lead(task)
    if then == "kill":
        worker = pause.kill()
    else:
        pause.cancel(task)
    rig.plane.wait_acknowledged(task, timeout=SAFETY)
    report = (task.state, task.terminal.reason, task.terminal.exit_code)
    assert report == (step.killed if then == "kill" else step.cancelled)
    if then == "cancel" or step.by == "cancel":
        rig.plane.wait_for(lambda: task.closed, SAFETY, "execution_closed")
    pause.release()
    rig.tidied()
    assert pause.runs() in possible_runs(step, then)
    assert worker.stop() == 0
    rig.audit()


def possible_runs(step: Step, then: str) -> list[int]:
    """How often the agent may have begun; one that is cancelled at its start may have come that far, or not."""
    if step.killed != ENDED and not step.by:
        return [0]
    return [1] if step.by or then == "kill" else [0, 1]
