"""The suite's cluster as a thing of its own: what it leaves behind, by hand, and a real one in its place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Iterator

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.fixtures import Kubectl, OwnCluster, need_cluster
from tests.cluster.patience import eventually
from tests.cluster.real import RealCluster
from tests.cluster.resources import NAMESPACES
from tests.cluster.shapes import container, job, running, submit, text

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def by_hand() -> Iterator[subprocess.Popen[str]]:
    need_cluster()
    command = [sys.executable, "-m", "tests.cluster", "--port", "0", "--release", "1.27"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout
        process.stdout.close()


def printed(process: subprocess.Popen[str]) -> Path:
    assert process.stdout
    return Path(process.stdout.readline().strip())


def test_nothing_is_left_at_the_end(own_cluster: OwnCluster) -> None:
    threads = threading.active_count()
    with Cluster() as cluster:
        submit(cluster, job("a", container("sleep 600")))
        running(cluster, "a")
        place = cluster.place
        holder = cluster._containers._process.pid
    assert not place.exists()
    assert not Path(f"/proc/{holder}").exists()
    assert threading.active_count() == threads


def test_it_runs_by_hand(by_hand: subprocess.Popen[str], tmp_path: Path) -> None:
    kubeconfig = printed(by_hand)
    assert "v1.27.0" in Kubectl(kubeconfig, tmp_path)("version", "-o", "json")
    by_hand.send_signal(signal.SIGTERM)
    assert by_hand.wait(60) == 0
    assert not kubeconfig.exists()


def test_a_kill_leaves_nothing(by_hand: subprocess.Popen[str], tmp_path: Path) -> None:
    kubeconfig = printed(by_hand)
    kubectl = Kubectl(kubeconfig, tmp_path)
    mark = 1_000_000 + os.getpid()
    kubectl("create", "-f", "-", stdin=text(job("a", container(f"exec sleep {mark}"))))
    kubectl("wait", "--for=condition=Ready", "pod", "-l", "job=a", "--timeout=60s")

    def sleeps() -> bool:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if path.read_bytes() == f"sleep\0{mark}\0".encode():
                    return True
            except OSError:
                pass  # it ended meanwhile
        return False

    eventually(sleeps)
    by_hand.kill()
    eventually(lambda: not sleeps() and not kubeconfig.parent.exists())


def test_a_real_cluster_takes_its_place(own_cluster: OwnCluster, tmp_path: Path) -> None:
    behind = own_cluster()
    real = RealCluster(behind.kubeconfig, tmp_path)
    kubectl = Kubectl(real.kubeconfig, tmp_path)
    before = real.census()
    kubectl("create", "-f", "-", stdin=text(job("a", container("sleep 600"))))
    eventually(lambda: real.census().objects == {"jobs.batch": 1, "pods": 1})
    assert behind.store.get(NAMESPACES, "", real.namespace)
    with pytest.raises(pytest.skip.Exception, match="has no `faults`: unset OZ_TEST_KUBECONFIG"):
        real.faults.down()
    kubectl("delete", "job", "a", "--cascade=foreground")
    assert real.census() == before
    real.close()
    eventually(lambda: behind.store.get(NAMESPACES, "", real.namespace) is None)
