"""Jobs, pods and events as a cluster shows them, and looks at them: the making of the tests of verdicts."""

from __future__ import annotations

from typing import Any, Mapping, NamedTuple, Sequence

from oz_worker.backends.job_facts import (
    NO_WAITS,
    Seen,
    judge,
)
from oz_worker.backends.job_waits import Limits
from oz_worker.model import ExitFacts

LIMITS = Limits(unschedulable=30.0, volume_mount=300.0, image_pull=600.0)
EARLY, LATE = "2026-01-01T00:00:00Z", "2026-01-01T01:00:00Z"
EVENTS_SECONDS = 5.0
Thing = dict[str, Any]


# -- objects as the API has them


def a_job(*conditions: tuple[str, str, str], made_pods: bool = True, **spec: Any) -> Thing:
    status: Thing = {"startTime": EARLY, "active": 1 if made_pods else 0}
    status["conditions"] = [
        {"type": kind, "status": "True", "reason": reason, "message": text} for kind, reason, text in conditions
    ]
    return {"metadata": {"name": "j", "namespace": "ns", "uid": "job-uid"}, "spec": spec, "status": status}


FAILED = a_job(("Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit"))
DEADLINE = a_job(("Failed", "DeadlineExceeded", "Job was active longer than specified deadline"))
COMPLETE = a_job(("SuccessCriteriaMet", "CompletionsReached", ""), ("Complete", "CompletionsReached", ""))
RUNNING = a_job()


def state(**known: Any) -> Thing:
    """The state of a container: `running`, `waiting` with a reason and a message, `code` with a reason."""
    if "waiting" in known:
        return {"waiting": {"reason": known["waiting"], "message": known.get("text", "")}}
    if "code" in known:
        ended = {"exitCode": known["code"], "reason": known.get("reason", "Error"), "finishedAt": LATE}
        ended.update({name: known[name] for name in ("signal", "message", "finishedAt") if name in known})
        return {"terminated": ended}
    return {"running": {"startedAt": EARLY}}


def status_of(name: str, found: Thing, image: str = "img:1") -> Thing:
    return {"name": name, "image": image, "state": found, "lastState": {}, "restartCount": 0}


def condition(kind: str, status: str, reason: str, message: str) -> Thing:
    return {"type": kind, "status": status, "reason": reason, "message": message}


CREATING = state(waiting="ContainerCreating")
PLACED = {"PodScheduled": ("True", "", "")}


def a_pod(
    task: Thing | None = None,
    *,
    phase: str = "Running",
    inits: Mapping[str, Thing] = {},
    others: Mapping[str, Thing] = {},
    conditions: Mapping[str, tuple[str, str, str]] = PLACED,
    native: Sequence[str] = (),
    node: str = "node-1",
    leaving: str = "",
    uid: str = "pod-uid",
    **status: Any,
) -> Thing:
    metadata = {"name": "p", "namespace": "ns", "uid": uid, "creationTimestamp": EARLY}
    metadata["ownerReferences"] = [{"kind": "Job", "uid": "job-uid"}]  # type: ignore[assignment]
    if leaving:
        metadata.update({"deletionTimestamp": leaving, "deletionGracePeriodSeconds": 30})  # type: ignore[dict-item]
    spec = {
        "nodeName": node,
        "initContainers": [{"name": name, **({"restartPolicy": "Always"} if name in native else {})} for name in inits],
        "containers": [{"name": name} for name in ("task", *others)],
    }
    tasks = [status_of("task", task)] if task is not None else []
    full = {
        "phase": phase,
        "conditions": [condition(kind, *rest) for kind, rest in conditions.items()],
        "initContainerStatuses": [status_of(name, found, "side:1") for name, found in inits.items()],
        "containerStatuses": [*tasks, *(status_of(name, found, "other:1") for name, found in others.items())],
        **status,
    }
    return {"metadata": metadata, "spec": {k: v for k, v in spec.items() if v}, "status": full}


def an_event(reason: str, message: str, uid: str = "pod-uid", time: str = EARLY) -> Thing:
    return {"involvedObject": {"uid": uid, "name": "x"}, "reason": reason, "message": message, "lastTimestamp": time}


def disruption(reason: str, message: str = "") -> dict[str, tuple[str, str, str]]:
    return {**PLACED, "DisruptionTarget": ("True", reason, message)}


UNSCHEDULED = {"PodScheduled": ("False", "Unschedulable", "0/1 nodes are available: 1 Insufficient cpu.")}


# -- looking at them


def now(job: Thing | None, *pods: Thing, events: Sequence[Thing] = (), limits: Limits = LIMITS) -> ExitFacts | None:
    """The verdict at first sight."""
    return judge(Seen(job, pods, events, NO_WAITS), limits, 1000.0).facts


class Told(NamedTuple):
    facts: ExitFacts
    after: float


def in_the_end(
    job: Thing | None, *pods: Thing, events: Sequence[Thing] = (), limits: Limits = LIMITS, fresh: bool = True
) -> Told | None:
    """The verdict when nothing changes any more but the time of events, looked for as the verdicts ask.

    None when there is none in two hours.
    """
    clock, waits = 0.0, NO_WAITS
    told: Sequence[Thing] = ()
    read_at = -EVENTS_SECONDS
    while clock < 7200.0:
        verdict = judge(Seen(job, pods, told, waits, fresh), limits, clock)
        waits = verdict.waits
        if verdict.facts is not None:
            return Told(verdict.facts, clock)
        if verdict.wants_fresh and not fresh:
            fresh = True
        elif verdict.wants_events and clock >= read_at + EVENTS_SECONDS:
            told, read_at = [repeated(event, clock) for event in events], clock
        elif verdict.wants_events:
            clock = min(verdict.look_at, read_at + EVENTS_SECONDS)
        else:
            assert verdict.look_at > clock
            clock = verdict.look_at
    return None


def repeated(event: Thing, clock: float) -> Thing:
    """An event that is told of again every two minutes."""
    return {**event, "lastTimestamp": f"2026-01-01T{int(clock // 3600):02}:{int(clock // 120 * 2 % 60):02}:00Z"}


def over(task: Thing | None, phase: str = "Failed", **more: Any) -> Thing:
    return a_pod(task, phase=phase, **more)


def pending(task: Thing | None = CREATING, **more: Any) -> Thing:
    return a_pod(task, phase="Pending", **more)


NO_PODS = a_job(made_pods=False)
