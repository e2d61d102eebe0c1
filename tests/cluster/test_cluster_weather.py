"""What befalls pods and nodes of the suite's cluster on command, in the words of a real one, and what heals."""

from __future__ import annotations

import json

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.conditions import condition, holds
from tests.cluster.fixtures import Kubectl, back_to
from tests.cluster.patience import eventually
from tests.cluster.refusals import Json
from tests.cluster.resources import JOBS, PODS
from tests.cluster.shapes import (
    container,
    ended,
    events,
    gone,
    has_event,
    job,
    pod_name,
    pod_of,
    pods_of,
    running,
    state,
    submit,
    verdict,
    waits,
)
from tests.cluster.store import Change

TERMS = "trap 'exit 0' TERM; sleep 600 & wait"
LIMIT = "Failed: BackoffLimitExceeded"


def disruption(pod: Json) -> str:
    """The reason of a pod's DisruptionTarget."""
    row = condition(pod, "DisruptionTarget")
    return row["reason"] if row and row["status"] == "True" else ""


@pytest.fixture
def history(cluster: Cluster) -> list[Json]:
    """Every pod as it was at each change."""
    found: list[Json] = []

    def heard(change: Change) -> None:
        if change.resource == PODS:
            found.append(change.object)

    cluster.store.listeners.append(heard)
    return found


# Images


def test_an_image_that_is_missing_alternates_and_heals(cluster: Cluster, history: list[Json], kubectl: Kubectl) -> None:
    cluster.images.add("example.com/late:1")
    cluster.images.missing("example.com/late:1")
    submit(cluster, job("a", container("true", image="example.com/late:1", imagePullPolicy="Always")))
    pod = waits(cluster, "a", "ImagePullBackOff")
    name = pod["metadata"]["name"]
    assert "trying and failing to pull image" in kubectl.refused("logs", name)
    eventually(lambda: cluster.images.pulls.count("example.com/late:1") >= 3)
    reasons = [state(each).get("waiting", {}).get("reason") for each in history]
    order = [reason for number, reason in enumerate(reasons) if reason and reason != reasons[number - 1]]
    assert order[:5] == ["ContainerCreating", "ErrImagePull", "ImagePullBackOff", "ErrImagePull", "ImagePullBackOff"]
    has_event(cluster, name, "Failed", 'Failed to pull image "example.com/late:1": failed to pull and unpack image')
    has_event(cluster, name, "Failed", "Error: ErrImagePull")
    has_event(cluster, name, "Failed", "Error: ImagePullBackOff")
    has_event(cluster, name, "BackOff", 'Back-off pulling image "example.com/late:1"')
    assert pod_of(cluster, "a")["status"]["phase"] == "Pending"
    cluster.images.heal("example.com/late:1")
    assert verdict(ended(cluster, "a")) == "Complete"


@pytest.mark.parametrize(
    ("image", "policy", "reason", "part"),
    [
        ("Not An Image", "Always", "InvalidImageName", "invalid reference format"),
        ("busybox:absent", "Never", "ErrImageNeverPull", "is not present with pull policy of Never"),
        ("nobody/nothing:1", "IfNotPresent", "ErrImagePull", "insufficient_scope: authorization failed"),
    ],
)
def test_images_that_cannot_be(
    image: str, policy: str, reason: str, part: str, cluster: Cluster, history: list[Json]
) -> None:
    submit(cluster, job("a", container("true", image=image, imagePullPolicy=policy)))
    eventually(lambda: any(state(each).get("waiting", {}).get("reason") == reason for each in history))
    found = next(state(each)["waiting"] for each in history if state(each).get("waiting", {}).get("reason") == reason)
    assert part in found["message"]
    has_event(cluster, pod_name(cluster, "a"), "Failed", f"Error: {reason}")
    cluster.faults.delete_job("default", "a")
    gone(cluster, "a")


def test_an_image_volume_that_is_missing_holds_its_container(cluster: Cluster) -> None:
    volumes = [{"name": "i", "image": {"reference": "nobody/agent:1"}}]
    mounts = [{"name": "i", "mountPath": "/agent"}]
    submit(cluster, job("a", container("true", volumeMounts=mounts), pod={"volumes": volumes}))
    pod = waits(cluster, "a", "ImagePullBackOff")
    assert "nobody/agent:1" in state(pod)["waiting"]["message"]


