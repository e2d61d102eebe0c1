"""Small objects for the tests of the cluster, and looks at what became of them."""

from __future__ import annotations

import json
from typing import Any

from tests.cluster.cluster import Cluster
from tests.cluster.conditions import condition
from tests.cluster.images import BUSYBOX
from tests.cluster.patience import eventually
from tests.cluster.refusals import Json
from tests.cluster.resources import EVENTS, JOBS, PODS


def container(script: str, name: str = "task", **fields: Any) -> Json:
    """A container that runs shell text."""
    policy = {"imagePullPolicy": "IfNotPresent"}
    return {"name": name, "image": BUSYBOX, **policy, "command": ["/bin/sh", "-c", script], **fields}


def job(name: str, *containers: Json, pod: Json | None = None, meta: Json | None = None, **spec: Any) -> Json:
    """A Job that is tried once; *pod* are further fields of its pod's spec, *spec* of its own."""
    inner = {"restartPolicy": "Never", "terminationGracePeriodSeconds": 2, "containers": [*containers], **(pod or {})}
    template = {"metadata": {"labels": {"job": name}}, "spec": inner}
    found: Json = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name, **(meta or {})}}
    return {**found, "spec": {"backoffLimit": 0, "template": template, **spec}}


def text(obj: Json) -> str:
    return json.dumps(obj)


def submit(cluster: Cluster, obj: Json) -> Json:
    """Create a Job without the detour over kubectl."""
    return cluster.api.create(JOBS, "default", json.loads(text(obj)))


def pods_of(cluster: Cluster, name: str) -> list[Json]:
    return [pod for pod in cluster.store.objects(PODS, "default")[0] if pod["metadata"]["labels"].get("job") == name]


def pod_of(cluster: Cluster, name: str) -> Json:
    """The first pod of a Job, once there is one."""
    found: Json = eventually(lambda: pods_of(cluster, name), f"Job {name} has no pod")[0]
    return found


def pod_name(cluster: Cluster, name: str) -> str:
    return str(pod_of(cluster, name)["metadata"]["name"])


def state(pod: Json, name: str = "task") -> Json:
    """The state of a container."""
    rows = [*pod["status"].get("initContainerStatuses", []), *pod["status"].get("containerStatuses", [])]
    return next((row["state"] for row in rows if row["name"] == name), {})


def waits(cluster: Cluster, name: str, reason: str, container_name: str = "task") -> Json:
    """The pod of a Job, once its container waits for *reason*."""

    def look() -> Json | None:
        pod = pod_of(cluster, name)
        return pod if state(pod, container_name).get("waiting", {}).get("reason") == reason else None

    found: Json = eventually(look, f"{name}: no {reason}")
    return found


def running(cluster: Cluster, name: str, container_name: str = "task") -> Json:
    """The pod of a Job, once its container runs."""
    found: Json = eventually(lambda: (pod := pod_of(cluster, name)) and "running" in state(pod, container_name) and pod)
    return found


def ended(cluster: Cluster, name: str) -> Json:
    """A Job, once it is Complete or Failed."""

    def look() -> Json | None:
        found = cluster.store.get(JOBS, "default", name)
        assert found is not None, f"Job {name} is gone"
        return found if verdict(found) else None

    found: Json = eventually(look, f"Job {name} does not end")
    return found


def verdict(found: Json) -> str:
    """`Complete`, `Failed: REASON`, or "" for a Job that goes on."""
    for kind in ("Complete", "Failed"):
        if (row := condition(found, kind)) and row["status"] == "True":
            return kind if kind == "Complete" else f"Failed: {row['reason']}"
    return ""


def gone(cluster: Cluster, name: str) -> None:
    """Wait until neither the Job nor a pod of it is there."""
    eventually(lambda: cluster.store.get(JOBS, "default", name) is None and not pods_of(cluster, name), f"{name} stays")


def events(cluster: Cluster, about: str) -> list[tuple[str, str, str]]:
    """Type, reason and message of the events about an object."""
    rows = [event for event in cluster.store.objects(EVENTS, "default")[0] if event["involvedObject"]["name"] == about]
    return [(row["type"], row["reason"], row["message"]) for row in rows]


def has_event(cluster: Cluster, about: str, reason: str, part: str = "") -> None:
    """Wait for an event."""
    eventually(
        lambda: any(row[1] == reason and part in row[2] for row in events(cluster, about)),
        f"no event {reason} {part!r} about {about}",
    )
