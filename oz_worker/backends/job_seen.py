"""Jobs, pods and events as the API tells of them, in the few values a verdict needs. Pure.

What is missing or of another type than it should be reads as "not said": no object of a server, and nothing that an
admission controller put into one, makes a verdict fail.
"""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any, Iterable, Iterator, Mapping, NamedTuple, Sequence

from oz_worker.backends.job_template import TASK
from oz_worker.redact import RedactedStream, Redactor
from oz_worker.spellings import encoded

_GONE = "gone"
"""Ours, beside `metadata` of a pod of which only the last state is left."""
_KEPT = {
    "metadata": (
        *("name", "namespace", "uid", "resourceVersion", "labels", "annotations", "ownerReferences"),
        *("creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds"),
    ),
    "spec": (
        *("nodeName", "terminationGracePeriodSeconds"),
        *("suspend", "ttlSecondsAfterFinished", "activeDeadlineSeconds"),
    ),
}
"""What is kept of an object beside its status."""
_LONGEST_MESSAGE = 2000
"""Of output that becomes the message of a container's end the kubelet keeps 2048 bytes, cut anywhere."""
_NEVER_RAN = ("StartError", "ContainerCannotRun")
"""Reasons of a container that ended because its program could not be started at all."""


class Condition(NamedTuple):
    """A condition that is not absent; `status` is True, False or Unknown."""

    status: str = ""
    reason: str = ""
    message: str = ""

    @property
    def holds(self) -> bool:
        """Whether it is so."""
        return self.status == "True"


class End(NamedTuple):
    """How a container ended; `code` is 128 + signal where a signal is recorded."""

    code: int
    signal: int
    reason: str
    message: str
    finished: datetime | None

    @property
    def ran(self) -> bool:
        """Whether its program was started."""
        return self.reason not in _NEVER_RAN


class Container(NamedTuple):
    """One container of a pod. `waiting` is why it does not run yet, `native` an init container that goes on running."""

    name: str
    image: str
    init: bool
    native: bool
    waiting: str
    message: str
    end: End | None
    started: bool


class Pod(NamedTuple):
    """A pod. `leaving`: its deletion was asked for, at `asked_to_go`; `gone`: it does not exist any more."""

    name: str
    namespace: str
    uid: str
    created: str
    phase: str
    reason: str
    message: str
    node: str
    leaving: bool
    gone: bool
    grace: float
    asked_to_go: datetime | None
    conditions: Mapping[str, Condition]
    containers: Sequence[Container]

    def container(self, name: str) -> Container | None:
        """The container of that name, if its state is known."""
        return next((each for each in self.containers if each.name == name and not each.init), None)

    def condition(self, name: str) -> Condition:
        """The condition of that type, an empty one if there is none."""
        return self.conditions.get(name, Condition())

    @property
    def place(self) -> str:
        """What it is called in a sentence."""
        return f"pod {self.namespace}/{self.name}"

    @property
    def over(self) -> bool:
        """Whether what decides about the task has ended: the pod, the agent, or an init container that must not."""
        task = self.container(TASK)
        return self.phase in ("Succeeded", "Failed") or (task is not None and task.end is not None) or bool(self.broken)

    @property
    def broken(self) -> Container | None:
        """The init container that failed."""
        return next(
            (each for each in self.containers if each.init and not each.native and each.end and each.end.code), None
        )

    @property
    def agent_began(self) -> bool:
        """Whether the agent's container has begun to run, as far as its state shows."""
        task = self.container(TASK)
        return task is not None and task.started

    @property
    def agent_never_began(self) -> bool:
        """Whether the state proves that the agent's container has not begun to run so far."""
        task = self.container(TASK)
        if task is not None:
            return not task.started
        return not self.node or self.broken is not None or (self.phase == "Failed" and not self.containers)


class Job(NamedTuple):
    """A Job. `made_pods` is False when its status proves that it never had a pod."""

    name: str
    namespace: str
    uid: str
    conditions: Mapping[str, Condition]
    suspended: bool
    made_pods: bool

    def condition(self, name: str) -> Condition:
        """The condition of that type, an empty one if there is none."""
        return self.conditions.get(name, Condition())

    @property
    def place(self) -> str:
        """What it is called in a sentence."""
        return f"Job {self.namespace}/{self.name}" if self.name else "Job of this task"