def test_an_image_can_take_its_time(cluster: Cluster) -> None:
    cluster.images.slow("busybox", 1.5)
    submit(cluster, job("a", container("true", imagePullPolicy="Always")))
    waits(cluster, "a", "ContainerCreating")
    has_event(cluster, pod_name(cluster, "a"), "Pulling", 'Pulling image "busybox"')
    assert cluster.images.pulls == []
    ended(cluster, "a")
    assert cluster.images.pulls == ["busybox"]


# Configuration and mounts


def test_a_secret_that_is_missing_is_waited_for(cluster: Cluster, kubectl: Kubectl) -> None:
    env = [{"name": "S", "valueFrom": {"secretKeyRef": {"name": "late", "key": "k"}}}]
    submit(cluster, job("a", container("test $S = v", env=env)))
    pod = waits(cluster, "a", "CreateContainerConfigError")
    assert state(pod)["waiting"]["message"] == 'secret "late" not found'
    has_event(cluster, pod["metadata"]["name"], "Failed", 'Error: secret "late" not found')
    kubectl("create", "secret", "generic", "late", "--from-literal=other=v")
    eventually(lambda: "couldn't find key k in Secret default/late" in str(state(pod_of(cluster, "a"))))
    kubectl("patch", "secret", "late", "-p", json.dumps({"stringData": {"k": "v"}}))
    assert verdict(ended(cluster, "a")) == "Complete"


def test_a_container_that_cannot_be_created_heals(cluster: Cluster) -> None:
    cluster.images.create_faults["docker.io/library/busybox:latest"] = "context deadline exceeded"
    submit(cluster, job("a", container("true")))
    pod = waits(cluster, "a", "CreateContainerError")
    has_event(cluster, pod["metadata"]["name"], "Failed", "Error: context deadline exceeded")
    cluster.images.heal("busybox")
    assert verdict(ended(cluster, "a")) == "Complete"


@pytest.mark.parametrize("cause", ["secret", "order"])
def test_a_volume_that_cannot_be_mounted_heals(cause: str, cluster: Cluster, kubectl: Kubectl) -> None:
    trouble = cluster.faults.fail_mounts("v", "rpc error: no such disk") if cause == "order" else None
    volume = {"emptyDir": {}} if cause == "order" else {"secret": {"secretName": "late"}}
    mounts = [{"name": "v", "mountPath": "/v"}]
    submit(cluster, job("a", container("ls /v", volumeMounts=mounts), pod={"volumes": [{"name": "v", **volume}]}))
    part = "rpc error: no such disk" if cause == "order" else 'secret "late" not found'
    has_event(cluster, pod_name(cluster, "a"), "FailedMount", f'MountVolume.SetUp failed for volume "v" : {part}')
    assert state(pod_of(cluster, "a"))["waiting"]["reason"] == "ContainerCreating"
    if trouble is not None:
        trouble.end()
    else:
        kubectl("create", "secret", "generic", "late", "--from-literal=k=v")
    assert verdict(ended(cluster, "a")) == "Complete"


def test_a_pod_that_never_starts_can_be_deleted(cluster: Cluster) -> None:
    before = cluster.census()
    cluster.faults.fail_mounts()
    submit(cluster, job("a", container("true"), pod={"volumes": [{"name": "v", "emptyDir": {}}]}))
    has_event(cluster, pod_name(cluster, "a"), "FailedMount")
    cluster.faults.delete_job("default", "a", policy="Foreground")
    gone(cluster, "a")
    back_to(cluster, before)


def test_pods_that_find_no_node_heal(cluster: Cluster) -> None:
    hold = cluster.faults.hold_pods()
    submit(cluster, job("a", container("true")))
    has_event(cluster, pod_name(cluster, "a"), "FailedScheduling", "0/1 nodes are available: 1 Insufficient cpu.")
    row = condition(pod_of(cluster, "a"), "PodScheduled")
    assert row is not None
    assert (row["status"], row["reason"]) == ("False", "Unschedulable")
    hold.end()
    assert verdict(ended(cluster, "a")) == "Complete"


# Ends from outside


