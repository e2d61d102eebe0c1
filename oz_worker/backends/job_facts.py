"""What became of a task's Job: the verdict on what a cluster shows of it. Pure, without a clock of its own.

The Job's own word wins: Complete is success, whatever the events of its pods say. Of the pod only the agent's container
and the init containers decide, not what else the template runs beside them. What a pod shows is the end of the task
only when the Job has had JOB_SECONDS to say so itself (design 12, rule 27); what can heal has its time to.
"""

from __future__ import annotations

import dataclasses
from types import MappingProxyType
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Sequence

from oz_worker.backends import container_facts, job_waits, job_words
from oz_worker.backends.job_seen import End, Event, Job, Pod, read_events, read_job, read_pods
from oz_worker.backends.job_seen import about as about
from oz_worker.backends.job_seen import agent_started as agent_started
from oz_worker.backends.job_seen import censored as censored
from oz_worker.backends.job_seen import gone as gone
from oz_worker.backends.job_seen import has_failed as has_failed
from oz_worker.backends.job_seen import is_alive as is_alive
from oz_worker.backends.job_seen import pruned as pruned
from oz_worker.backends.job_template import TASK
from oz_worker.backends.job_waits import Limits, Wait
from oz_worker.backends.job_waits import is_of_mount as is_of_mount
from oz_worker.model import ExitFacts, Reason

JOB_SECONDS = 30.0
"""How long a pod may be over before its Job says so."""
POD_SECONDS = 5.0
"""How long a Job may have failed before its pod shows how: they are told of by two streams."""
LEAVING_SECONDS = 60.0
"""How long a pod that was to go may take beyond its grace before its node counts as lost."""
ANNOUNCED_SECONDS = 180.0
"""How long a pod may be marked for an end that nobody orders: a preemption that was given up leaves the mark on a pod
that runs on, and the cluster itself takes it off after 2 minutes."""
_STALE_SECONDS = 150.0
"""A kubelet repeats what it complains of at least every 122 s."""
_QUIET_SECONDS = 10.0
_NO_POD_SECONDS = 3.0
_NEVER = float("inf")

Waits = Mapping[str, float]
"""Since when what is waited for has been seen, monotonic: kept by the caller between two verdicts on one Job."""
NO_WAITS: Waits = MappingProxyType({})


class Seen(NamedTuple):
    """What is known of a Job: the objects as the API gives them, or `pruned`.

    `pods` has also those that are `gone` since; `events` may have some of other objects, and none until they are
    wanted. `fresh` is False for what may be old, like the state of a watch that has broken off.
    """

    job: Mapping[str, Any] | None
    pods: Sequence[Mapping[str, Any]]
    events: Sequence[Mapping[str, Any]]
    waits: Waits
    fresh: bool = True


class Verdict(NamedTuple):
    """`facts` of the end, or None; then look again when something changes, and at `look_at` (monotonic) at the latest.

    `wants_events`: those of the Job and its pods could tell more now. `wants_fresh`: the time is up, but by what may
    be old; read Job and pods anew and ask again.
    """

    facts: ExitFacts | None
    waits: Waits
    look_at: float = _NEVER
    wants_events: bool = False
    wants_fresh: bool = False


def judge(seen: Seen, limits: Limits, now: float) -> Verdict:
    """The verdict at the monotonic time *now*.

    `agent_started` of the facts is False where what was seen proves that the agent had not begun: who then ends the
    Job looks once more whether it had begun in between.
    """
    job = read_job(seen.job)
    pods = read_pods(seen.pods, job.uid)
    events = read_events(seen.events, (job.uid, *(pod.uid for pod in pods)))
    if job.condition("Complete").holds:
        return Verdict(job_words.succeeded(), NO_WAITS)
    clock = _Clock(seen.waits, now)
    curious_at = _curious_at(job, pods, clock, limits)
    look_at = curious_at if curious_at > now else _NEVER
    for due in _pending(job, pods, events, limits):
        if due.stamp and now - clock.since(f"{due.key}@{due.stamp}") > _STALE_SECONDS:
            continue
        since = clock.since(due.key)
        if due.limit is None:
            continue
        if now < since + due.limit:
            look_at = min(look_at, since + due.limit)
        elif seen.fresh or due.proven:
            return Verdict(_with_start(due.facts(now - since), job, pods), clock.waits)
        else:
            return Verdict(None, clock.waits, now, wants_events=True, wants_fresh=True)
    return Verdict(None, clock.waits, look_at, wants_events=curious_at <= now)


