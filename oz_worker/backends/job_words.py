"""What became of a task's Job, in the words of a report: reason, exit code, and the cure. Pure.

Each sentence names the pod or the Job with its namespace, repeats what the cluster says of it, and what to do.
"""

from __future__ import annotations

import signal

from oz_worker.backends.container_order import ENTRYPOINT
from oz_worker.backends.job_pod import COPY, SETUP
from oz_worker.backends.job_seen import Container, End, Job, Pod
from oz_worker.model import ExitFacts, Reason

_SAID = 600
"""How much of what the cluster says is repeated."""
_LOG = "Its last output says why"
_HINTS = {
    126: f", which is what a shell says when {ENTRYPOINT} or its interpreter cannot be run in this image",
    127: f", which is what a shell says when {ENTRYPOINT} or its interpreter is not in this image",
    137: ", that is, it was killed from outside, or its node ran out of memory",
    143: ", that is, something asked it to stop: a drain or shutdown of its node, or somebody who removed the pod",
}
_DISRUPTIONS = {
    "PreemptionByScheduler": "made room for one of a higher priority; give the tasks' pods a higher priority class",
    "DeletionByTaintManager": "was removed because its node is not reachable or has got a taint; look at that node",
    "EvictionByEvictionAPI": "was evicted, as a drain or an autoscaler does it; keep tasks on nodes that stay",
    "DeletionByPodGC": "was removed because its node is gone; keep tasks on nodes that stay",
    "TerminationByKubelet": "was ended by its node, which ran out of something or shut down; see what the node says",
    "Evicted": "was evicted by its node, which ran out of something; see what it ran out of",
    "Preempting": "made room on its node for one that the cluster itself needs; keep room for those",
    "Terminated": "was ended because its node shut down; keep tasks on nodes that stay",
    "NodeLost": "was on a node that is not reachable any more; look at that node",
}
"""Reasons of DisruptionTarget, and of pods that a kubelet ended."""


def succeeded() -> ExitFacts:
    """Facts of an agent that ended well."""
    return ExitFacts(code=0)


def ended(pod: Pod, container: Container, end: End) -> ExitFacts:
    """Facts of the agent's container that ended by itself."""
    where = f"The container {container.name} of {pod.place}"
    if not end.ran:
        detail = (
            f"{where} could not be started:{said(end.message)} The image {container.image} needs /bin/sh and what runs"
            " with it; use another image."
        )
        return ExitFacts(code=end.code, reason=Reason.CONTAINER_START, detail=detail, agent_started=False)
    if end.code == 0:
        return succeeded()
    if end.reason == "OOMKilled":
        detail = (
            f"{where} ran out of memory and was killed (exit code {end.code}); give the task a larger instance shape,"
            " or the container task of pod_template a larger limit."
        )
        return ExitFacts(code=end.code, reason=Reason.CONTAINER_OOM, detail=detail, oom=True)
    detail = f"{where} ended with exit code {_code(end)}.{said(end.message)} {_LOG}."
    return ExitFacts(code=end.code, reason=Reason.CONTAINER_EXIT, detail=detail)


def init_failed(pod: Pod, container: Container, end: End) -> ExitFacts:
    """Facts of a pod of which an init container failed: the agent never ran."""
    what, cure = f"The init container {container.name}", _LOG
    if container.name.startswith(COPY):
        what = f"The copy of the sidecar image {container.image}"
        cure = (
            "The image must have /bin/sh and cp, and the node room for its files; else set"
            " backend.kubernetes.use_image_volumes, which needs neither"
        )
    elif container.name.startswith(SETUP):
        what = "setup_command"
    oom = end.reason == "OOMKilled"
    verb = "ran out of memory and was killed" if oom else f"ended with exit code {_code(end)}"
    detail = f"{what} in {pod.place} {verb if end.ran else 'could not be started'}.{said(end.message)} {cure}."
    return ExitFacts(code=end.code, reason=Reason.INIT_CONTAINER, detail=detail, agent_started=False, oom=oom)


def disrupted(pod: Pod) -> bool:
    """Whether its cluster took the pod away; by what it says in so many words, never by a text."""
    return pod.condition("DisruptionTarget").holds or pod.reason in _DISRUPTIONS


