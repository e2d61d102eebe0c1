"""Fixtures of the tests of container backends."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Iterator

import pytest

from oz_worker.devplane.server import ControlPlane
from tests.containers.depot import Depot
from tests.containers.docker_site import DockerSite
from tests.containers.turnstile import Turnstile
from tests.engines.census import audit_back_to, census
from tests.engines.client import Client
from tests.engines.images import Images, load_images
from tests.rig import Rig, until


@pytest.fixture
def site(tmp_path: Path, engine: Client, images: Images) -> Iterator[DockerSite]:
    """A docker backend over the engine of the session; at its end the base count must hold."""
    site = DockerSite(tmp_path, engine, images)
    yield site
    site.close()


class DockerRig(Rig):
    """A place for a worker with the docker backend. Agents see the place under its own path, as their HOME."""

    def __init__(self, place: Path, plane: ControlPlane, engine: Client, images: Images) -> None:
        super().__init__(place, plane)
        self.engine = engine
        self.before = census(engine)
        self.env.update(engine.env)
        self.worker_id = f"rig-{os.urandom(4).hex()}"
        self.config["worker_id"] = self.worker_id
        self.docker = {
            "default_image": images.task,
            "sidecar_image": images.sidecar,
            "image_pull_policy": "Never",
            "network": "none",
            "volumes": [f"{place}:{place}"],
        }
        self.config["backend"] = {"docker": self.docker}
        self.turnstiles: list[Turnstile] = []
        self._audited = False  # then the engine is as it was

    def hold(self, call: str, when: str = "before", *, armed: bool = True) -> Turnstile:
        """Workers started from now on use the engine through a turnstile for *call*."""
        place = self.place / f"turnstile-{len(self.turnstiles)}"
        turnstile = Turnstile(place, self.engine.program, call, when, armed=armed)
        self.turnstiles.append(turnstile)
        self.docker["engine_path"] = str(turnstile.program)
        return turnstile

    def in_front(self, body: str) -> None:
        """Workers started from now on use a program that runs *body* in sh first; `$HERE` is a directory of its own."""
        place = self.place / f"in-front-{len(list(self.place.glob('in-front-*')))}"
        place.mkdir()
        program = place / "docker"
        program.write_text(f'#!/bin/sh\nHERE={place}\n{body}\nexec {self.engine.program} "$@"\n')
        program.chmod(0o755)
        self.docker["engine_path"] = str(program)

    def submit(self, script: str = "", **more: Any) -> Any:
        """Like `Rig.submit`."""
        return super().submit(script, env_vars={"HOME": str(self.place), **more.pop("env_vars", {})}, **more)

    def containers(self, *filters: str) -> list[str]:
        """The names of this worker's task containers."""
        chosen = [f"label=oz-worker.worker={self.worker_id}", "label=oz-worker.role=task", *filters]
        words = [word for one in chosen for word in ("--filter", one)]
        return self.engine.read("ps", "--all", "--format", "{{.Names}}", *words).split()

    def running(self, count: int) -> list[str]:
        """Block until so many task containers run, by the engine's word: it says so later than their agents do."""
        until(lambda: len(self.containers("status=running")) == count, f"{count} running containers")
        return self.containers("status=running")

    def tidied(self) -> None:
        """Block until the worker has put away what it was making: it has one process, the stream of events."""
        mine = f"label=oz-worker.worker={self.worker_id}"

        def tidy() -> bool:
            made = self.engine.ids("ps", "--all", "--quiet", "--filter", mine, "--filter", "label=oz-worker.role=fill")
            bare = self.engine.ids("volume", "ls", "--quiet", "--filter", mine, "--filter", "dangling=true")
            return not made and not bare and len(self.unit_processes()) == 1

        until(tidy, "the end of every filling, removal and process of the worker's")

    def written(self, name: str) -> str:
        """Block until an agent has written a file; its text."""
        path = self.place / name
        until(lambda: path.exists() and path.read_text().endswith("\n"), f"the agent's file {name}")
        return path.read_text()

    def close(self) -> None:
        """End what a failed test left, and what every worker leaves: sidecars for the next task."""
        super().close()
        for turnstile in self.turnstiles:
            turnstile.close()
        if not self._audited:
            self.engine.remove("--filter", f"label=oz-worker.worker={self.worker_id}")

    def audit(self, *, workspaces: bool = True, traceback: bool = False) -> None:
        """Also: no container of a task is left, and nothing at all but filled sidecars."""
        super().audit(workspaces=workspaces, traceback=traceback)
        assert self.containers() == []
        self.close()
        audit_back_to(self.engine, self.before)
        self._audited = True


@pytest.fixture
def docker_rig(tmp_path: Path, engine: Client, images: Images) -> Iterator[DockerRig]:
    """A worker's place over the engine of the session."""
    with ControlPlane() as plane:
        rig = DockerRig(tmp_path, plane, engine, images)
        try:
            yield rig
        finally:
            rig.close()


@pytest.fixture
def depot(tmp_path: Path, engine: Client, images: Images) -> Iterator[Depot]:
    """Sidecars over the Docker Engine of the session; at its end the base count must hold."""
    depot = Depot(tmp_path, engine, images.task)
    yield depot
    depot.close()


@pytest.fixture(params=["docker", "podman"])
def any_depot(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Depot]:
    """The same over each kind of engine."""
    if request.param == "podman":
        podman: Client = request.getfixturevalue("podman")
        depot = Depot(tmp_path, podman, load_images(podman).task)
    else:
        depot = Depot(tmp_path, request.getfixturevalue("engine"), request.getfixturevalue("images").task)
    yield depot
    depot.close()
