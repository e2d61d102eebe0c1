"""A kubernetes backend over the cluster of the suite, agents that are shell scripts, and the base count at the end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any, Mapping, cast

import pytest

from oz_worker.backends.base import Unit
from oz_worker.backends.job_object import UNIT, job_name
from oz_worker.backends.kubernetes import Kubernetes
from oz_worker.errors import OzWorkerError
from oz_worker.model import ExitFacts, Key, TaskSpec, unit_name
from oz_worker.settings import KubernetesOptions
from tests.audit import guard
from tests.cluster.access import Rule
from tests.cluster.cluster import Cluster
from tests.cluster.fixtures import back_to
from tests.cluster.images import BUSYBOX
from tests.cluster.real import VARIABLE, RealCluster
from tests.cluster.resources import JOBS, PODS, Resource
from tests.containers.docker_site import ARGV, FORWARD
from tests.engines.client import THRIFT
from tests.engines.images import ENTRYPOINT, OZ_PROGRAM
from tests.hosting import INSTANCE, PATIENCE, eventually, written

WORKER = "site-worker"
AGENT = "oz-test/agent:1"
"""A sidecar with a shell and `cp`, as a copy needs them, that is the agent of the tests."""


def add_images(cluster: Cluster) -> None:
    """Put AGENT into the registry, and it and the task's image on the nodes."""
    files = {"entrypoint.sh": (0o755, ENTRYPOINT), "oz": (0o755, OZ_PROGRAM.read_bytes())}
    if cluster.images.local(AGENT) is None:
        cluster.images.add(AGENT, files=files, present=True)
        cluster.images.pull(BUSYBOX)


def pod_template(place: Path, **more: Any) -> dict[str, Any]:
    """A template in which the task sees *place* under its own path, and the pod gives up soon after a TERM."""
    return {
        "terminationGracePeriodSeconds": 1,
        "volumes": [{"name": "place", "hostPath": {"path": str(place)}}],
        "containers": [{"name": "task", "volumeMounts": [{"name": "place", "mountPath": str(place)}]}],
        **more,
    }


def foreign_template() -> dict[str, Any]:
    """The same for a cluster that has no images of ours and sees no files of this machine: it writes the agent down."""
    write = 'printf %s "$PROGRAM" > /agent/entrypoint.sh; chmod 755 /agent/entrypoint.sh'
    program = '#!/bin/sh\nexec /bin/sh -c "$FAKE_OZ_SCRIPT" "$0" "$@"\n'
    agent = {"name": "agent", "mountPath": "/agent"}
    env = [{"name": "PROGRAM", "value": program.replace("$", "$$")}]
    made = {"name": "agent", "image": BUSYBOX, "command": ["sh", "-c", write], "env": env, "volumeMounts": [agent]}
    return {
        "terminationGracePeriodSeconds": 1,
        "volumes": [{"name": "agent", "emptyDir": {}}],
        "initContainers": [made],
        "containers": [{"name": "task", "volumeMounts": [agent]}],
    }


def options_for(cluster: Cluster | RealCluster, place: Path, **changes: Any) -> dict[str, Any]:
    """Options that make tasks run in *cluster*, and see *place*."""
    real = {"pod_template": foreign_template()} if cluster.is_real else {}
    ours = {} if cluster.is_real else {"sidecar_image": AGENT, "pod_template": pod_template(place)}
    return {
        "namespace": cluster.namespace,
        "kubeconfig": str(cluster.kubeconfig),
        "default_image": BUSYBOX,
        "preflight": False,
        "preflight_image": BUSYBOX,
        "api_timeout": 10.0,
        **real,
        **ours,
        **changes,
    }


