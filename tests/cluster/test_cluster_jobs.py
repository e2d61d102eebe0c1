"""The Job controller of the suite's cluster: counts, conditions, limits, and Jobs that cannot have a pod."""

from __future__ import annotations

import time

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.conditions import condition
from tests.cluster.fixtures import Kubectl, OwnCluster, back_to
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
)
from tests.cluster.store import Change

TERMS = "trap 'exit 0' TERM; sleep 600 & wait"


def job_of(cluster: Cluster, name: str) -> Json:
    found = cluster.store.get(JOBS, "default", name)
    assert found is not None
    return found


def kinds(found: Json) -> list[str]:
    return [row["type"] for row in found["status"].get("conditions", ()) if row["status"] == "True"]


@pytest.mark.parametrize(
    ("release", "good", "bad"),
    [
        ("1.27", ["Complete"], ["Failed"]),
        ("1.32", ["SuccessCriteriaMet", "Complete"], ["FailureTarget", "Failed"]),
    ],
)
def test_ends_are_declared_as_the_release_does(
    release: str, good: list[str], bad: list[str], own_cluster: OwnCluster
) -> None:
    cluster = own_cluster(release)
    submit(cluster, job("good", container("exit 0")))
    submit(cluster, job("bad", container("exit 7")))
    done = ended(cluster, "good")
    assert kinds(done) == good
    assert done["status"]["succeeded"] == 1
    assert done["status"]["completionTime"]
    assert "active" not in done["status"]
    failed = ended(cluster, "bad")
    assert kinds(failed) == bad
    assert verdict(failed) == "Failed: BackoffLimitExceeded"
    assert failed["status"]["failed"] == 1
    assert "completionTime" not in failed["status"]
    assert state(pod_of(cluster, "bad"))["terminated"]["exitCode"] == 7
    has_event(cluster, "good", "Completed")
    has_event(cluster, "bad", "BackoffLimitExceeded")
    eventually(lambda: "finalizers" not in pod_of(cluster, "good")["metadata"])


def test_pods_carry_what_makes_them_the_jobs(cluster: Cluster) -> None:
    made = submit(cluster, job("a" * 60, container("sleep 600")))
    pod = pod_of(cluster, "a" * 60)
    uid = made["metadata"]["uid"]
    labels = pod["metadata"]["labels"]
    assert (labels["batch.kubernetes.io/job-name"], labels["job-name"]) == ("a" * 60, "a" * 60)
    assert (labels["batch.kubernetes.io/controller-uid"], labels["controller-uid"]) == (uid, uid)
    assert pod["metadata"]["name"].startswith("a" * 58)
    assert len(pod["metadata"]["name"]) == 63
    assert pod["metadata"]["finalizers"] == ["batch.kubernetes.io/job-tracking"]
    (owner,) = pod["metadata"]["ownerReferences"]
    assert (owner["uid"], owner["controller"], owner["blockOwnerDeletion"]) == (uid, True, True)
    assert len(pods_of(cluster, "a" * 60)) == 1


@pytest.mark.parametrize("release", ["1.27", "1.32"])
def test_the_deadline_ends_the_pods(release: str, own_cluster: OwnCluster) -> None:
    cluster = own_cluster(release)
    history: list[list[str]] = []

    def heard(change: Change) -> None:
        if change.resource == JOBS and kinds(change.object) not in history:
            history.append(kinds(change.object))

    cluster.store.listeners.append(heard)
    submit(cluster, job("a", container(TERMS), activeDeadlineSeconds=1))
    assert verdict(ended(cluster, "a")) == "Failed: DeadlineExceeded"
    row = condition(job_of(cluster, "a"), "Failed")
    assert row is not None
    assert row["message"] == "Job was active longer than specified deadline"
    eventually(lambda: not pods_of(cluster, "a"))
    middle = [["FailureTarget"]] if release == "1.32" else []
    last = ["FailureTarget", "Failed"] if release == "1.32" else ["Failed"]
    assert history == [[], *middle, last]


def test_a_deadline_that_is_set_later_ends_it_too(cluster: Cluster, kubectl: Kubectl) -> None:
    submit(cluster, job("a", container(TERMS)))
    running(cluster, "a")
    time.sleep(1.1)  # the deadline counts from the start, so that it is over when it is set
    kubectl("patch", "job", "a", "--type=merge", "-p", '{"spec":{"activeDeadlineSeconds":1}}')
    assert verdict(ended(cluster, "a")) == "Failed: DeadlineExceeded"
    eventually(lambda: not pods_of(cluster, "a"))