def evicted(pod: Pod, code: int | None) -> ExitFacts:
    """Facts of a pod that its cluster took away."""
    disruption = pod.condition("DisruptionTarget")
    text = pod.message or disruption.message
    why = disruption.reason if disruption.holds else pod.reason
    what = _DISRUPTIONS.get(why, "was taken away by its cluster; see why")
    if "mptyDir" in text or "ephemeral" in text:
        what = "was evicted; raise backend.kubernetes.workspace_size_limit or the limit of ephemeral-storage"
    detail = f"The {pod.place} {what}, then run the task again.{said(text)}"
    return ExitFacts(code=code, reason=Reason.EVICTED, detail=detail)


def lost(pod: Pod) -> ExitFacts:
    """Facts of a pod that was to go and of whose end nobody tells: its node is silent."""
    detail = (
        f"The {pod.place} was to go, and the node {pod.node or 'it ran on'} does not say that it ended; the node is"
        f" probably lost.{said(pod.condition('DisruptionTarget').message)} Look at the node, then run the task again."
    )
    remains = f"{pod.place} on the node {pod.node or 'it ran on'}"
    return ExitFacts(reason=Reason.EVICTED, detail=detail, remains=remains)


def refused_by_node(pod: Pod) -> ExitFacts:
    """Facts of a pod that was placed on a node which did not take it."""
    detail = (
        f"The node {pod.node} refused the {pod.place} ({pod.reason}).{said(pod.message)} Look at what the node has"
        " free, then run the task again."
    )
    return ExitFacts(reason=Reason.UNSCHEDULABLE, detail=detail)


def over_deadline(job: Job, pod: Pod | None, code: int | None, waiting: str) -> ExitFacts:
    """Facts of a Job, or a pod, that was ended at its `activeDeadlineSeconds`."""
    still = f" It was still waiting then:{said(waiting)}" if waiting else ""
    detail = (
        f"The {job.place} ran longer than its activeDeadlineSeconds and was ended; give the task less to do, or raise"
        f" backend.kubernetes.active_deadline_seconds.{still}"
    )
    if pod is not None and pod.reason == "DeadlineExceeded":
        detail = f"The {pod.place} ran longer than the activeDeadlineSeconds of pod_template; raise it.{still}"
    return ExitFacts(code=code, reason=Reason.ACTIVE_DEADLINE, detail=detail)


def removed_pod(pod: Pod, code: int | None) -> ExitFacts:
    """Facts of a pod that somebody removed while its agent ran."""
    before = "begun; run" if pod.agent_never_began else "ended; look at what it had pushed, then run"
    detail = f"The {pod.place} was removed from outside before the agent had {before} the task again."
    return ExitFacts(code=code, reason=Reason.JOB_FAILED, detail=detail)


def removed_job(job: Job, code: int | None) -> ExitFacts:
    """Facts of a Job that somebody removed, or that was removed before anybody looked."""
    detail = (
        f"The {job.place} was removed from outside, or its TTL ended before this worker saw how it ended; look at what"
        " the agent had pushed, then run the task again."
    )
    return ExitFacts(code=code, reason=Reason.JOB_WATCH, detail=detail)


def job_failed(job: Job, pod: Pod | None, text: str) -> ExitFacts:
    """Facts of a Job that failed for a reason that no pod tells."""
    failed = job.condition("Failed")
    why = ": ".join(filter(None, (failed.reason, failed.message)))
    shown = ": ".join(filter(None, (pod.reason, pod.message))) if pod is not None else ""
    about = "; its pod is gone, so the agent's exit code is not known" if pod is None else f", in the {pod.place}"
    detail = (
        f"The {job.place} failed{about}.{said(why)}{said(text or shown)} See `kubectl describe"
        f" job {job.name} --namespace {job.namespace}`, then run the task again."
    )
    return ExitFacts(reason=Reason.JOB_FAILED, detail=detail)


def said(text: str) -> str:
    """What the cluster says, as a part of a sentence, bounded; nothing for nothing."""
    one_line = " ".join(text.split())
    cut = one_line if len(one_line) <= _SAID else one_line[:_SAID] + " …"
    return f" {cut}{'' if cut.endswith(('.', '…')) else '.'}" if cut else ""


def _code(end: End) -> str:
    """The code, and the signal that it stands for."""
    try:
        name = f" ({signal.Signals(end.signal).name})" if end.signal else ""
    except ValueError:
        name = ""
    return f"{end.code}{name}{_HINTS.get(end.code, '')}"