class _Clock:
    """Since when things are so: what is not asked for in one verdict begins anew in a later one."""

    def __init__(self, waits: Waits, now: float) -> None:
        self.waits: dict[str, float] = {}
        self._earlier = waits
        self._now = now

    def since(self, key: str) -> float:
        self.waits[key] = self._earlier.get(key, self._now)
        return self.waits[key]


class _Due(NamedTuple):
    """What is decided once it has lasted for `limit` seconds (None: never).

    `stamp` is as in Wait; `proven` what the Job says itself, which does not change any more.
    """

    key: str
    limit: float | None
    facts: Callable[[float], ExitFacts]
    stamp: str = ""
    proven: bool = False


def _pending(job: Job, pods: Sequence[Pod], events: Sequence[Event], limits: Limits) -> Iterator[_Due]:
    """What becomes a verdict, now or later."""
    pod = pods[-1] if pods else None
    if job.condition("Failed").holds:
        told = _over_deadline(job) or (pod is not None and (pod.over or pod.gone))
        limit = 0.0 if told else POD_SECONDS
        yield _Due("job:failed", limit, lambda waited: _failed(job, pod, events, limits), proven=True)
    elif pod is None:
        if not job.made_pods and not job.suspended:
            yield from map(_due, job_waits.of_job(job, events, limits))
    elif pod.over:
        yield _Due(f"{pod.uid}:over", JOB_SECONDS, lambda waited: _of_pod(job, pod, limits))
    elif pod.gone:
        yield _Due(f"{pod.uid}:gone", JOB_SECONDS, lambda waited: _taken_away(pod))
    elif not pod.leaving and pod.phase != "Unknown" and job_words.disrupted(pod):
        yield _Due(f"{pod.uid}:announced", ANNOUNCED_SECONDS, lambda waited: job_words.lost(pod))
    elif pod.leaving or pod.phase == "Unknown":
        yield _Due(f"{pod.uid}:leaving", pod.grace + LEAVING_SECONDS, lambda waited: job_words.lost(pod))
    elif not pod.agent_began:
        yield from map(_due, job_waits.of_pod(pod, events, limits))


def _due(wait: Wait) -> _Due:
    return _Due(wait.key, wait.limit, wait.facts, wait.stamp)


def _curious_at(job: Job, pods: Sequence[Pod], clock: _Clock, limits: Limits) -> float:
    """From when on events could tell why nothing happens."""
    if job.condition("Failed").holds:
        return _NEVER
    if not pods:
        return _NEVER if job.made_pods or job.suspended else clock.since("job:quiet") + _NO_POD_SECONDS
    pod = pods[-1]
    if pod.over or pod.agent_began:
        return _NEVER
    if job_waits.complains(pod):
        return clock.since(f"{pod.uid}:complains")
    if job_waits.quiet(pod) and limits.volume_mount:
        return clock.since(f"{pod.uid}:quiet") + min(_QUIET_SECONDS, limits.volume_mount / 4)
    return _NEVER


def _over_deadline(job: Job) -> bool:
    return job.condition("Failed").reason == "DeadlineExceeded"


def _failed(job: Job, pod: Pod | None, events: Sequence[Event], limits: Limits) -> ExitFacts:
    """Facts of a Job that says that it failed."""
    if _over_deadline(job):
        return job_words.over_deadline(job, pod, _code(pod), _waiting(job, pod, events, limits))
    if pod is None:
        return job_words.job_failed(job, None, events[-1].message if events else "")
    return _of_pod(job, pod, limits)


def _of_pod(job: Job, pod: Pod, limits: Limits) -> ExitFacts:
    """Facts of a pod that is over, or of whose Job that is said."""
    task = pod.container(TASK)
    if job_words.disrupted(pod):
        return job_words.evicted(pod, _code(pod))
    if pod.reason == "DeadlineExceeded":
        return job_words.over_deadline(job, pod, _code(pod), _waiting(job, pod, (), limits))
    if pod.broken is not None and pod.broken.end is not None:
        return job_words.init_failed(pod, pod.broken, pod.broken.end)
    if task is not None and task.end is not None:
        removed = pod.leaving and (task.end.code == 0 or not _ended_before(task.end, pod))
        return job_words.removed_pod(pod, task.end.code) if removed else job_words.ended(pod, task, task.end)
    if pod.phase == "Succeeded" and not pod.leaving:
        return job_words.succeeded()
    if pod.leaving or pod.gone:
        return job_words.removed_pod(pod, None)
    if pod.phase == "Failed" and pod.reason and not any(each.started for each in pod.containers):
        return job_words.refused_by_node(pod)
    return job_words.job_failed(job, pod, _waiting(job, pod, (), limits))


