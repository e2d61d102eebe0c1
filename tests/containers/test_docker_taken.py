"""A task whose container's name is taken: by a worker that lives, or by one that is gone for good (rule 3)."""

from __future__ import annotations

from typing import Any, Iterator

import pytest

from oz_worker.model import Key, unit_name
from tests.containers.conftest import DockerRig
from tests.rig import SAFETY, until

KEY = Key("task-taken", "exec-taken")
UNIT = unit_name(KEY, 1)
NAME = f"oz-{UNIT}"
ABSENT = "0" * 64
AGAIN = "echo again >> $HOME/runs; exit 5"
WAITS = "echo first >> $HOME/runs; while [ ! -e $HOME/go ]; do sleep 0.05; done; exit 7"


class Taken:
    """A worker's place, and a container with the task's name that an instance before it left."""

    def __init__(self, rig: DockerRig) -> None:
        self.rig = rig
        self.owners: list[str] = []

    def container(self, owner: str, script: str = WAITS) -> None:
        """It runs *script*, and says that *owner* owns it."""
        labels = {"worker": self.rig.worker_id, "instance": "before", "role": "task", "unit": UNIT}
        labels |= {"task": KEY.task_id, "execution": KEY.execution_id, **({"owner": owner} if owner else {})}
        words = [word for name, value in labels.items() for word in ("--label", f"oz-worker.{name}={value}")]
        words += ["--volume", f"{self.rig.place}:{self.rig.place}", "--env", f"HOME={self.rig.place}", "--name", NAME]
        self._run(*words, script=script)
        self.rig.written("runs")

    def owner(self) -> str:
        """A container that lives, as one in which a worker runs; its id."""
        self.owners.append(self._run(script="sleep 1000"))
        return self.owners[-1]

    def _run(self, *words: str, script: str) -> str:
        image = str(self.rig.docker["default_image"])
        return self.rig.engine.read("run", "--detach", "--network", "none", *words, image, "sh", "-c", script)

    def submit(self) -> Any:
        """Assign the task of that name."""
        return self.rig.submit(AGAIN, task_id=KEY.task_id, execution_id=KEY.execution_id)

    def runs(self) -> str:
        return (self.rig.place / "runs").read_text()

    def remove_owners(self) -> None:
        for one in self.owners:
            self.rig.engine.cli("rm", "--force", one)


@pytest.fixture
def taken(docker_rig: DockerRig) -> Iterator[Taken]:
    taken = Taken(docker_rig)
    yield taken
    taken.remove_owners()


def test_what_has_no_owner_at_two_looks_is_the_tasks_own(taken: Taken) -> None:
    rig = taken.rig
    taken.container(ABSENT)
    worker = rig.start(odd="owners")
    task = taken.submit()
    worker.wait_log(f"took over the container {NAME}")
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(task, timeout=SAFETY)
    assert (task.terminal.reason, task.terminal.exit_code) == ("container_exit", 7)
    assert taken.runs() == "first\n"
    until(lambda: rig.containers() == [], "its container removed")
    assert worker.stop() == 0
    rig.audit()


def test_an_engine_that_cannot_say_who_lives_is_asked_again(taken: Taken) -> None:
    rig = taken.rig
    taken.container(ABSENT)
    count = 'echo asked >> "$HERE/asked"; [ $(wc -l < "$HERE/asked") -gt 4 ]'
    refuse = '{ echo "Cannot connect to the Docker daemon" >&2; exit 1; }'
    rig.in_front(f'case "$*" in "container inspect"*{ABSENT}*) {count} || {refuse};; esac')
    worker = rig.start(odd="owners")
    task = taken.submit()
    worker.wait_log(f"took over the container {NAME}")
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(task, timeout=SAFETY)
    assert task.terminal.exit_code == 7
    until(lambda: rig.containers() == [], "its container removed")
    assert worker.stop() == 0
    rig.audit()


def test_an_owner_that_is_back_at_the_second_look_keeps_it(taken: Taken) -> None:
    rig = taken.rig
    owner = taken.owner()
    rig.engine.cli("stop", "--time", "0", owner)
    looks = rig.hold(f'"container inspect"*{owner}*', "after")
    worker = rig.start(odd="owners")
    worker.wait_stacks(r"^upkeep\n.*self\._wake\.wait\(")  # its look at the start is over, the next comes in a minute
    taken.container(owner)
    task = taken.submit()
    looks.reached()
    rig.engine.cli("start", owner)
    looks.release()
    rig.plane.wait_acknowledged(task, timeout=SAFETY)
    assert task.terminal.reason == "container_create"
    assert rig.containers("status=running") == [NAME]
    taken.remove_owners()
    rig.engine.cli("rm", "--force", NAME)
    assert worker.stop() == 0
    rig.audit()


@pytest.mark.parametrize("owned", [True, False], ids=["an owner that lives", "no owner but its lock"])
def test_what_is_somebodys_is_said_and_left_alone(taken: Taken, owned: bool) -> None:
    rig = taken.rig
    owner = taken.owner() if owned else ""
    taken.container(owner)
    worker = rig.start(odd="upkeep")
    task = taken.submit()
    rig.plane.wait_acknowledged(task, timeout=SAFETY)
    assert task.terminal.reason == "container_create"
    whose = f"instance before of worker {rig.worker_id}" + (f", whose own container is {owner[:12]};" if owned else ";")
    assert f"The container {NAME} exists already and belongs to {whose} stop that worker" in task.terminal.message
    assert rig.containers("status=running") == [NAME]
    assert taken.runs() == "first\n"
    taken.remove_owners()
    if owned:
        until(lambda: rig.containers() == [], "the removal of what nobody owns now")
    else:
        rig.engine.cli("rm", "--force", NAME)
    assert worker.stop() == 0
    rig.audit()


def test_a_cancel_does_not_wait_for_the_second_look_and_leaves_it_alone(taken: Taken) -> None:
    rig = taken.rig
    taken.container(ABSENT)
    worker = rig.start()
    task = taken.submit()
    worker.wait_stacks("in _take_over.* in wait_until")
    rig.plane.cancel(task)
    rig.plane.wait_for(lambda: task.closed, SAFETY, "execution_closed")
    assert task.state == "cancelled"
    assert worker.stop() == 0
    assert rig.containers("status=running") == [NAME]
    rig.engine.cli("rm", "--force", NAME)
    rig.audit()