def test_tries_again_up_to_its_limit(cluster: Cluster) -> None:
    submit(cluster, job("a", container("exit 1"), backoffLimit=2))
    failed = ended(cluster, "a")
    assert verdict(failed) == "Failed: BackoffLimitExceeded"
    assert failed["status"]["failed"] == 3
    assert len(pods_of(cluster, "a")) == 3


def test_completions_are_counted(cluster: Cluster) -> None:
    submit(cluster, job("a", container("exit 0"), completions=3, parallelism=2))
    assert ended(cluster, "a")["status"]["succeeded"] == 3
    assert len(pods_of(cluster, "a")) == 3


def test_suspend_and_resume(cluster: Cluster, kubectl: Kubectl) -> None:
    submit(cluster, job("a", container(TERMS), suspend=True, backoffLimit=6))
    eventually(lambda: kinds(job_of(cluster, "a")) == ["Suspended"])
    assert "startTime" not in job_of(cluster, "a")["status"]
    assert pods_of(cluster, "a") == []
    kubectl("patch", "job", "a", "-p", '{"spec":{"suspend":false}}')
    running(cluster, "a")
    assert kinds(job_of(cluster, "a")) == []
    kubectl("patch", "job", "a", "-p", '{"spec":{"suspend":true}}')
    eventually(lambda: not pods_of(cluster, "a"))
    assert kinds(job_of(cluster, "a")) == ["Suspended"]
    assert [row[1] for row in events(cluster, "a")].count("Suspended") == 2


def test_time_to_live_removes_everything(cluster: Cluster) -> None:
    before = cluster.census()
    submit(cluster, job("a", container("exit 0"), ttlSecondsAfterFinished=1))
    submit(cluster, job("b", container("exit 1"), ttlSecondsAfterFinished=0))
    gone(cluster, "a")
    gone(cluster, "b")
    back_to(cluster, before)


@pytest.mark.parametrize("cause", ["account", "quota", "webhook", "resources"])
def test_a_job_whose_pod_is_refused_says_why_and_heals(cause: str, cluster: Cluster, kubectl: Kubectl) -> None:
    pod: Json = {}
    if cause == "account":
        pod = {"serviceAccountName": "robot"}
        part = (
            'pods "a-" is forbidden: error looking up service account default/robot: serviceaccount "robot" not found'
        )
    elif cause == "quota":
        cluster.add_quota("default", pods="0")
        part = "is forbidden: exceeded quota: quota, requested: pods=1, used: pods=0, limited: pods=0"
    elif cause == "resources":
        cluster.add_quota("default", limits_cpu="1")
        part = "is forbidden: failed quota: quota: must specify limits.cpu for: task"
    else:
        cluster.add_webhook("policy.example", lambda resource, obj: "no pods" if resource == PODS else None)
        part = 'Error creating: admission webhook "policy.example" denied the request: no pods'
    submit(cluster, job("a", container("exit 0"), pod=pod))
    has_event(cluster, "a", "FailedCreate", part)
    assert pods_of(cluster, "a") == []
    assert verdict(job_of(cluster, "a")) == ""
    if cause == "account":
        kubectl("create", "serviceaccount", "robot")
    elif cause in ("quota", "resources"):
        kubectl("delete", "resourcequota", "quota")
    else:
        cluster.api.webhooks.clear()
    assert verdict(ended(cluster, "a")) == "Complete"


def test_a_pod_that_is_deleted_by_hand_fails_the_job(cluster: Cluster) -> None:
    submit(cluster, job("a", container(TERMS)))
    running(cluster, "a")
    cluster.faults.delete_pod("default", pod_name(cluster, "a"))
    assert verdict(ended(cluster, "a")) == "Failed: BackoffLimitExceeded"
    eventually(lambda: not pods_of(cluster, "a"))


def test_a_job_that_is_deleted_by_hand_takes_its_processes_with_it(cluster: Cluster) -> None:
    before = cluster.census()
    submit(cluster, job("a", container("sleep 600")))  # number 1 of its namespace, so that TERM does nothing
    running(cluster, "a")
    cluster.faults.delete_job("default", "a")
    gone(cluster, "a")
    back_to(cluster, before)


def test_two_hundred_jobs_at_once(cluster: Cluster) -> None:
    before = cluster.census()
    names = [f"j{number}" for number in range(200)]
    for name in names:
        submit(cluster, job(name, container("trap 'exit 0' TERM; sleep 2 & wait; exit 0")))
    for name in names:
        assert verdict(ended(cluster, name)) == "Complete"
    for name in names:
        cluster.faults.delete_job("default", name, policy="Foreground")
    back_to(cluster, before)