@pytest.mark.parametrize("code", [0, 137])
def test_an_eviction_is_a_failure_whatever_the_code(code: int, cluster: Cluster) -> None:
    submit(cluster, job("a", container(TERMS)))
    running(cluster, "a")
    cluster.faults.evict("default", pod_name(cluster, "a"), code=code)
    assert verdict(ended(cluster, "a")) == LIMIT
    pod = pod_of(cluster, "a")
    assert (pod["status"]["phase"], pod["status"]["reason"]) == ("Failed", "Evicted")
    assert "The node was low on resource: memory" in pod["status"]["message"]
    assert state(pod)["terminated"]["exitCode"] == code
    assert disruption(pod) == "TerminationByKubelet"
    has_event(cluster, pod["metadata"]["name"], "Evicted", "The node was low on resource: memory")


def test_a_pod_that_is_preempted_is_marked_and_deleted(cluster: Cluster, history: list[Json]) -> None:
    submit(cluster, job("a", container(TERMS)))
    running(cluster, "a")
    name = pod_name(cluster, "a")
    cluster.faults.preempt("default", name)
    assert verdict(ended(cluster, "a")) == LIMIT
    eventually(lambda: not pods_of(cluster, "a"))
    assert disruption(history[-1]) == "PreemptionByScheduler"
    assert any(each["metadata"].get("deletionTimestamp") for each in history)
    assert any(row[1] == "Preempted" for row in events(cluster, name))


@pytest.mark.parametrize("unknown", [False, True])
def test_a_node_that_is_lost_takes_its_pods_with_it(unknown: bool, cluster: Cluster, kubectl: Kubectl) -> None:
    submit(cluster, job("a", container(TERMS)))
    running(cluster, "a")
    name = pod_name(cluster, "a")
    cluster.faults.lose_node("node-1", unknown=unknown)
    pod = pod_of(cluster, "a")
    assert pod["status"]["phase"] == ("Unknown" if unknown else "Running")
    ready = condition(pod, "Ready")
    assert ready is not None
    assert ready["status"] == "False"
    assert "no route to host" in kubectl.refused("logs", name)
    assert "running" in state(pod)  # nobody tells of the end of its processes
    cluster.faults.taint_manager("node-1")
    eventually(lambda: holds(cluster.store.get(JOBS, "default", "a") or {}, "FailureTarget"))
    pod = pod_of(cluster, "a")
    assert disruption(pod) == "DeletionByTaintManager"
    assert pod["metadata"]["deletionTimestamp"]
    found = cluster.store.get(JOBS, "default", "a")
    assert found is not None
    assert verdict(found) == ""  # since 1.31 a Job is not Failed before its last pod is gone
    cluster.faults.collect_pods("node-1")
    assert verdict(ended(cluster, "a")) == LIMIT
    eventually(lambda: not pods_of(cluster, "a"))
    eventually(lambda: not cluster.census().processes)


def test_a_node_that_comes_back_says_what_became_of_its_pods(cluster: Cluster) -> None:
    submit(cluster, job("a", container("sleep 1; exit 5")))
    running(cluster, "a")
    cluster.faults.lose_node("node-1", kill=False)
    eventually(lambda: not cluster.census().processes)
    assert "running" in state(pod_of(cluster, "a"))
    cluster.faults.find_node("node-1")
    assert verdict(ended(cluster, "a")) == LIMIT
    assert state(pod_of(cluster, "a"))["terminated"]["exitCode"] == 5


def test_a_pod_that_is_drained_is_marked(cluster: Cluster, kubectl: Kubectl, history: list[Json]) -> None:
    submit(cluster, job("a", container(TERMS)))
    running(cluster, "a")
    name = pod_name(cluster, "a")
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name, "namespace": "default"}}
    path = cluster.place / "eviction.json"
    path.write_text(json.dumps(body))
    kubectl("create", "--raw", f"/api/v1/namespaces/default/pods/{name}/eviction", "-f", str(path))
    assert verdict(ended(cluster, "a")) == LIMIT
    eventually(lambda: not pods_of(cluster, "a"))
    assert disruption(history[-1]) == "EvictionByEvictionAPI"


def test_a_pod_that_is_removed_by_force_takes_its_processes_with_it(cluster: Cluster) -> None:
    before = cluster.census()
    submit(cluster, job("a", container("sleep 600")))
    running(cluster, "a")
    cluster.faults.delete_pod("default", pod_name(cluster, "a"), grace=0)
    assert verdict(ended(cluster, "a")) == LIMIT
    cluster.faults.delete_job("default", "a")
    back_to(cluster, before)
