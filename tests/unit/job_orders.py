"""Orders of tasks for a cluster, and what is made of them: the making of the tests of Jobs."""

from __future__ import annotations

from typing import Any

import pytest

from oz_worker.backends import job_object
from oz_worker.backends.base import Unit
from oz_worker.errors import TaskFault
from oz_worker.model import Key, Reason, Sidecar, TaskSpec, unit_name
from oz_worker.settings import KubernetesOptions

KEY = Key("Task 1", "Exec-ABCDEFGH")
UNIT = unit_name(KEY, 1)
WHOSE: dict[str, Any] = {"worker_id": "My Worker", "instance": "inst"}
MCP = '{"a":{"env":{"TOKEN":"$(TASK_ID) $$"}}}'
PLAIN = KubernetesOptions()

FULL: dict[str, Any] = {
    "serviceAccountName": "oz",
    "imagePullSecrets": [{"name": "regcred"}],
    "nodeSelector": {"kubernetes.io/os": "linux"},
    "securityContext": {"runAsNonRoot": True},
    "volumes": [{"name": "cache", "emptyDir": {}}],
    "initContainers": [{"name": "late", "image": "late:1"}],
    "containers": [
        {"name": "helper", "image": "helper:1"},
        {
            "name": "task",
            "image": "ignored",
            "command": ["ignored"],
            "args": ["ignored"],
            "workingDir": "/ignored",
            "imagePullPolicy": "Always",
            "securityContext": {"runAsUser": 1000},
            "env": [{"name": "TASK_ID", "value": "mine"}, {"name": "B", "value": "$(TASK_ID)/$(A)"}],
            "envFrom": [{"configMapRef": {"name": "more"}}],
            "volumeMounts": [{"name": "cache", "mountPath": "/cache"}],
            "resources": {"requests": {"cpu": "2", "memory": "4Gi"}, "limits": {"nvidia.com/gpu": 1}},
            "lifecycle": {"preStop": {"exec": {"command": ["true"]}}},
        },
    ],
}


def spec(**changes: Any) -> TaskSpec:
    values: dict[str, Any] = {
        "key": KEY,
        "run_id": KEY.task_id,
        "argv": ("agent", "run", "--task-id", "t"),
        "environment": {"TASK_ID": "t", "A": "$HOME $(B) $$"},
        "sidecars": (Sidecar("agent:1", "/agent"),),
        **changes,
    }
    return TaskSpec(**values)


def job(options: KubernetesOptions = PLAIN, *, cleanup: bool = True, **changes: Any) -> dict[str, Any]:
    wanted = spec(**changes)
    return job_object.job(options, Unit(UNIT, "inst", KEY, wanted), wanted, cleanup=cleanup, **WHOSE)


def secret(options: KubernetesOptions, **changes: Any) -> dict[str, Any] | None:
    wanted = spec(**changes)
    unit = Unit(UNIT, "inst", KEY, wanted)
    return job_object.secret(options, unit, wanted, job_uid="uid-1", **WHOSE)


def pod(options: KubernetesOptions = PLAIN, **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = job(options, **changes)["spec"]["template"]["spec"]
    return found


def named(containers: list[dict[str, Any]], name: str = "task") -> dict[str, Any]:
    return next(each for each in containers if each["name"] == name)


def names(things: list[dict[str, Any]]) -> list[str]:
    return [each["name"] for each in things]


def template(**fields: Any) -> KubernetesOptions:
    return KubernetesOptions(pod_template=fields)


def refused(options: KubernetesOptions, **changes: Any) -> tuple[Reason | None, str]:
    with pytest.raises(TaskFault) as caught:
        job(options, **changes)
    facts = caught.value.facts
    assert not facts.agent_started
    return facts.reason, facts.detail
