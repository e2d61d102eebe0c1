"""What a cluster can do to a task, over the real backend: each with its reason, its code, and the cluster's words."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, Callable, Mapping, NamedTuple

import pytest

from oz_worker.backends.base import Unit
from oz_worker.backends.job_waits import Limits
from oz_worker.backends.kubernetes import Kubernetes
from oz_worker.model import Key, Reason
from tests.cluster.resources import EVENTS, PODS
from tests.hosting import eventually
from tests.kubernetes.kubernetes_site import KubernetesSite, ended, options_for

SOON = {"unschedulable_timeout": 2.0, "volume_mount_timeout": 3.0, "image_pull_timeout": 3.0}
"""How long each may last, where the configuration can say it."""
FOREVER = "echo up; while :; do sleep 0.1; done"


class Case(NamedTuple):
    """A fault: how it is made, and what the report must be. *begin* is called before the start, *then* once it runs."""

    reason: Reason
    words: str
    script: str = FOREVER
    code: int | None = None
    ran: bool = True
    options: Mapping[str, Any] = MappingProxyType({})
    spec: Mapping[str, Any] = MappingProxyType({})
    begin: Callable[[KubernetesSite], Any] = lambda site: None
    then: Callable[[KubernetesSite, str], Any] | None = None


def started(site: KubernetesSite, backend: Kubernetes, script: str, **spec: Any) -> Unit:
    unit = site.unit(script, **spec)
    backend.prepare(unit)
    backend.start(unit)
    return unit


def no_pods(site: KubernetesSite) -> None:
    """A quota that lets no pod in, for as long as the cluster lives."""
    site.cluster.add_quota("default", pods="0")
    site.before = site.cluster.census()


def with_task(**fields: Any) -> dict[str, Any]:
    """A template whose container `task` has these fields."""
    return {"containers": [{"name": "task", **fields}]}


def merged(ours: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """The template of the tests, and more volumes and more of its one container."""
    (task,), others = ours["containers"], more.get("containers", [{}])
    volumes = [*ours["volumes"], *more.get("volumes", [])]
    return {**ours, **more, "volumes": volumes, "containers": [{**task, **others[0]}]}


QUICK = {
    "code": Case(Reason.CONTAINER_EXIT, "exit code 7", "exit 7", 7),
    "signal": Case(Reason.CONTAINER_EXIT, "SIGKILL", "kill -KILL $$", 137),
    "oom": Case(
        Reason.CONTAINER_OOM,
        "memory",
        code=137,
        then=lambda site, pod: site.cluster.faults.out_of_memory("default", pod),
    ),
    "evicted": Case(
        Reason.EVICTED,
        "low on resource: memory",
        code=137,
        then=lambda site, pod: site.cluster.faults.evict("default", pod),
    ),
    "evicted with 0": Case(
        Reason.EVICTED,
        "low on resource: memory",
        code=0,
        then=lambda site, pod: site.cluster.faults.evict("default", pod, code=0),
    ),
    "preempted": Case(
        Reason.EVICTED, "higher priority", then=lambda site, pod: site.cluster.faults.preempt("default", pod)
    ),
    "pod deleted": Case(
        Reason.JOB_FAILED, "removed from outside", then=lambda site, pod: site.cluster.faults.delete_pod("default", pod)
    ),
    "deadline": Case(Reason.ACTIVE_DEADLINE, "activeDeadlineSeconds", options={"active_deadline_seconds": 3}),
    "no such image": Case(
        Reason.IMAGE_PULL, "nothing:1", ran=False, spec={"docker_image": "registry.example/nothing:1"}
    ),
    "no name of an image": Case(Reason.INVALID_IMAGE, "Not:Valid", ran=False, spec={"docker_image": "Not:Valid:Name"}),
    "never pulled": Case(
        Reason.IMAGE_PULL,
        "pull policy of Never",
        ran=False,
        options={"image_pull_policy": "Never"},
        spec={"docker_image": "oz-test/elsewhere:1"},
    ),
    "setup fails": Case(
        Reason.INIT_CONTAINER, "setup_command", code=4, ran=False, options={"setup_command": "echo no; exit 4"}
    ),
    "no node": Case(
        Reason.UNSCHEDULABLE, "Insufficient cpu", ran=False, begin=lambda site: site.cluster.faults.hold_pods()
    ),
    "quota": Case(
        Reason.UNSCHEDULABLE,
        "exceeded quota",
        ran=False,
        begin=lambda site: no_pods(site),
    ),
    "mount": Case(
        Reason.VOLUME_MOUNT, "mount failed", ran=False, begin=lambda site: site.cluster.faults.fail_mounts("place")
    ),
}


def no_pods_by_webhook(site: KubernetesSite) -> None:
    site.cluster.add_webhook("policy.example", lambda resource, obj: "no agents" if resource == PODS else None)


MENDED_BY_HAND = {
    "no secret": Case(
        Reason.CONTAINER_CREATE,
        'secret "none" not found',
        ran=False,
        options={
            "pod_template": with_task(env=[{"name": "A", "valueFrom": {"secretKeyRef": {"name": "none", "key": "k"}}}])
        },
    ),
    "not created": Case(
        Reason.CONTAINER_CREATE,
        "no such device",
        ran=False,
        begin=lambda site: site.cluster.images.create_faults.update(
            {"docker.io/library/busybox:latest": "no such device"}
        ),
    ),
    "no volume": Case(
        Reason.VOLUME_MOUNT,
        'configmap "none" not found',
        ran=False,
        options={"pod_template": {"volumes": [{"name": "v", "configMap": {"name": "none"}}]}},
    ),
    "no service account": Case(
        Reason.JOB_CREATE,
        'serviceaccount "nobody" not found',
        ran=False,
        options={"pod_template": {"serviceAccountName": "nobody"}},
    ),
    "admission": Case(
        Reason.JOB_CREATE,
        'admission webhook "policy.example" denied the request: no agents',
        ran=False,
        begin=lambda site: no_pods_by_webhook(site),
    ),
}
"""What waits for a minute or longer, because somebody may mend it; here for two seconds."""


NO_PATIENCE = Limits(unschedulable=2.0, volume_mount=3.0, image_pull=3.0, definite=2.0)


@pytest.mark.parametrize("case", MENDED_BY_HAND.values(), ids=MENDED_BY_HAND)
def test_what_nobody_mends_is_told_in_the_words_of_the_cluster(site: KubernetesSite, case: Case) -> None:
    is_told(site, case, NO_PATIENCE)


@pytest.mark.parametrize("case", QUICK.values(), ids=QUICK)
def test_each_fault_has_its_reason_its_code_and_the_words_of_the_cluster(site: KubernetesSite, case: Case) -> None:
    is_told(site, case)


def is_told(site: KubernetesSite, case: Case, limits: Limits | None = None) -> None:
    """Let it happen; *limits* are those that the configuration cannot say."""
    options = {**SOON, **case.options}
    if "pod_template" in options:
        options["pod_template"] = merged(
            options_for(site.cluster, site._place)["pod_template"], options["pod_template"]
        )
    backend = site.open(**options)
    if limits is not None:
        backend._board._limits = limits
    made = case.begin(site)
    try:
        unit = started(site, backend, case.script, **case.spec)
        if case.then is not None:
            eventually(lambda: backend.tail(unit, 10))
            case.then(site, site.pods(unit)[0]["metadata"]["name"])
        if case.reason is Reason.UNSCHEDULABLE:
            eventually(lambda: case.words in unit.waits_for(), "what it waits for")
        facts = ended(unit)
        assert unit.waits_for() == ""
        assert (facts.reason, facts.agent_started) == (case.reason, case.ran), facts
        assert case.words in facts.detail
        if case.code is not None:
            assert facts.code == case.code
        assert backend.stragglers(unit) == ""
    finally:
        if hasattr(made, "end"):
            made.end()
    assert not site.running(unit)
    job = site.job(unit)
    assert job is None or {"type": "Failed", "status": "True"}.items() <= job["status"]["conditions"][-1].items()
    assert backend.clean_up(unit, keep=False) == ""
    assert backend.units() == []


def test_many_that_wait_in_a_namespace_full_of_events_are_told_why(site: KubernetesSite) -> None:
    about = {"kind": "Pod", "namespace": "default", "name": "other", "uid": "other"}
    for number in range(3100):
        event = {"metadata": {"name": f"a-{number:04}"}, "involvedObject": about, "reason": "Odd", "message": "m"}
        site.cluster.api.create(EVENTS, "default", {"kind": "Event", "apiVersion": "v1", "type": "Normal", **event})
    site.cluster.faults.fail_mounts("place", which=lambda pod: "unmounted" in str(pod["metadata"]["labels"]))
    backend = site.open(**SOON)
    mounts = [started(site, backend, "exit 0", key=Key(f"unmounted-{number}", "run")) for number in range(6)]
    for unit in mounts:
        facts = ended(unit)
        assert facts.reason is Reason.VOLUME_MOUNT, facts
        assert "mount failed" in facts.detail
        assert backend.stragglers(unit) == ""
        assert backend.clean_up(unit, keep=False) == ""