class Event(NamedTuple):
    """What a controller, the scheduler or a kubelet said of an object."""

    uid: str
    name: str
    reason: str
    message: str
    time: str


def pruned(found: Mapping[str, Any]) -> dict[str, Any]:
    """What verdicts and reports need of a Job or a pod: a small part of it, free of the task's variables."""
    kept = {
        part: {name: value for name, value in _mapping(found.get(part)).items() if name in names}
        for part, names in _KEPT.items()
    }
    for kind in ("initContainers", "containers"):
        containers = _mappings(_mapping(found.get("spec")).get(kind))
        kept["spec"][kind] = [{name: each.get(name) for name in ("name", "restartPolicy")} for each in containers]
    return {**kept, "status": _mapping(found.get("status")), **({_GONE: True} if found.get(_GONE) is True else {})}


def censored(pod: dict[str, Any], secrets: Sequence[str] | None) -> dict[str, Any]:
    """A pruned pod without *secrets* in what its containers left as the message of their end: their own words, even
    their output (FallbackToLogsOnError). Without any such words where the secrets are not known (None).

    Done here and not in the report, because what is cut there could begin or end within a secret.
    """
    status = {**pod["status"]}
    for kind in ("initContainerStatuses", "containerStatuses"):
        if any(
            _mapping(_mapping(each.get("state")).get("terminated")).get("message")
            for each in _mappings(status.get(kind))
        ):
            status[kind] = [_without(each, secrets) for each in _mappings(status[kind])]
    return {**pod, "status": status}


def _without(container: Mapping[str, Any], secrets: Sequence[str] | None) -> dict[str, Any]:
    state = _mapping(container.get("state"))
    end = _mapping(state.get("terminated"))
    if not end or (secrets is None and end.get("reason") in _NEVER_RAN):  # those are the runtime's own words
        return {**container}
    message = ""
    if secrets is not None:
        text = _text(end.get("message"))
        stream = RedactedStream(Redactor(secrets), torn=len(text) > _LONGEST_MESSAGE)
        message = (stream.feed(encoded(text)) + stream.flush()).decode("utf-8", "replace")
    return {**container, "state": {**state, "terminated": {**end, "message": message}}}


def gone(pod: Mapping[str, Any]) -> dict[str, Any]:
    """The last state of a pod that does not exist any more."""
    return {**pod, _GONE: True}


def agent_started(pod: Mapping[str, Any]) -> bool:
    """Whether a pod's agent has begun to run, as far as its state shows."""
    return _pod(pod).agent_began


def is_alive(pod: Mapping[str, Any]) -> bool:
    """Whether something of a pod may still run."""
    seen = _pod(pod)
    return not seen.gone and seen.phase not in ("Succeeded", "Failed")


def has_failed(job: Mapping[str, Any]) -> bool:
    """Whether the cluster has made up its mind that a Job failed."""
    return read_job(job).condition("Failed").holds


def read_job(found: Mapping[str, Any] | None) -> Job:
    """A Job as the API has it; of None one of which nothing is known."""
    metadata, spec, status = (_mapping(_mapping(found).get(name)) for name in ("metadata", "spec", "status"))
    counts = [status.get(name) for name in ("active", "succeeded", "failed", "terminating", "ready")]
    uncounted = _mapping(status.get("uncountedTerminatedPods"))
    return Job(
        name=_text(metadata.get("name")),
        namespace=_text(metadata.get("namespace")),
        uid=_text(metadata.get("uid")),
        conditions=_conditions(status),
        suspended=spec.get("suspend") is True,
        made_pods=not status or any(counts) or any(uncounted.values()),
    )


def read_pods(found: Iterable[Mapping[str, Any]], job_uid: str) -> list[Pod]:
    """The pods that are not another Job's, the oldest first: a Job that was replaced had the same name and labels."""
    mine = [each for each in found if not job_uid or _owners(each) <= {job_uid}]
    return sorted(map(_pod, mine), key=lambda pod: (pod.created, pod.name))


def read_events(found: Iterable[Mapping[str, Any]], uids: Iterable[str]) -> list[Event]:
    """What was said of the objects with these *uids*, the oldest first."""
    wanted = set(filter(None, uids))
    return sorted((event for event in map(_event, found) if event.uid in wanted), key=lambda event: event.time)


