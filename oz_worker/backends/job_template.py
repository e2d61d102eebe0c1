"""The operator's `pod_template`, ready to be laid over: copied, its lists there, what must be a mapping one. Pure."""

from __future__ import annotations

import copy
from typing import Any, Iterable, Mapping

from oz_worker.backends.container_order import WORKSPACE
from oz_worker.model import plain_path
from oz_worker.settings import KubernetesOptions

TASK = "task"
"""The name of the agent's container, in the template and in the pod."""

Object = dict[str, Any]


def template_of(options: KubernetesOptions) -> Object:
    """A copy of the template. Raises ValueError with one sentence where it cannot be laid over.

    No token of the cluster's API gets in unless it was asked for: who names a service account, or says so outright,
    wants its token; to everybody else a task's agent is a stranger, and the namespace's default account none of its
    business.
    """
    template = copy.deepcopy(dict(options.pod_template))
    for name in ("containers", "initContainers", "volumes"):
        template[name] = _entries(template.get(name), name)
    for container in template["containers"]:
        where = f"the container {container.get('name')}: "
        for name in ("env", "envFrom", "volumeMounts"):
            if name in container:
                container[name] = _entries(container[name], where + name)
        if "resources" in container:
            container["resources"] = _resources(container["resources"], where)
    for mount in own_container(template).get("volumeMounts", ()):
        if mount_path(mount) == WORKSPACE:
            raise ValueError(
                f"pod_template mounts the volume {mount.get('name')} at {WORKSPACE}, which is each task's own working"
                " directory; mount it elsewhere"
            )
    account = template.get("serviceAccountName") or template.get("serviceAccount")
    if template.get("automountServiceAccountToken") is None and not account:
        template["automountServiceAccountToken"] = False
    return template


def own_container(template: Mapping[str, Any]) -> Object:
    """The template's container `task`; an empty one when it has none."""
    return next((entry for entry in template["containers"] if entry.get("name") == TASK), {})


def mount_path(mount: Mapping[str, Any]) -> str:
    """Where a volume is mounted, in its plain spelling."""
    return plain_path(str(mount.get("mountPath")))


def free(name: str, taken: Iterable[Any]) -> str:
    """*name*, or with something behind it when the template uses it already."""
    used = set(taken)
    return next(each for each in (name, *(f"{name}-oz{number}" for number in range(len(used)))) if each not in used)


def _entries(value: Any, what: str) -> list[Object]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(entry, Mapping) for entry in value):
        raise ValueError(f"pod_template: {what} must be a list of mappings (lines that begin with `- name:`)")
    return value


def _resources(value: Any, where: str) -> Object:
    found = _mapping(value, f"{where}resources")
    return {**found, **{axis: _mapping(found[axis], where + axis) for axis in ("requests", "limits") if axis in found}}


def _mapping(value: Any, what: str) -> Object:
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"pod_template: {what} must be a mapping (lines like `cpu: 2`)")
    return dict(value or {})
