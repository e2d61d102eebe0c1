"""Making a Job, and finding out what came of it where nobody answered.

The name decides: it follows from the task, and the cluster gives it once. So however often the order is given again
after a silence, at most one Job of a unit exists, and one that exists already is either this unit's, or over and
replaced, or somebody else's.
"""

from __future__ import annotations

import logging
from typing import Any, Mapping, NamedTuple

from oz_worker.backends.base import Unit
from oz_worker.backends.job_object import job_name, key_of, unit_of
from oz_worker.backends.job_whose import Whose, is_over
from oz_worker.backends.patience import Patience
from oz_worker.backends.turns import Turns
from oz_worker.cluster import AlreadyExists, Cluster, ClusterDown, ClusterError, Conflict, Interrupted, NotFound, Object
from oz_worker.errors import OzWorkerError, Stopped
from oz_worker.timing import Deadline

logger = logging.getLogger(__name__)

_AT_ONCE = 4
"""Calls at once that make something: each is a process of some 45 MB that needs 80 ms of a core."""
_GONE_SECONDS = 120.0
"""A Job that is replaced has so long to end, its pods' grace included."""
_LOOK_SECONDS = 1.0


class Refused(OzWorkerError):
    """The cluster refused to make it; it is proven that the agent never ran. `said` are its own words."""

    def __init__(self, error: ClusterError, what: str) -> None:
        super().__init__(f"The {what} could not be created: {error.said}")
        self.error = error


class Taken(OzWorkerError):
    """The name is in use by a Job that is not ours to replace."""

    def __init__(self, job: Object) -> None:
        super().__init__(f"the Job {job['metadata']['name']} exists already")
        self.job = job


class Made(NamedTuple):
    """A unit's Job; `taken_up` where it existed before it was asked for here."""

    job: dict[str, Any]
    taken_up: bool


class _Wait(ClusterDown):
    """What is in the way is going: ask again."""


class Starter:
    """Creates Jobs and their Secrets. Safe from any thread: it has no state but its options."""

    def __init__(self, cluster: Cluster, patience: Patience, whose: Whose) -> None:
        self._cluster = cluster
        self._patience = patience
        self._whose = whose
        self._turns = Turns(_AT_ONCE, ClusterDown)

    def create(self, unit: Unit, job: Mapping[str, Any]) -> Made:
        """The unit's Job as the cluster has it, made now or found. Blocks in the program and in the unit's condition.

        The unit's stop order ends the program at once. Raises Stopped then (what may have been made is the caller's
        to end), Refused, Taken, or ClusterDown when nobody answered within the limit.
        """
        asked = _Asked()
        replacing = Deadline(_GONE_SECONDS)

        def attempt() -> Made:
            try:
                return Made(self._create(unit, "jobs", job, asked), taken_up=False)
            except AlreadyExists as error:
                ours = asked.unanswered
                return Made(self._resolve(unit, error, replacing, asked), taken_up=not ours)

        return self._patience.persist(attempt, unit)

    def create_secret(self, unit: Unit, secret: Mapping[str, Any], *, taken_up: bool) -> None:
        """Make the Secret that its Job waits for. Raises as `create` does.

        A Job that was taken up may have its own already, and run.
        """
        asked = _Asked()
        going = Deadline(_GONE_SECONDS)

        def attempt() -> None:
            try:
                self._create(unit, "secrets", secret, asked)
            except AlreadyExists as error:
                if asked.unanswered or taken_up:
                    return  # our own: its answer was lost, or a worker before us made it
                if going.passed():
                    raise Refused(error, "Secret") from error
                # Of an earlier Job of this name: it goes with that, which takes a moment.
                raise _Wait(f"the Secret of an earlier Job is being removed: {error.said}") from error

        self._patience.persist(attempt, unit)

    def _create(self, unit: Unit, kind: str, thing: Mapping[str, Any], asked: _Asked) -> dict[str, Any]:
        try:
            with self._turns.taken(unit), unit.wakes() as interrupt:
                return self._cluster.create(kind, thing, interrupt=interrupt)
        except Interrupted:
            raise Stopped(f"unit {unit.name} was stopped while its Job was made") from None
        except ClusterDown:
            asked.unanswered = True
            raise
        except AlreadyExists:
            raise
        except ClusterError as error:
            raise Refused(error, thing["kind"]) from error

    def _resolve(self, unit: Unit, error: AlreadyExists, replacing: Deadline, asked: _Asked) -> dict[str, Any]:
        """What bears the name: ours, in the way and going, or in the way for good."""
        name = job_name(unit.key)
        found = self._cluster.get("jobs", name)
        if found is None:
            raise _Wait(f"the Job {name} was just being removed") from error
        going = bool(found["metadata"].get("deletionTimestamp"))
        if self._whose.is_of(found, unit) and not going and (asked.unanswered or not is_over(found)):
            logger.info("unit %s: the Job %s exists already and is taken up", unit.name, name)
            return found
        if not going:
            if not self._whose.may_replace(found, unit):
                raise Taken(found)
            logger.info("replacing the Job %s of %s, which is over", name, key_of(found) or unit_of(found))
            try:
                self._cluster.delete("jobs", name, found["metadata"]["uid"])
            except (NotFound, Conflict):
                pass
            except ClusterDown:
                raise
            except ClusterError as refused:
                raise Refused(refused, "Job") from refused
        if replacing.passed():
            raise Taken(found)
        asked.unanswered = False  # what exists was made by somebody else before
        raise _Wait(f"the Job {name}, which is in the way, is being removed") from error


class _Asked:
    """Whether an order was given whose answer is not known: then what exists is its result."""

    def __init__(self) -> None:
        self.unanswered = False