def _ended_before(end: End, pod: Pod) -> bool:
    """Whether the agent ended before the pod was told to go; in the same second, whether no signal ended it."""
    if end.finished is None or pod.asked_to_go is None:
        return False
    return end.finished < pod.asked_to_go or (end.finished == pod.asked_to_go and not end.signal)


def _taken_away(pod: Pod) -> ExitFacts:
    return job_words.evicted(pod, None) if job_words.disrupted(pod) else job_words.removed_pod(pod, None)


def _waiting(job: Job, pod: Pod | None, events: Sequence[Event], limits: Limits) -> str:
    """What the agent still waited for, in the cluster's words; "" when it had begun."""
    if pod is not None and pod.agent_began:
        return ""
    waits = job_waits.of_pod(pod, events, limits) if pod is not None else job_waits.of_job(job, events, limits)
    return next((wait.text for wait in waits), "")


def waits_for(seen: Seen, limits: Limits) -> str:
    """What a Job whose agent has not begun waits for, in our words and the cluster's; "" when it has begun."""
    job = read_job(seen.job)
    pods = read_pods(seen.pods, job.uid)
    if any(pod.agent_began for pod in pods):
        return ""
    events = read_events(seen.events, (job.uid, *(pod.uid for pod in pods)))
    found = job_waits.of_pod(pods[-1], events, limits) if pods else job_waits.of_job(job, events, limits)
    told = next((f"{wait.what}.{job_words.said(wait.text)} {wait.cure}" for wait in found), "")
    return told or (f"the {pods[-1].place} to start" if pods else f"the cluster to make a pod for the {job.place}")


def _code(pod: Pod | None) -> int | None:
    task = pod.container(TASK) if pod is not None else None
    return task.end.code if task is not None and task.end is not None else None


def _with_start(facts: ExitFacts, job: Job, pods: Sequence[Pod]) -> ExitFacts:
    """The facts, saying that the agent never began where that is proven."""
    never = all(pod.agent_never_began for pod in pods) and (bool(pods) or not job.made_pods)
    return dataclasses.replace(facts, agent_started=False) if facts.reason is not None and never else facts


def vanished(job: Mapping[str, Any] | None, pods: Sequence[Mapping[str, Any]]) -> ExitFacts:
    """Facts of a Job that does not exist any more, from its last state and its pods' (a TTL may have passed)."""
    seen, seen_pods = read_job(job), read_pods(pods, read_job(job).uid)
    pod = seen_pods[-1] if seen_pods else None
    if seen.condition("Complete").holds:
        return job_words.succeeded()
    if seen.condition("Failed").holds:
        facts = _failed(seen, pod, (), _NO_LIMITS)
    elif pod is not None and ((pod.over and not pod.leaving) or job_words.disrupted(pod)):
        facts = _of_pod(seen, pod, _NO_LIMITS)
    else:
        facts = job_words.removed_job(seen, _code(pod))
    return _with_start(facts, seen, seen_pods)


def never_ran() -> ExitFacts:
    """Facts of a Job that is proven never to have been made."""
    detail = "The worker stopped before the Job of this task was made; run it again."
    return ExitFacts(reason=Reason.UNKNOWN, detail=detail, agent_started=False)


def unproven() -> ExitFacts:
    """Facts of a Job that was ordered to end and of whose end the cluster has not told."""
    detail = "The Job was ordered to end, and the cluster has not said that it did; look at it there."
    return ExitFacts(reason=Reason.JOB_WATCH, detail=detail)


def not_created(sentence: str) -> ExitFacts:
    """Facts of a Job, or of its Secret, that could not be made: *sentence* says what and has the server's words."""
    detail = f"{sentence.rstrip('.')}; mend that and run the task again."
    return ExitFacts(reason=Reason.JOB_CREATE, detail=detail, agent_started=False)


def taken(job: Mapping[str, Any], owner: str) -> ExitFacts:
    """Facts of a task whose Job's name is in use by a Job of *owner*."""
    detail = (
        f"The {read_job(job).place} exists already and belongs to {owner}; wait for its end or remove it, then run the"
        " task again."
    )
    return ExitFacts(reason=Reason.JOB_CREATE, detail=detail, agent_started=False)


def no_room(error: OSError) -> ExitFacts:
    """Facts of a unit whose directory cannot be made or written."""
    return dataclasses.replace(container_facts.no_room(error), reason=Reason.JOB_CREATE)


_NO_LIMITS = Limits(0.0, 0.0, 0.0)
