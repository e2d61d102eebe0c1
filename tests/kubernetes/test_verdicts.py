"""What a cluster can do to a task, over the real backend: each with its reason, its code, and the cluster's words."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, Callable, Mapping, NamedTuple

import pytest

from oz_worker.backends.base import Unit
from oz_worker.backends.kubernetes import Kubernetes
from oz_worker.model import Reason
from tests.hosting import eventually
from tests.kubernetes.kubernetes_site import KubernetesSite, ended

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


@pytest.mark.parametrize("case", QUICK.values(), ids=QUICK)
def test_each_fault_has_its_reason_its_code_and_the_words_of_the_cluster(site: KubernetesSite, case: Case) -> None:
    backend = site.open(**{**SOON, **case.options})
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
