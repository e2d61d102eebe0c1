"""Whose a Job is, from what stands on it: this unit's, this instance's, the old worker's, somebody else's."""

from __future__ import annotations

from datetime import datetime
from typing import Callable, Mapping

from oz_worker.backends.base import Found, Unit
from oz_worker.backends.job_object import INSTANCE, WORKER_HASH, key_of, unit_of
from oz_worker.cluster import Object


class Whose:
    """Tells Jobs apart. Holds no state; *living* says whether a unit of that name is being worked on here.

    *labels* are those of everything that this instance makes.
    """

    def __init__(self, labels: Mapping[str, str], living: Callable[[str], bool]) -> None:
        self._instance = labels[INSTANCE]
        self._worker_hash = labels[WORKER_HASH]
        self._living = living

    def is_ours(self, job: Object) -> bool:
        """Whether this instance made it, so that it is ours to end and to remove."""
        return bool(label(job, INSTANCE) == self._instance)

    def is_of(self, job: Object, unit: Unit) -> bool:
        """Whether it is the Job of exactly this unit."""
        return self.is_ours(job) and unit_of(job) == unit.name

    def may_replace(self, job: Object, unit: Unit) -> bool:
        """Whether the Job of *unit* may take its name: nobody works on it any more, and it is ours or the old worker's.

        `oz-agent-worker` left Jobs without the label of an instance. One that still runs is left alone unless it is an
        earlier attempt of the very task.
        """
        if self.is_ours(job):
            free = unit_of(job) == unit.name or not self._living(unit_of(job))
            return free and (is_over(job) or key_of(job) == unit.key)
        return not label(job, INSTANCE) and label(job, WORKER_HASH) == self._worker_hash and is_over(job)

    def owner(self, job: Object) -> str:
        """Who made it, for people."""
        worker, instance = label(job, "oz-worker-id"), label(job, INSTANCE)
        if not worker:
            return "somebody else"
        return f"worker {worker}" + (f", instance {instance}" if instance else ", an oz-agent-worker")


def label(thing: Object, name: str) -> str:
    """A label, "" where there is none."""
    labels = thing["metadata"].get("labels")
    return str(labels.get(name, "")) if isinstance(labels, Mapping) else ""


def condition(job: Object, kind: str) -> Object | None:
    """The condition of that type if it is true."""
    status = job.get("status")
    found = status.get("conditions") if isinstance(status, Mapping) else None
    listed = [one for one in found if isinstance(one, Mapping)] if isinstance(found, list) else []
    return next((one for one in listed if one.get("type") == kind and one.get("status") == "True"), None)


def is_over(job: Object) -> bool:
    """Whether the cluster has made up its mind: nothing of it is started any more."""
    return condition(job, "Complete") is not None or condition(job, "Failed") is not None


def found(job: Object) -> Found | None:
    """The unit that it is, None for one that does not say so."""
    key = key_of(job)
    return Found(unit_of(job), key) if key is not None and unit_of(job) else None


def is_going(thing: Object) -> bool:
    """Whether its deletion was ordered."""
    return bool(thing["metadata"].get("deletionTimestamp"))


def is_kept(job: Object) -> bool:
    """Whether the cluster itself removes it in its time: a failed one, to be looked at until then."""
    spec = job.get("spec")
    lives = spec.get("ttlSecondsAfterFinished") if isinstance(spec, Mapping) else None
    return condition(job, "Failed") is not None and lives is not None


def age(job: Object, now: float) -> float:
    """How many seconds ago it ended, by the cluster's clock and ours; 0 where it does not say."""
    ended = condition(job, "Failed") or condition(job, "Complete") or {}
    try:
        text = str(ended.get("lastTransitionTime")).replace("Z", "+00:00")
        return now - datetime.fromisoformat(text).timestamp()
    except ValueError:
        return 0.0
