"""Fixtures of the tests of the kubernetes backend."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Iterator

import pytest

from oz_worker.backends.job_object import WORKER_ID
from oz_worker.devplane.server import ControlPlane
from oz_worker.process import arguments_of
from tests.cluster.cluster import Cluster, Tls
from tests.cluster.fixtures import OwnCluster, back_to
from tests.cluster.resources import JOBS, PODS
from tests.engines.client import THRIFT
from tests.kubernetes.kubernetes_site import KubernetesSite, add_images, options_for
from tests.rig import Rig, until


@pytest.fixture
def site(tmp_path: Path, cluster: Cluster) -> Iterator[KubernetesSite]:
    """A kubernetes backend over a cluster of its own; at its end the base count must hold."""
    site = KubernetesSite(tmp_path, cluster)
    yield site
    site.close()


@pytest.fixture
def guarded(tmp_path: Path, own_cluster: OwnCluster, certificates: Any) -> Iterator[KubernetesSite]:
    """The same over a cluster that speaks TLS, and therefore knows who asks: `allow` says what its worker may do."""
    site = KubernetesSite(tmp_path, own_cluster(tls=Tls(certificates.server, certificates.ca_file)))
    yield site
    site.close()


class KubernetesRig(Rig):
    """A place for a worker with the kubernetes backend. Agents see the place under its own path, as their HOME."""

    def __init__(self, place: Path, plane: ControlPlane, cluster: Cluster) -> None:
        super().__init__(place, plane)
        self.cluster = cluster
        add_images(cluster)
        self.env.update(THRIFT)
        self.before = cluster.census()
        self.worker_id = f"rig-{os.urandom(4).hex()}"
        self.config["worker_id"] = self.worker_id
        self.kubernetes = options_for(cluster, place)
        self.kubernetes["api_timeout"] = "10s"
        self.config["backend"] = {"kubernetes": self.kubernetes}
        self.own_files |= {path.name for path in place.rglob("*")}

    def submit(self, script: str = "", **more: Any) -> Any:
        """Like `Rig.submit`."""
        return super().submit(script, env_vars={"HOME": str(self.place), **more.pop("env_vars", {})}, **more)

    def jobs(self) -> list[dict[str, Any]]:
        """This worker's Jobs, as the cluster has them."""
        found = self.cluster.store.objects(JOBS, "default")[0]
        return [dict(job) for job in found if job["metadata"]["annotations"].get(WORKER_ID) == self.worker_id]

    def pods(self) -> list[dict[str, Any]]:
        """This worker's pods."""
        found = self.cluster.store.objects(PODS, "default")[0]
        return [dict(pod) for pod in found if pod["metadata"]["annotations"].get(WORKER_ID) == self.worker_id]

    def active(self) -> list[str]:
        """The names of the Jobs that are not over."""
        return [job["metadata"]["name"] for job in self.jobs() if not job.get("status", {}).get("conditions")]

    def only_watches(self) -> bool:
        """Whether the worker has no other children than its two watches."""
        lines = [" ".join(arguments_of(pid)) for pid in self.unit_processes()]
        watched = sorted(kind for line in lines for kind in ("jobs", "pods") if f"/{kind}?watch=1" in line)
        return watched == ["jobs", "pods"] and len(lines) == 2

    def written(self, name: str) -> str:
        """Block until an agent has written a file; its text."""
        path = self.place / name
        until(lambda: path.exists() and path.read_text().endswith("\n"), f"the agent's file {name}")
        return path.read_text()

    def lose_the_disk(self) -> None:
        """What happens to a worker's pod without a persistent volume that is replaced.

        Away, not removed: a `kubectl` that outlives its worker may still write there.
        """
        self.state_dir.rename(self.place / f"lost-{len(list(self.place.glob('lost-*')))}")

    def settled(self) -> None:
        """Block until nothing is left of the tasks that ended well, nor on disk of those that failed."""
        units = [path / "units" for path in self.instance_dirs()]
        until(lambda: not any(list(path.iterdir()) for path in units if path.exists()), "the removal of the units")

    def close(self) -> None:
        """End what a failed test left, and what every worker leaves: failed Jobs for their TTL."""
        super().close()
        for job in self.jobs():
            self.cluster.api.delete(JOBS, "default", job["metadata"]["name"], {"propagationPolicy": "Foreground"})
        until(lambda: not self.jobs() and not self.pods(), "the end of the Jobs")

    def audit(self, *, workspaces: bool = True, traceback: bool = False) -> None:
        """Also: no Job that runs is left, none that ended well, and nothing else but those that failed."""
        super().audit(workspaces=workspaces, traceback=traceback)
        left = [
            job for job in self.jobs() if _condition(job) != "Failed" and not job["metadata"].get("deletionTimestamp")
        ]
        assert left == []
        self.close()
        back_to(self.cluster, self.before)
        assert self.cluster.mistakes == []


def _condition(job: dict[str, Any]) -> str:
    found = [one["type"] for one in job.get("status", {}).get("conditions") or () if one["status"] == "True"]
    return next((kind for kind in found if kind in ("Complete", "Failed")), "")


@pytest.fixture
def kubernetes_rig(tmp_path: Path, cluster: Cluster) -> Iterator[KubernetesRig]:
    """A worker's place over a cluster of its own."""
    if cluster.is_real:
        pytest.skip("a worker's agents need files of this machine, which a real cluster does not see")
    with ControlPlane() as plane:
        rig = KubernetesRig(tmp_path, plane, cluster)
        try:
            yield rig
        finally:
            rig.close()
