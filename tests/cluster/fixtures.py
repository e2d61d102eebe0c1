"""The fixtures of tests against a cluster; each says in one line why it cannot be had, and the cure."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path
from typing import Any, Iterator, Mapping, Protocol

import pytest

from tests.cluster.cluster import Census, Cluster
from tests.cluster.patience import eventually
from tests.cluster.real import VARIABLE, RealCluster
from tests.engines.client import THRIFT, find_program
from tests.engines.images import busybox_is_static


class OwnCluster(Protocol):
    """Makes a cluster of the test's own; takes what `Cluster` takes. It ends with the test."""

    def __call__(self, release: str = "1.32", **options: Any) -> Cluster: ...


class Kubectl:
    """The real kubectl against one kubeconfig, with a cache of its own."""

    def __init__(self, kubeconfig: Path, home: Path, program: str = "") -> None:
        self.kubeconfig = kubeconfig
        self.program = program or find_program("kubectl")
        self.env = {"PATH": os.environ["PATH"], **THRIFT, "HOME": str(home), "KUBECONFIG": str(kubeconfig)}

    def run(self, *argv: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run it to its end, however that is."""
        command = [self.program, *argv]
        return subprocess.run(command, input=stdin, env=self.env, capture_output=True, text=True, timeout=100)

    def __call__(self, *argv: str, stdin: str = "") -> str:
        """What it prints; it must succeed."""
        done = self.run(*argv, stdin=stdin)
        assert done.returncode == 0, f"kubectl {' '.join(argv)}: {done.stderr}"
        return done.stdout

    def refused(self, *argv: str, stdin: str = "") -> str:
        """What it complains of; it must fail."""
        done = self.run(*argv, stdin=stdin)
        assert done.returncode != 0, f"kubectl {' '.join(argv)} succeeded: {done.stdout}"
        return done.stderr


def need_cluster() -> None:
    """Skip the test where there can be no cluster."""
    missing = [name for name, there in _packages().items() if not there]
    cures = [f"install {' '.join(missing)}"] if missing else []
    if os.geteuid():
        cures.append("run as root")
    if importlib.util.find_spec("kubernetes_validate") is None:
        cures.append("pip install kubernetes-validate")
    if cures:
        pytest.skip(f"no cluster: {', '.join(cures)}")


def _packages() -> Mapping[str, bool]:
    programs = {"kubectl": "kubectl", "util-linux": "unshare"}
    there = {package: bool(find_program(name)) for package, name in programs.items()}
    return {**there, "busybox-static": busybox_is_static()}


def back_to(cluster: Cluster | RealCluster, before: Census) -> None:
    """The cluster comes back to *before*; waited for, because things end after they are answered for."""

    def differences() -> list[str]:
        now = cluster.census()
        pairs = zip(Census._fields, before, now, strict=True)
        return [f"{name}: {old} before, {new} after" for name, old, new in pairs if old != new]

    try:
        eventually(lambda: not differences())
    except AssertionError:
        assert differences() == []


@pytest.fixture
def own_cluster() -> Iterator[OwnCluster]:
    """Makes clusters of the test's own, which end with it."""
    need_cluster()
    made: list[Cluster] = []

    def make(release: str = "1.32", **options: Any) -> Cluster:
        made.append(Cluster(release, **options))
        return made[-1]

    try:
        yield make
    finally:
        for one in made:
            one.close()
    assert [mistake for one in made for mistake in one.mistakes] == []


@pytest.fixture
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster | RealCluster]:
    """A cluster of the test's own, or a namespace of that of OZ_TEST_KUBECONFIG."""
    path = os.environ.get(VARIABLE, "")
    if not path:
        yield request.getfixturevalue("own_cluster")()
        return
    real = RealCluster(Path(path), tmp_path)
    try:
        yield real
    finally:
        real.close()


@pytest.fixture
def kubectl(cluster: Cluster | RealCluster, tmp_path: Path) -> Kubectl:
    """The real kubectl as the admin of `cluster`."""
    return Kubectl(cluster.kubeconfig, tmp_path)