def about(event: Mapping[str, Any]) -> str:
    """The uid of what an event is about."""
    return _event(event).uid


def _owners(found: Mapping[str, Any]) -> set[str]:
    owners = _mappings(_mapping(_mapping(found).get("metadata")).get("ownerReferences"))
    return {_text(owner.get("uid")) for owner in owners if owner.get("kind") == "Job"}


def _pod(found: Mapping[str, Any]) -> Pod:
    metadata, spec, status = (_mapping(_mapping(found).get(name)) for name in ("metadata", "spec", "status"))
    grace = _number(metadata.get("deletionGracePeriodSeconds"))
    return Pod(
        name=_text(metadata.get("name")),
        namespace=_text(metadata.get("namespace")),
        uid=_text(metadata.get("uid")),
        created=_text(metadata.get("creationTimestamp")),
        phase=_text(status.get("phase")),
        reason=_text(status.get("reason")),
        message=_text(status.get("message")),
        node=_text(spec.get("nodeName")),
        leaving=bool(metadata.get("deletionTimestamp")),
        gone=_mapping(found).get(_GONE) is True,
        grace=float(grace),
        asked_to_go=_time(metadata.get("deletionTimestamp"), earlier=grace),
        conditions=_conditions(status),
        containers=[*_containers(spec, status, init=True), *_containers(spec, status, init=False)],
    )


def _containers(spec: Mapping[str, Any], status: Mapping[str, Any], *, init: bool) -> Iterator[Container]:
    wanted = _mappings(spec.get("initContainers" if init else "containers"))
    native = {each.get("name") for each in wanted if each.get("restartPolicy") == "Always"}
    for found in _mappings(status.get("initContainerStatuses" if init else "containerStatuses")):
        state = _mapping(found.get("state"))
        waiting, end = _mapping(state.get("waiting")), _end(_mapping(state.get("terminated")))
        last = _mapping(_mapping(found.get("lastState")).get("terminated"))
        yield Container(
            name=_text(found.get("name")),
            image=_text(found.get("image")),
            init=init,
            native=init and found.get("name") in native,
            waiting=_text(waiting.get("reason")),
            message=_text(waiting.get("message")),
            end=end,
            started="running" in state
            or (end is not None and end.ran)
            or bool(last)
            or bool(found.get("restartCount")),
        )


def _end(found: Mapping[str, Any]) -> End | None:
    if not found:
        return None
    signal, code = _number(found.get("signal")), _number(found.get("exitCode"))
    return End(
        code=min(max(128 + signal if signal > 0 else code, 0), 255),
        signal=signal if signal > 0 else max(code - 128, 0),
        reason=_text(found.get("reason")),
        message=_text(found.get("message")).strip(),
        finished=_time(found.get("finishedAt")),
    )


def _event(found: Mapping[str, Any]) -> Event:
    said = _mapping(found)
    about = _mapping(said.get("involvedObject")) or _mapping(said.get("regarding"))
    series = _mapping(said.get("series"))
    times = (series.get("lastObservedTime"), said.get("lastTimestamp"), said.get("eventTime"))
    created = _mapping(said.get("metadata")).get("creationTimestamp")
    return Event(
        uid=_text(about.get("uid")),
        name=_text(about.get("name")),
        reason=_text(said.get("reason")),
        message=_text(said.get("message") or said.get("note")).strip(),
        time=next((_text(time) for time in (*times, created) if time), ""),
    )


def _conditions(status: Mapping[str, Any]) -> dict[str, Condition]:
    return {
        _text(found.get("type")): Condition(*(_text(found.get(name)) for name in ("status", "reason", "message")))
        for found in _mappings(status.get("conditions"))
    }


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [each for each in value if isinstance(each, Mapping)] if isinstance(value, list) else []


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _number(value: Any) -> int:
    return value if isinstance(value, int) and abs(value) < 2**31 else 0


def _time(value: Any, *, earlier: int = 0) -> datetime | None:
    try:
        time = datetime.fromisoformat(_text(value).replace("Z", "+00:00"))
        return time.replace(tzinfo=time.tzinfo or timezone.utc) - timedelta(seconds=earlier)
    except (ValueError, OverflowError):
        return None
