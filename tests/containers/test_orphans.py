"""Containers of workers that are gone for good: taken over once, by one, and only then (rule 3)."""

from __future__ import annotations

import os
import threading
from typing import Iterator

import pytest

from oz_worker.backends.container_owner import Orphans
from oz_worker.containers import Engine
from oz_worker.engine_words import Container
from tests.engines.census import audit_back_to, census
from tests.engines.client import Client
from tests.engines.images import Images

WORKER = f"orphans-{os.getpid()}"


class Ground:
    """Containers with labels, made by hand."""

    def __init__(self, client: Client, image: str) -> None:
        self.client = client
        self.image = image
        self.engine = Engine("docker", client.program, environment=client.env, instance="tests", timeout=60.0)

    def run(self, name: str, **labels: str) -> str:
        """A running container; its id."""
        words = [word for key, value in labels.items() for word in ("--label", f"oz-worker.{key}={value}")]
        return self.client.read("run", "-d", "--network", "none", "--name", name, *words, self.image, "sleep", "1000")

    def task(self, unit: str, owner: str) -> str:
        """A task's container of the instance `dead`."""
        labels = {"worker": WORKER, "instance": "dead", "role": "task", "unit": unit, "task": "t", "execution": "e"}
        return self.run(f"oz-{unit}", **labels, **({"owner": owner} if owner else {}))

    def orphans(self, instance: str, owner: str = "") -> Orphans:
        """What a worker with *instance* would do, without waiting 30 s."""
        labels = {"worker": WORKER, "instance": instance, **({"owner": owner} if owner else {})}
        return Orphans(self.engine, labels, absent_seconds=0.0)

    def listed(self) -> list[Container]:
        return self.engine.containers(f"label=oz-worker.worker={WORKER}")

    def remove(self, *names: str) -> None:
        self.client.cli("rm", "--force", *names)


@pytest.fixture
def ground(engine: Client, images: Images) -> Iterator[Ground]:
    before = census(engine)
    ground = Ground(engine, images.task)
    yield ground
    for name in engine.ids("ps", "--all", "--quiet", "--filter", f"label=oz-worker.worker={WORKER}"):
        engine.cli("rm", "--force", name)
    audit_back_to(engine, before)


def names(containers: list[Container]) -> list[str]:
    return [container.name for container in containers]


def test_a_unit_is_taken_over_only_once_its_owner_is_gone(ground: Ground) -> None:
    owner = ground.run("owner-1")
    ground.task("a" * 16, owner)
    mine = ground.orphans("new")
    assert mine.adopt(ground.listed()) == []
    assert mine.ours(ground.listed()) == []
    ground.client.cli("stop", "--time", "0", "owner-1")
    assert names(mine.adopt(ground.listed())) == ["oz-" + "a" * 16]
    assert names(mine.ours(ground.listed())) == ["oz-" + "a" * 16]
    assert mine.adopt(ground.listed()) == [], "it is ours by now"
    assert ground.orphans("dead").ours(ground.listed()) == [], "who was replaced does not get it back"
    ground.remove("owner-1")


def test_an_owner_that_comes_back_in_time_keeps_its_units(ground: Ground) -> None:
    owner = ground.run("owner-2")
    ground.task("b" * 16, owner)
    mine = ground.orphans("new")
    mine.absent_seconds = 3600.0
    ground.client.cli("stop", "--time", "0", "owner-2")
    assert mine.adopt(ground.listed()) == []
    ground.client.cli("start", "owner-2")
    mine.absent_seconds = 0.0
    assert mine.adopt(ground.listed()) == []
    ground.remove("owner-2")


def test_a_unit_without_an_owner_is_guarded_by_its_lock_and_left_alone(ground: Ground) -> None:
    ground.task("c" * 16, "")
    mine = ground.orphans("new")
    assert mine.adopt(ground.listed()) == []
    assert mine.adopt(ground.listed()) == []


def test_of_many_workers_one_gets_each_unit(ground: Ground) -> None:
    for letter in "def":
        ground.task(letter * 16, "0" * 64)
    workers = [ground.orphans(f"new-{number}") for number in range(4)]
    listed = ground.listed()
    won: list[str] = []

    def adopt(worker: Orphans) -> None:
        won.extend(names(worker.adopt(listed)))

    threads = [threading.Thread(target=adopt, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [f"oz-{letter * 16}" for letter in "def"]
    everybody = [name for worker in workers for name in names(worker.ours(ground.listed()))]
    assert sorted(everybody) == sorted(won)


def test_whoever_adopted_may_be_replaced_too_and_leaves_no_mark_behind(ground: Ground) -> None:
    ground.task("9" * 16, "0" * 64)
    second = ground.orphans("second", owner="1" * 64)
    third = ground.orphans("third")
    assert len(second.adopt(ground.listed())) == 1
    assert names(third.adopt(ground.listed())) == ["oz-" + "9" * 16]
    assert second.ours(ground.listed()) == []
    ground.remove("oz-" + "9" * 16)
    for worker in (second, third):
        worker.adopt(ground.listed())
    assert ground.listed() == []


def test_what_was_won_already_is_won_whoever_asks_next_with_an_older_list(ground: Ground) -> None:
    ground.task("8" * 16, "0" * 64)
    mine, other = ground.orphans("new"), ground.orphans("other")
    listed = ground.listed()
    (unit,) = listed
    assert mine.take(unit, listed)
    assert mine.take(unit, listed), "a task's own start and the look of every minute may come to it at once"
    assert not other.take(unit, listed)
    ground.remove(unit.name)
    mine.adopt(ground.listed())
    assert ground.listed() == []


def test_what_the_engine_won_for_us_after_all_is_taken_at_the_next_look(ground: Ground) -> None:
    ground.task("7" * 16, "0" * 64)
    mine = ground.orphans("new")
    (unit,) = ground.listed()
    assert ground.orphans("new").take(unit, [unit]), "the same instance: its answer never came"
    assert names(mine.adopt(ground.listed())) == [unit.name]
    assert mine.holds(unit, "7" * 16)
    assert mine.adopt(ground.listed()) == []
    ground.remove(unit.name)
    mine.adopt(ground.listed())
    assert ground.listed() == []
