"""The objects that a task is in a cluster: their names, labels and annotations, the Job, its Secret. Pure.

Names and labels are those of the existing worker (oz.md 12.2), so that what selects on them goes on working. They are
lossy; the ids as they are stand in annotations.
"""

from __future__ import annotations

import hashlib
import math
import re
from typing import Any, Mapping

from oz_worker.backends import job_pod
from oz_worker.backends.base import Unit
from oz_worker.backends.job_env import Hidden, hidden
from oz_worker.backends.job_template import TASK, Object, free, own_container, template_of
from oz_worker.backends.sidecar_asked import SidecarUnusable
from oz_worker.errors import TaskFault
from oz_worker.model import ExitFacts, Key, Reason, TaskSpec, unit_name
from oz_worker.settings import KubernetesOptions

ROLE_TASK, ROLE_PREFLIGHT = "task", "preflight"
INSTANCE, ROLE, UNIT = "oz-worker-instance", "oz-worker-role", "oz-worker-unit"
WORKER_HASH = "oz-worker-hash"
TASK_ID, EXECUTION_ID, WORKER_ID = "oz.warp.dev/task-id", "oz.warp.dev/execution-id", "oz.warp.dev/worker-id"
TTL_SECONDS = 86400
"""How long an ended Job is kept when the configuration does not say."""
_DEFAULT_CONTAINER = "kubectl.kubernetes.io/default-container"
_PREFLIGHT_RESOURCES = {"requests": {"cpu": "10m", "memory": "16Mi"}, "limits": {"cpu": "100m", "memory": "64Mi"}}
_PREFLIGHT_VOLUME, _PREFLIGHT_PATH = "preflight-image", "/mnt/oz-preflight"
_PREFLIGHT_TTL_SECONDS = 300
_PREFLIGHT_SPARE_SECONDS = 30
"""The worker itself ends it at its time, and knows better why; this is for one that was killed."""
_LONGEST_NAME, _LONGEST_LABEL = 63, 63
_EXECUTION_PART = 8
_LONGEST_ID = 4096
_LABEL_VALUE = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")


def job_name(key: Key) -> str:
    """The name of a task's Job, and of its Secret: always a DNS label, not always another one for another task."""
    execution = _dns(_execution(key)[-_EXECUTION_PART:]) or "exec"
    room = _LONGEST_NAME - len(f"oz-task--exec-{execution}")
    run = _dns(key.task_id)[:room].strip("-") or "run"
    return f"oz-task-{run}-exec-{execution}"


def labels(
    options: KubernetesOptions, *, worker_id: str, instance: str, key: Key | None, role: str, unit: str = ""
) -> dict[str, str]:
    """What selects the objects of a worker, of an instance, of a task. The operator's labels never replace them."""
    found = {
        **options.extra_labels,
        "oz-worker-id": _label(worker_id),
        WORKER_HASH: _hash(worker_id),
        INSTANCE: _instance_label(instance),
        ROLE: role,
    }
    if key is not None:
        found.update(
            {
                "oz-task-id": _label(key.task_id),
                "oz-task-hash": _hash(key.task_id),
                "oz-execution-id": _label(_execution(key)),
                "oz-execution-hash": _hash(_execution(key)),
            }
        )
    if unit:
        found[UNIT] = unit
    return found


def annotations_for(options: KubernetesOptions, *, worker_id: str, key: Key | None) -> dict[str, str]:
    """The ids as they are, beside the operator's annotations."""
    ids = {} if key is None else {TASK_ID: key.task_id, EXECUTION_ID: key.execution_id}
    return {**options.extra_annotations, **ids, WORKER_ID: worker_id}


def selector(*, worker_id: str, instance: str, role: str = ROLE_TASK) -> str:
    """The label selector of what an instance of a worker made: for a list, a watch, a removal. No role: every one."""
    wanted = {WORKER_HASH: _hash(worker_id), INSTANCE: _instance_label(instance), **({ROLE: role} if role else {})}
    return ",".join(f"{name}={value}" for name, value in wanted.items())


def key_of(job: Mapping[str, Any]) -> Key | None:
    """Which task a Job (or pod, or Secret) is of, by its annotations; None for one that is no task's."""
    notes = _section(job, "annotations")
    task_id, execution_id = notes.get(TASK_ID), notes.get(EXECUTION_ID, "")
    if not isinstance(task_id, str) or not task_id or not isinstance(execution_id, str):
        return None
    return Key(task_id, execution_id)


def unit_of(job: Mapping[str, Any]) -> str:
    """The unit a Job is of; without its label that of its task's first attempt, "" for no task's."""
    name, key = _section(job, "labels").get(UNIT), key_of(job)
    if isinstance(name, str) and name:
        return name
    return unit_name(key, 1) if key is not None else ""


def job(
    options: KubernetesOptions, unit: Unit, spec: TaskSpec, *, worker_id: str, instance: str, cleanup: bool = True
) -> Object:
    """The Job of a unit. Without *cleanup* it is kept for ever.

    Raises TaskFault with one sentence: reason `sidecar_prep` for a sidecar that cannot be given, `job_create` for
    anything else that cannot.
    """
    key, name = unit.key, job_name(unit.key)
    try:
        _check_ids(key, worker_id)
        pod = job_pod.pod(options, spec, secret_name=name, away=hidden(options, unit.name, spec))
    except SidecarUnusable as error:
        raise _fault(Reason.SIDECAR_PREP, str(error)) from error
    except ValueError as error:
        raise _fault(Reason.JOB_CREATE, str(error)) from error
    tags = labels(options, worker_id=worker_id, instance=instance, key=key, role=ROLE_TASK, unit=unit.name)
    notes = annotations_for(options, worker_id=worker_id, key=key)
    ttl = TTL_SECONDS if options.ttl_seconds_after_finished is None else options.ttl_seconds_after_finished
    return _job(name, tags, notes, pod, deadline=options.active_deadline_seconds, ttl=ttl if cleanup else None)


