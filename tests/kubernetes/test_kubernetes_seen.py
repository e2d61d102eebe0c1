"""What a cluster does to tasks, all at once to one real worker, as its metrics count it."""

from __future__ import annotations

from typing import Any, Callable

from tests.cluster.resources import JOBS
from tests.kubernetes.conftest import KubernetesRig
from tests.prometheus import SERVED, sees
from tests.rig import until

FOREVER = "echo up > $HOME/$TASK_ID-up; while :; do sleep 0.1; done"
NOT_STARTED = ("homeless", "unmounted", "refused", "unset", "misnamed")


def named(name: str) -> Callable[[Any], bool]:
    """Whether a Job or a pod is of the task *name*."""
    return lambda thing: bool(thing["metadata"]["annotations"].get("oz.warp.dev/task-id") == name)


def test_what_a_cluster_does_to_tasks_is_counted_by_its_reason(kubernetes_rig: KubernetesRig) -> None:
    rig, faults = kubernetes_rig, kubernetes_rig.cluster.faults
    rig.kubernetes |= {"unschedulable_timeout": "2s", "volume_mount_timeout": "3s"}
    rig.kubernetes["setup_command"] = 'test "$TASK_ID" != unset'
    held = faults.hold_pods(which=named("homeless"))
    broken = faults.fail_mounts("place", which=named("unmounted"))
    hook = rig.cluster.add_webhook(
        "policy.example", lambda resource, thing: "no" if resource == JOBS and named("refused")(thing) else None
    )
    worker = rig.start(env=SERVED)
    failed = [
        rig.submit("exit 0", task_id=name, extra={"docker_image": "Not:Valid:Name"} if name == "misnamed" else {})
        for name in NOT_STARTED
    ]
    overdue = rig.submit("exit 0", task_id="overdue", extra={"docker_image": "registry.example/nothing:1"})
    by_name = {name: rig.submit(FOREVER, task_id=name) for name in ("evicted", "podless", "jobless", "late")}
    for name in by_name:
        rig.written(f"{name}-up")
    pod_of = {name: next(filter(named(name), rig.pods()))["metadata"]["name"] for name in by_name}
    job_of = {name: next(filter(named(name), rig.jobs()))["metadata"]["name"] for name in by_name}
    faults.evict("default", pod_of["evicted"])
    faults.delete_pod("default", pod_of["podless"])
    faults.delete_job("default", job_of["jobless"], policy="Foreground")
    until(lambda: any(map(named("overdue"), rig.pods())), "the pod of the Job that is overdue")
    job_of["overdue"] = next(filter(named("overdue"), rig.jobs()))["metadata"]["name"]
    for name in ("late", "overdue"):
        rig.cluster.api.change(JOBS, "default", job_of[name], lambda job: job["spec"].update(activeDeadlineSeconds=1))
    rig.plane.wait_acknowledged(*failed, overdue, *by_name.values())
    told = {task.task_id: task.terminal.reason for task in (*failed, overdue, *by_name.values())}
    assert told == {
        "homeless": "unschedulable",
        "unmounted": "volume_mount",
        "refused": "job_create",
        "unset": "init_container",
        "misnamed": "invalid_image",
        "evicted": "evicted",
        "podless": "job_failed",
        "jobless": "job_watch",
        "late": "active_deadline",
        "overdue": "active_deadline",
    }
    sees(
        worker,
        'oz_worker_task_failures_total{phase="backend",reason="unschedulable"}',
        'oz_worker_task_failures_total{phase="backend",reason="volume_mount"}',
        'oz_worker_task_failures_total{phase="backend",reason="job_create"}',
        'oz_worker_task_failures_total{phase="backend",reason="init_container"}',
        'oz_worker_task_failures_total{phase="backend",reason="invalid_image"}',
        'oz_worker_task_failures_total{phase="backend",reason="evicted"}',
        'oz_worker_task_failures_total{phase="backend",reason="job_failed"}',
        'oz_worker_task_failures_total{phase="backend",reason="job_watch"}',
        'oz_worker_task_failures_total{phase="backend",reason="active_deadline"}',
        'oz_worker_task_sandbox_startup_failures_total{reason="unschedulable"}',
        'oz_worker_task_sandbox_startup_failures_total{reason="volume_mount"}',
        'oz_worker_task_sandbox_startup_failures_total{reason="job_create"}',
        'oz_worker_task_sandbox_startup_failures_total{reason="init_container"}',
        'oz_worker_task_sandbox_startup_failures_total{reason="invalid_image"}',
        'oz_worker_task_sandbox_startup_failures_total{reason="active_deadline"}',
        'oz_worker_task_sandbox_startup_failures_total{reason="evicted"}',
        'oz_worker_task_sandbox_startup_failures_total{reason="job_failed"}',
        'oz_worker_task_sandbox_startup_failures_total{reason="job_watch"}',
    )
    for trouble in (held, broken):
        trouble.end()
    rig.cluster.api.webhooks.remove(hook)
    until(lambda: not rig.active(), "the end of the Jobs")
    assert worker.stop() == 0
    rig.audit()