class KubernetesSite:
    """The kubernetes backend in a place on disk; `open` again is what a restarted worker does.

    Over a cluster that somebody has (OZ_TEST_KUBECONFIG), a test that needs more than such a one gives is skipped.
    """

    def __init__(self, root: Path, cluster: Cluster | RealCluster, **options: Any) -> None:
        self._place = root
        self._cluster = cluster
        self.options = options
        if not isinstance(cluster, RealCluster):
            add_images(cluster)
        self.before = cluster.census()
        self.backends: list[Kubernetes] = []
        self.units: list[Unit] = []

    @property
    def cluster(self) -> Cluster:
        """The cluster, for what only ours can do."""
        return cast(Cluster, self._cluster)  # a real one skips the test that asks for it

    @property
    def root(self) -> Path:
        """Files that agents see."""
        if self._cluster.is_real:
            pytest.skip(f"agents in the cluster of {VARIABLE} see no files of this machine; unset it to run this test")
        return self._place

    def closed(
        self,
        *,
        instance: str = INSTANCE,
        worker: str = WORKER,
        state: str = "state",
        cleanup: bool = True,
        **options: Any,
    ) -> Kubernetes:
        """A backend that is not open yet; *environ* replaces its environment, another *state* is another disk."""
        environ: Mapping[str, str] = options.pop(
            "environ", {"PATH": os.environ["PATH"], **THRIFT, "HOME": "/nonexistent"}
        )
        chosen = options_for(self._cluster, self._place, **{**self.options, **options})
        return Kubernetes(
            KubernetesOptions(**chosen),
            worker_id=worker,
            instance=instance,
            instance_dir=self._place / state / instance,
            host_environ=environ,
            cleanup=cleanup,
            task_log_max=1 << 20,
            stop_grace=1.0,
        )

    def open(self, **options: Any) -> Kubernetes:
        """An open backend."""
        backend = self.closed(**options)
        backend.open()
        self.backends.append(backend)
        return backend

    def unit(self, script: str = "", *, instance: str = INSTANCE, key: Key | None = None, **spec: Any) -> Unit:
        """A unit whose agent runs *script*; keyword arguments change its spec."""
        if str(self._place) in script:
            assert self.root
        key = key or Key(f"task-{len(self.units)}", "run-1")
        environment = {"FAKE_OZ_SCRIPT": FORWARD, "AGENT_SCRIPT": script, **spec.pop("environment", {})}
        environment = guard().keep_of(self._place, environment)
        wanted = TaskSpec(key=key, run_id=key.task_id, argv=ARGV, environment=environment, **spec)
        unit = Unit(unit_name(key, 1), instance, key, wanted)
        self.units.append(unit)
        return unit

    def started(self, backend: Kubernetes, script: str, **more: Any) -> Unit:
        """A unit whose agent runs."""
        if self._cluster.is_real:
            unit = self.unit(f"echo up; {script}", **more)
            backend.prepare(unit)
            backend.start(unit)
            eventually(lambda: backend.tail(unit, 10))
            return unit
        up = self.root / f"up-{len(self.units)}"
        unit = self.unit(f"echo up > {up}; {script}", **more)
        backend.prepare(unit)
        backend.start(unit)
        written(up)
        return unit

    def go(self, name: str) -> str:
        """Shell that waits for `let(name)`."""
        return f"while [ ! -e {self.root}/{name} ]; do sleep 0.05; done"

    def let(self, name: str) -> None:
        """Let an agent go on that waits for *name*."""
        (self.root / name).touch()

    def allow(self, *rules: Rule) -> str:
        """The path of a kubeconfig with a new token that may do this and no more; needs a cluster that speaks TLS."""
        return str(self.cluster.write_kubeconfig(self.cluster.token(*rules)))

    def fake_kubectl(self, body: str) -> str:
        """A `kubectl` that runs *body* in sh first, and then the real one, `$REAL`, if *body* gets to its end."""
        path = self.root / f"kubectl-{len(list(self.root.glob('kubectl-*')))}"
        path.write_text(f'#!/bin/sh\nREAL={shutil.which("kubectl")}\n{body}\nexec "$REAL" "$@"\n')
        path.chmod(0o755)
        return str(path)

    def job(self, unit: Unit) -> dict[str, Any] | None:
        """The unit's Job as the cluster has it."""
        found = self.jobs()
        return next((job for job in found if job["metadata"]["name"] == job_name(unit.key)), None)

    def jobs(self) -> list[dict[str, Any]]:
        """Every Job of the namespace."""
        return self._all("jobs", JOBS)

    def pods(self, unit: Unit | None = None) -> list[dict[str, Any]]:
        """The pods of the namespace, or of one unit."""
        return [
            pod for pod in self._all("pods", PODS) if unit is None or pod["metadata"]["labels"].get(UNIT) == unit.name
        ]

    def _all(self, kind: str, resource: Resource) -> list[dict[str, Any]]:
        if self._cluster.is_real:
            found: list[dict[str, Any]] = json.loads(self._kubectl("get", kind, "--output=json"))["items"]
            return found
        return [dict(one) for one in self.cluster.store.objects(resource, self._cluster.namespace)[0]]

    def _kubectl(self, *argv: str) -> str:
        where = [f"--kubeconfig={self._cluster.kubeconfig}", f"--namespace={self._cluster.namespace}"]
        return subprocess.run(["kubectl", *where, *argv], capture_output=True, text=True, check=True, timeout=60).stdout

    def running(self, unit: Unit) -> bool:
        """Whether anything of the unit runs, as a process where we can see one."""
        if self._cluster.is_real:
            return any(pod["status"]["phase"] == "Running" for pod in self.pods(unit))
        uids = {pod["metadata"]["uid"] for pod in self.pods(unit)}
        return any(name.split("/")[0] in uids for name in self._cluster.census().processes)

    def close(self) -> None:
        """Close the backends, remove what tests are free to leave: failed Jobs. Then the base count holds."""
        for backend in self.backends:
            backend.close()
        if self.jobs():
            self._kubectl("delete", "jobs", "--all", "--wait=false")
        back_to(self._cluster, self.before)
        if not self._cluster.is_real:
            assert self.cluster.mistakes == []


class Starting(threading.Thread):
    """A task's thread that prepares and starts a unit."""

    def __init__(self, backend: Kubernetes, unit: Unit) -> None:
        super().__init__(daemon=True)
        self.backend, self.unit = backend, unit
        self.error: OzWorkerError | None = None
        self.start()

    def run(self) -> None:
        try:
            self.backend.prepare(self.unit)
            self.backend.start(self.unit)
        except OzWorkerError as error:
            self.error = error

    def over(self) -> None:
        """Block until it has started, or given up."""
        self.join(PATIENCE * 2)
        assert not self.is_alive()


def ended(unit: Unit) -> ExitFacts:
    """The facts of a unit's end, waited for."""
    unit.wait_for_end_or_stop(PATIENCE * 4)
    assert unit.facts is not None, "it did not end"
    return unit.facts