def secret(
    options: KubernetesOptions, unit: Unit, spec: TaskSpec, *, worker_id: str, instance: str, job_uid: str
) -> Object | None:
    """The Secret of a unit, owned by its Job, which it goes with; None when nothing is in it. Raises TaskFault."""
    try:
        away: Hidden = hidden(options, unit.name, spec)
    except ValueError as error:
        raise _fault(Reason.JOB_CREATE, str(error)) from error
    if not away.data:
        return None
    name = job_name(unit.key)
    tags = labels(options, worker_id=worker_id, instance=instance, key=unit.key, role=ROLE_TASK, unit=unit.name)
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": job_uid}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": name,
            "labels": tags,
            "annotations": annotations_for(options, worker_id=worker_id, key=unit.key),
            "ownerReferences": [owner],
        },
        "type": "Opaque",
        "immutable": True,
        "data": dict(away.data),
    }


def preflight_job(options: KubernetesOptions, *, worker_id: str, instance: str, stamp: int) -> Object:
    """The Job that shows at start that tasks can run: *stamp* makes its name its own.

    It has what decides about a task's pod - the template's place, account, secrets and volumes, the labels and
    annotations, a root init container or an image volume - and ends by itself, also after a kill of the worker. Raises
    ValueError with one sentence where the template cannot be laid over.
    """
    template = template_of(options)
    main: Object = {
        "name": TASK,
        "image": options.preflight_image,
        "imagePullPolicy": options.image_pull_policy,
        "command": ["true"],
        "resources": {**(options.preflight_resources or _PREFLIGHT_RESOURCES)},
    }
    init, volumes = [], list(template["volumes"])
    if options.use_image_volumes:
        name = free(_PREFLIGHT_VOLUME, (volume.get("name") for volume in volumes))
        volumes.append(job_pod.image_volume(name, options.preflight_image, options.image_pull_policy))
        main["volumeMounts"] = [{"name": name, "mountPath": _PREFLIGHT_PATH, "readOnly": True}]
    else:
        init.append({**main, "name": "root", "securityContext": job_pod.as_root()})
    if context := own_container(template).get("securityContext"):
        main["securityContext"] = context
    pod = {**template, "restartPolicy": "Never", "volumes": volumes, "initContainers": init, "containers": [main]}
    return _job(
        f"oz-preflight-{_hash(worker_id)}-{stamp}",
        labels(options, worker_id=worker_id, instance=instance, key=None, role=ROLE_PREFLIGHT),
        annotations_for(options, worker_id=worker_id, key=None),
        pod,
        deadline=math.ceil(options.preflight_timeout) + _PREFLIGHT_SPARE_SECONDS,
        ttl=_PREFLIGHT_TTL_SECONDS,
    )


def _job(
    name: str, tags: dict[str, str], notes: dict[str, str], pod: Object, *, deadline: int | None, ttl: int | None
) -> Object:
    """One pod, once: no second one is ever started for a pod that failed or went away."""
    limits = {"activeDeadlineSeconds": deadline, "ttlSecondsAfterFinished": ttl}
    shown = {_DEFAULT_CONTAINER: TASK, **notes}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "labels": tags, "annotations": notes},
        "spec": {
            "backoffLimit": 0,
            **{limit: value for limit, value in limits.items() if value is not None},
            "template": {"metadata": {"labels": dict(tags), "annotations": shown}, "spec": pod},
        },
    }


def _check_ids(key: Key, worker_id: str) -> None:
    """What an annotation must bring back unchanged."""
    for what, text in (("task id", key.task_id), ("execution id", key.execution_id), ("worker id", worker_id)):
        if len(text) > _LONGEST_ID:
            raise ValueError(f"the {what} is longer than {_LONGEST_ID} characters; give it a shorter one")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"the {what} {text!r} is not valid UTF-8, which is all that Kubernetes takes") from None


def _fault(reason: Reason, sentence: str) -> TaskFault:
    return TaskFault(ExitFacts(reason=reason, detail=sentence, agent_started=False))


def _execution(key: Key) -> str:
    return key.execution_id.strip() or key.task_id


def _dns(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "-", text.lower()).strip("-")


def _label(text: str) -> str:
    whole = re.sub(r"[^a-z0-9_.-]", "-", text.lower()).strip("-_.")
    return whole[:_LONGEST_LABEL].strip("-_.") or "unknown"


def _instance_label(instance: str) -> str:
    """An instance's id as a label; one that cannot be one (`-a`) gets a spelling that no other instance has."""
    return instance if _LABEL_VALUE.fullmatch(instance) else f"{_label(instance)[:40]}.{_hash(instance)}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _section(found: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    metadata = found.get("metadata")
    section = metadata.get(name) if isinstance(metadata, Mapping) else None
    return section if isinstance(section, Mapping) else {}
