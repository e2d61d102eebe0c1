"""What differs with Podman, through the same backend (the contract suite has the rest)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Iterator

import pytest

from oz_worker.backends.docker import Docker
from oz_worker.errors import TaskFault
from oz_worker.model import ExitFacts, InstanceShape, Reason
from tests.containers.docker_site import DockerSite
from tests.containers.test_docker import ODD, begin, ended
from tests.engines.images import load_images
from tests.engines.podman import Podman
from tests.hosting import eventually


@pytest.fixture
def site(tmp_path: Path, podman: Podman) -> Iterator[DockerSite]:
    site = DockerSite(tmp_path, podman, load_images(podman), kind="podman")
    yield site
    site.close()


def facts(backend: Docker, site: DockerSite, script: str, **spec: Any) -> ExitFacts:
    unit = site.unit(script, **spec)
    begin(backend, unit)
    return ended(backend, unit)


def test_the_environment_arrives_exactly(site: DockerSite) -> None:
    """Rule 22, proven anew."""
    script = f'for n in {" ".join(ODD)}; do eval "printf %s \\"\\$$n\\"" > {site.root}/$n; done'
    assert facts(site.open(), site, script, environment=ODD).code == 0
    assert {name: (site.root / name).read_text() for name in ODD} == ODD


def test_a_name_that_cannot_be_given_is_named(site: DockerSite) -> None:
    backend = site.open()
    for name in ("CONTAINER_HOST", "LINES_*"):
        unit = site.unit("exit 0", environment={name: "a\nb"})
        with pytest.raises(TaskFault, match=f"the variable {name.replace('*', '.')} cannot be given"):
            begin(backend, unit)
        assert backend.clean_up(unit, keep=False) == ""


def test_a_container_without_memory_is_one_that_was_killed(site: DockerSite) -> None:
    before = set(os.listdir())
    found = facts(site.open(memory="32m"), site, "dd if=/dev/zero of=/dev/null bs=200M count=1")
    assert (found.code, found.reason) in ((137, Reason.CONTAINER_EXIT), (137, Reason.CONTAINER_OOM))
    assert "memory" in found.detail
    assert set(os.listdir()) - before == set(), "its monitor notes it in a file where it was started"


def test_killed_and_removed_from_outside(site: DockerSite) -> None:
    backend = site.open()
    for words in (("kill", "--signal", "KILL"), ("rm", "--force", "--volumes")):
        unit = site.unit("echo up; sleep 1000")
        begin(backend, unit)
        eventually(lambda unit=unit: backend.tail(unit, 10))  # type: ignore[misc]
        site.engine.cli(*words, f"oz-{unit.name}")
        found = ended(backend, unit)
        assert found.reason in (Reason.CONTAINER_EXIT, Reason.CONTAINER_WAIT)
        assert found.code in (137, 143, None), "its rm sends TERM first"


def test_the_instance_shape_and_options_bind(site: DockerSite) -> None:
    backend = site.open(user="1000:1000", security_opt=("no-new-privileges",), pids_limit=50)
    site.root.chmod(0o777)
    shape = InstanceShape(vcpus=1, memory_gb=1)
    assert facts(backend, site, f"id -u > {site.root}/id; pwd > {site.root}/pwd", shape=shape).code == 0
    assert ((site.root / "id").read_text(), (site.root / "pwd").read_text()) == ("1000\n", "/workspace\n")
