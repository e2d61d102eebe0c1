"""The fixtures of all tests with container engines; each says in one line why it cannot be had, and the cure."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Iterator, Protocol

import pytest

from tests.engines.bad_registry import BadRegistry
from tests.engines.client import Client, find_program
from tests.engines.docker import Engine
from tests.engines.images import Images, busybox_is_static, load_images
from tests.engines.podman import Podman
from tests.engines.registry import Registry


class OwnEngine(Protocol):
    """Makes an engine that the test may stop, kill and freeze; takes what `Engine` takes."""

    def __call__(self, *flags: str, **options: Any) -> Engine: ...


class OwnRegistry(Protocol):
    """Makes a registry of the test's own; takes what `Registry` takes after its place."""

    def __call__(self, **options: Any) -> Registry: ...


def _need(packages: dict[str, bool], what: str, instead: str = "", *, root: bool = False) -> None:
    """Skip unless every package is there."""
    missing = [name for name, there in packages.items() if not there]
    cures = [f"install {' '.join(missing)}"] if missing else []
    if root and os.geteuid():
        cures.append("run as root")
    if cures:
        pytest.skip(f"{what}: {', '.join(cures)}{instead}")


def _need_registry() -> None:
    programs = {"docker-registry": "docker-registry", "apache2-utils": "htpasswd", "util-linux": "setpriv"}
    _need({package: bool(find_program(name)) for package, name in programs.items()}, "no registry")


def _need_docker(instead: str = "") -> None:
    programs = all(find_program(name) for name in ("docker", "dockerd", "unshare", "mount"))
    _need({"docker.io": programs, "busybox-static": busybox_is_static()}, "no container engine", instead, root=True)


def _need_client() -> None:
    if not find_program("docker") or not busybox_is_static():
        pytest.skip("no client for the engine of OZ_TEST_DOCKER_HOST: install docker.io busybox-static")


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """One engine for all tests of a process, left as it was found: that of OZ_TEST_DOCKER_HOST, else a private one."""
    if host := os.environ.get("OZ_TEST_DOCKER_HOST", ""):
        _need_client()
        env = {"DOCKER_HOST": host, "DOCKER_CONFIG": str(tmp_path_factory.mktemp("docker"))}  # never the user's own
        yield Client(find_program("docker"), env, f"DOCKER_HOST={host}")
        return
    _need_docker(" or set OZ_TEST_DOCKER_HOST")
    own = Engine()
    try:
        yield own
    finally:
        own.close()


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

    def make(*flags: str, **options: Any) -> Engine:
        made.append(Engine(*flags, **options))
        return made[-1]

    try:
        yield make
    finally:
        for one in made:
            one.close()


@pytest.fixture(scope="session")
def podman() -> Iterator[Podman]:
    """One Podman for all tests of a process, left as it was found. Load images with `load_images(podman)`."""
    programs = {"podman": "podman", "runc": "runc", "util-linux": "umount"}
    there = {package: bool(find_program(name)) for package, name in programs.items()}
    _need({**there, "busybox-static": busybox_is_static()}, "no Podman", root=True)
    own = Podman()
    try:
        yield own
    finally:
        own.close()


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """An open registry for all tests of a process; images stay, so publish under names of your own."""
    _need_registry()
    shared = Registry(tmp_path_factory.mktemp("registry"))
    try:
        yield shared
    finally:
        shared.close()


@pytest.fixture
def bad_registry(registry: Registry) -> Iterator[BadRegistry]:
    """A proxy in front of `registry` that can misbehave."""
    proxy = BadRegistry(registry)
    try:
        yield proxy
    finally:
        proxy.close()


@pytest.fixture
def own_registry(tmp_path: Path) -> Iterator[OwnRegistry]:
    """Makes registries that end with the test."""
    _need_registry()
    made: list[Registry] = []

    def make(**options: Any) -> Registry:
        made.append(Registry(tmp_path / f"registry-{len(made)}", **options))
        return made[-1]

    try:
        yield make
    finally:
        for one in made:
            one.close()
