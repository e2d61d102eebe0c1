"""What keeps a pod from starting: why, how long it may take to heal, and what to say when it does not. Pure."""

from __future__ import annotations

import re
from typing import Any, Iterator, Mapping, NamedTuple, Sequence

from oz_worker.backends.job_seen import Container, Event, Job, Pod
from oz_worker.backends.job_template import TASK
from oz_worker.backends.job_words import said
from oz_worker.model import ExitFacts, Reason
from oz_worker.settings import KubernetesOptions
from oz_worker.timing import format_duration

DEFINITE_SECONDS = 60.0
"""For what heals only when somebody mends it: a registry's plain no, a ConfigMap that is not there, a denied pod."""
CRASHING_SECONDS = 300.0
"""For a native sidecar that never gets up."""
OUTAGE_SECONDS = 600.0
"""For pods that the API server cannot make because something of its own is down."""

_IMAGE = (
    *("ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "RegistryUnavailable", "ImageInspectError"),
    "SignatureValidationFailed",
)
_CREATE = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError", "PreCreateHookError")
_NO = re.compile(
    r"(?i)manifest unknown|not found|does not exist|denied|unauthorized|forbidden|authentication required"
    r"|no basic auth|no matching manifest|no match for platform|not present with pull policy|name unknown"
)
_PERHAPS = re.compile(
    r"(?i)no such host|timeout|timed out|connection re|unreachable|handshake|deadline exceeded|too ?many ?requests|eof"
    r"|server error|unavailable|bad gateway|\b(429|50[0-4])\b"
)
_MOUNT = ("FailedMount", "FailedAttachVolume", "FailedMapVolume")
_SANDBOX = ("FailedCreatePodSandBox", "FailedCreatePodSandbox")
_BEYOND_MOUNT = ("Pulling", "Pulled", "Created", "Started", "Failed", "BackOff")
"""Events that a pod has only once its volumes are there."""
_MOUNTS_DONE = "PodReadyToStartContainers"


class Limits(NamedTuple):
    """How long each may last, in seconds; for the first three, which the configuration says, 0 is for ever."""

    unschedulable: float
    volume_mount: float
    image_pull: float
    definite: float = DEFINITE_SECONDS
    crashing: float = CRASHING_SECONDS
    outage: float = OUTAGE_SECONDS

    def within(self, seconds: float) -> Limits:
        """The same where nothing may last longer than *seconds*."""
        return Limits(*(min(limit, seconds) if limit else seconds for limit in self))

    @classmethod
    def of(cls, options: KubernetesOptions) -> Limits:
        """Those of the configuration."""
        return cls(options.unschedulable_timeout, options.volume_mount_timeout, options.image_pull_timeout)


class Wait(NamedTuple):
    """One thing that is waited for. `limit` None is for ever, 0 not at all; `cure` ends what is reported.

    Only events tell of some: then `stamp` is the time of the newest one, and without a newer one it heals.
    """

    key: str
    limit: float | None
    reason: Reason
    what: str
    text: str
    cure: str
    stamp: str = ""

    def facts(self, waited: float) -> ExitFacts:
        """What is reported when it does not heal."""
        long = f" for {format_duration(waited)}" if waited >= 1 else ""
        return ExitFacts(reason=self.reason, detail=f"{self.what}{long}.{said(self.text)} {self.cure}.")


def of_job(job: Job, events: Sequence[Event], limits: Limits) -> Iterator[Wait]:
    """Why a Job has no pod, as far as *events* tell."""
    refused = next((event.message for event in reversed(events) if event.reason == "FailedCreate"), "")
    if not refused:
        return
    what = f"No pod could be made for the {job.place}"
    if "exceeded quota" in refused or "must specify" in refused:
        cure = "Raise the namespace's quota, wait for other pods to end, or let tasks ask for less"
        yield Wait("job:quota", limits.unschedulable or None, Reason.UNSCHEDULABLE, what, refused, cure)
        return
    cure = "Let the namespace's admission accept such pods, or change pod_template to what it accepts"
    limit = limits.definite
    if "serviceaccount" in refused:
        cure = "Make that service account, or name another one in pod_template"
    elif "failed calling webhook" in refused or (_PERHAPS.search(refused) and "denied" not in refused):
        limit = limits.outage
        cure = "Get what the API server asks there to work again"
    yield Wait("job:refused", limit, Reason.JOB_CREATE, what, refused, cure)


def of_pod(pod: Pod, events: Sequence[Event], limits: Limits) -> Iterator[Wait]:
    """What a pod that has not started its agent waits for, as far as its state and *events* tell."""
    scheduled = pod.condition("PodScheduled")
    if not pod.node and not scheduled.holds:
        yield from _unscheduled(pod, limits)
        return
    for container in pod.containers:
        if container.waiting and (container.init or container.name == TASK):
            yield from _of_container(pod, container, _told(container, events), limits)
    yield from _unmounted(pod, events, limits)


def is_of_mount(event: Mapping[str, Any]) -> bool:
    """Whether an event, as the API has it, complains of a volume or of the sandbox."""
    return event.get("reason") in (*_MOUNT, *_SANDBOX)


def complains(pod: Pod) -> bool:
    """Whether a container that decides waits for an image, or cannot be created."""
    return any(each.waiting in (*_IMAGE, *_CREATE) for each in pod.containers if each.init or each.name == TASK)


def quiet(pod: Pod) -> bool:
    """Whether a pod is on a node and does not start, and only events can tell why."""
    if not pod.node or pod.phase != "Pending" or pod.condition(_MOUNTS_DONE).holds:
        return False
    return not complains(pod) and not any(each.started or each.end for each in pod.containers)


def _unscheduled(pod: Pod, limits: Limits) -> Iterator[Wait]:
    scheduled = pod.condition("PodScheduled")
    if scheduled.reason == "SchedulingGated":
        return  # whoever put the gate there opens it
    what = f"No node took the {pod.place}"
    cure = (
        "Add a node, let tasks ask for less, correct nodeSelector and tolerations in pod_template, or raise"
        " backend.kubernetes.unschedulable_timeout so that an autoscaler has the time"
    )
    limit = limits.unschedulable
    if not scheduled.status:
        what, limit = f"No scheduler looked at the {pod.place}", limit and max(limit, limits.definite)
        cure = "See whether the scheduler that pod_template names, or the cluster's own, runs"
    yield Wait(f"{pod.uid}:node", limit or None, Reason.UNSCHEDULABLE, what, scheduled.message, cure)


def _told(container: Container, events: Sequence[Event]) -> str:
    """Why a container waits: its state's message, and the cause that an event has where that only says "back-off"."""
    causes = [event.message for event in events if event.reason == "Failed" and container.image in event.message]
    if container.waiting != "ImagePullBackOff" or not causes or causes[-1] in container.message:
        return container.message
    return f"{container.message}: {causes[-1]}" if container.message else causes[-1]


def _of_container(pod: Pod, container: Container, text: str, limits: Limits) -> Iterator[Wait]:
    where, key = f"container {container.name} of {pod.place}", f"{pod.uid}:{container.name}"
    if container.waiting == "InvalidImageName":
        what = f"The image {container.image} for the {where} is no name of an image"
        cure = "Write it like registry.example.com/team/image:tag"
        yield Wait(f"{key}:name", 0.0, Reason.INVALID_IMAGE, what, text, cure)
    elif container.waiting in _IMAGE:
        what = f"The image {container.image} for the {where} could not be pulled"
        cure = "Check its name and tag, imagePullSecrets in pod_template, and the way from the node to the registry"
        yield Wait(f"{key}:image", limits.image_pull or None, Reason.IMAGE_PULL, what, text, cure)
        if limits.image_pull and is_definite(text):
            limit = min(limits.image_pull, limits.definite)
            yield Wait(f"{key}:no-image", limit, Reason.IMAGE_PULL, what, text, cure)
    elif container.waiting in _CREATE:
        what = f"The {where} could not be created ({container.waiting})"
        cure = "Make what it names, or correct pod_template"
        yield Wait(f"{key}:create", limits.definite, Reason.CONTAINER_CREATE, what, text, cure)
    elif container.waiting == "CrashLoopBackOff" and container.init:
        what = f"The native sidecar {container.name} of {pod.place} does not get up"
        cure = "Its last output says why"
        yield Wait(f"{key}:crash", limits.crashing, Reason.INIT_CONTAINER, what, text, cure)


def is_definite(message: str) -> bool:
    """Whether a registry said no, so that asking again does not help."""
    return _NO.search(message) is not None and _PERHAPS.search(message) is None


def _unmounted(pod: Pod, events: Sequence[Event], limits: Limits) -> Iterator[Wait]:
    """Volumes and the sandbox, of which only events tell; none, once an event shows that they are there."""
    if not quiet(pod) or any(event.reason in _BEYOND_MOUNT for event in events):
        return
    limit, newest = limits.volume_mount or None, {event.reason: event for event in events}
    if mount := next((newest[reason] for reason in _MOUNT if reason in newest), None):
        cure = "Make the volume, ConfigMap or Secret that it names, or correct the volumes of pod_template"
        what = f"The volumes of {pod.place} could not be mounted"
        yield Wait(f"{pod.uid}:mount", limit, Reason.VOLUME_MOUNT, what, mount.message, cure, mount.time)
    elif sandbox := next((newest[reason] for reason in _SANDBOX if reason in newest), None):
        cure = f"Look at the network plugin and the container runtime of the node {pod.node}"
        what = f"The node {pod.node} could not set up the {pod.place}"
        yield Wait(f"{pod.uid}:sandbox", limit, Reason.CONTAINER_CREATE, what, sandbox.message, cure, sandbox.time)
