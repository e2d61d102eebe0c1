"""The fixtures of all tests with container engines; each says in one line why it cannot be had, and the cure."""

from __future__ import annotations

import os
from typing import Iterator, Protocol

import pytest

from tests.engines.client import Client, find_program
from tests.engines.docker import Engine
from tests.engines.images import Images, busybox_is_static, load_images


class OwnEngine(Protocol):
    """Makes an engine that the test may stop, kill and freeze; takes what `Engine` takes."""

    def __call__(self, *flags: str, **options: object) -> Engine: ...


def _need(packages: dict[str, bool], what: str, instead: str = "") -> None:
    """Skip unless every package is there and this is root."""
    missing = [name for name, there in packages.items() if not there]
    cures = [f"install {' '.join(missing)}"] if missing else []
    if os.geteuid():
        cures.append("run as root")
    if cures:
        pytest.skip(f"{what}: {', '.join(cures)}{instead}")


def _need_docker(instead: str = "") -> None:
    programs = all(find_program(name) for name in ("docker", "dockerd", "unshare", "mount"))
    _need({"docker.io": programs, "busybox-static": busybox_is_static()}, "no container engine", instead)


@pytest.fixture(scope="session")
def engine() -> Iterator[Client]:
    """One engine for all tests of a process, left as it was found: that of OZ_TEST_DOCKER_HOST, else a private one."""
    if host := os.environ.get("OZ_TEST_DOCKER_HOST", ""):
        _need_client()
        yield Client(find_program("docker"), {"DOCKER_HOST": host}, f"DOCKER_HOST={host}")
        return
    _need_docker(" or set OZ_TEST_DOCKER_HOST")
    own = Engine()
    try:
        yield own
    finally:
        own.close()


def _need_client() -> None:
    if not find_program("docker") or not busybox_is_static():
        pytest.skip("no client for the engine of OZ_TEST_DOCKER_HOST: install docker.io busybox-static")


@pytest.fixture(scope="session")
def images(engine: Client) -> Iterator[Images]:
    """The task image and the sidecar image, loaded into `engine`."""
    found = load_images(engine, f"p{os.getpid()}")
    yield found
    engine.cli("rmi", "--force", *found, check=False)


@pytest.fixture
def own_engine() -> Iterator[OwnEngine]:
    """Makes engines of the test's own, which end with it. Load images with `load_images(engine)`."""
    _need_docker()
    made: list[Engine] = []

    def make(*flags: str, **options: object) -> Engine:
        made.append(Engine(*flags, **options))  # type: ignore[arg-type]
        return made[-1]

    try:
        yield make
    finally:
        for one in made:
            one.close()
