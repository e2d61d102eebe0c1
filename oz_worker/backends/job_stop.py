"""Ending Jobs: by their deletion with all that belongs to them, or, where one is to be kept, by its deadline.

The proof is the server's: a deletion in the foreground leaves the Job until its pods are gone (rules 25 and 26).
"""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import Any

from oz_worker.backends import job_facts
from oz_worker.backends.base import PROOF_SECONDS, Unit
from oz_worker.backends.job_board import Board
from oz_worker.backends.job_object import job_name
from oz_worker.backends.job_whose import Whose, is_kept, is_over
from oz_worker.backends.turns import Turns
from oz_worker.cluster import Cluster, ClusterDown, ClusterError, Conflict, NotFound
from oz_worker.model import ExitFacts
from oz_worker.timing import Deadline

logger = logging.getLogger(__name__)

_AT_ONCE = 4
_LOOK_SECONDS = 5.0
"""How often to ask for a Job whose end the watch has not told of."""
_NO_GRACE = 30.0
"""A pod's grace where its object does not say it: Kubernetes' default."""


class JobStopper:
    """Ends Jobs. Safe from any thread; holds no state of one."""

    def __init__(self, cluster: Cluster, board: Board, whose: Whose) -> None:
        self._cluster = cluster
        self._board = board
        self._whose = whose
        self._turns = Turns(_AT_ONCE, ClusterDown)

    def stop(self, unit: Unit, *, ran: bool) -> ExitFacts:
        """Delete the unit's Job and return the facts of its end, with what remains when its end cannot be proven.

        Blocks in the program and in the unit's condition, where the watch tells of the deletion; at most PROOF_SECONDS
        behind the time for KILL. How long a pod may take after its TERM stands in its own grace period. *ran*: the Job
        is known to have existed, so that its absence is no proof that it never did.
        """
        deadline = Deadline(max(0.0, unit.kill_at - time.monotonic()) + PROOF_SECONDS)
        remains = self.delete(unit, deadline)
        if remains:
            unit.ended(job_facts.unproven())
        elif ran:
            unit.ended(job_facts.vanished(self._cluster.named(job_name(unit.key)), ()))  # an earlier fact stays
        else:
            unit.ended(job_facts.never_ran())
        assert unit.facts is not None
        return dataclasses.replace(unit.facts, remains=remains)

    def delete(self, unit: Unit, deadline: Deadline) -> str:
        """Delete the unit's Job; "" once it is proven gone, else what remains."""
        ordered = ""  # the uid of the one whose deletion the server has taken in hand
        while not self._board.is_gone(unit.name):
            remains = f"Job {job_name(unit.key)} in the namespace {self._cluster.namespace}"
            try:
                with self._turns.taken(wait=deadline.left()):
                    ordered = self._order(unit, ordered, self._patience(deadline))
            except (NotFound, Conflict):
                return ""
            except ClusterError as error:
                remains = f"{remains} ({error})"
            if deadline.passed():
                return remains
            unit.wait_until(lambda: self._board.is_gone(unit.name), min(_LOOK_SECONDS, deadline.left()))
        return ""

    def _order(self, unit: Unit, ordered: str, timeout: float) -> str:
        """Order the deletion once, and look from then on. Raises NotFound or Conflict once it is gone."""
        name = job_name(unit.key)
        card = self._board.card(unit.name)
        uid = card.uid if card is not None and not ordered else ""
        if not uid:
            found = self._cluster.get("jobs", name, timeout=timeout)
            if found is None or not self._whose.is_of(found, unit):
                raise NotFound(f"no Job {name} of this unit")
            uid = str(found["metadata"]["uid"])
            if uid == ordered or found["metadata"].get("deletionTimestamp"):
                return uid
        self._cluster.delete("jobs", name, uid, timeout=timeout)
        return uid

    def _patience(self, deadline: Deadline) -> float:
        return max(1.0, min(self._cluster.timeout, deadline.left()))

    def halt(self, unit: Unit) -> str:
        """End what a Job that has been judged still runs, and keep the Job where that is possible (rule 26).

        One that ended well is left as it is. What remains, in words; "" for nothing.
        """
        card = self._board.card(unit.name)
        job = card.job if card is not None else None
        well = unit.facts is not None and unit.facts.code == 0 and unit.facts.reason is None
        if card is None or job is None or card.gone or well:
            return ""
        deadline = Deadline(_grace(card.pods) + PROOF_SECONDS)
        suspended = bool((job.get("spec") or {}).get("suspend"))  # no deadline runs then
        if not is_over(job) and (suspended or not self._end_by_deadline(unit)):
            return self.delete(unit, deadline)

        def quiet() -> bool:
            now = self._board.card(unit.name)
            return now is None or now.gone or (_over(now.job) and not any(map(job_facts.is_alive, now.pods.values())))

        if unit.wait_until(quiet, deadline.left()):
            return ""
        return self.delete(unit, Deadline(_grace(card.pods) + PROOF_SECONDS))

    def _end_by_deadline(self, unit: Unit) -> bool:
        """Let the cluster end it, as a Job that is too old: it keeps its pods' ends and its TTL. False: it cannot."""
        name = job_name(unit.key)
        try:
            with self._turns.taken(wait=self._cluster.timeout):
                self._cluster.patch("jobs", name, {"spec": {"activeDeadlineSeconds": 1}})
        except NotFound:
            return True
        except ClusterError as error:
            logger.warning("the Job %s is deleted, because it could not be ended otherwise: %s", name, error)
            return False
        return True

    def remove(self, unit: Unit) -> str:
        """Remove what is left of a unit, but for a failed Job with a TTL; one sentence when that is not possible."""
        name = job_name(unit.key)
        try:
            with self._turns.taken():
                card = self._board.card(unit.name)
                job = card.job if card is not None and card.job is not None and is_over(card.job) else None
                job = job or self._cluster.get("jobs", name)
                if job is not None and self._whose.is_of(job, unit) and not is_kept(job):
                    self._cluster.delete("jobs", name, str(job["metadata"]["uid"]))
        except (NotFound, Conflict):
            return ""
        except ClusterError as error:
            return f"the Job {name} was not removed: {error}"
        return ""


def _over(job: Any) -> bool:
    return job is not None and is_over(job)


def _grace(pods: Any) -> float:
    found = [(pod.get("spec") or {}).get("terminationGracePeriodSeconds") for pod in pods.values()]
    return float(max([grace for grace in found if grace is not None], default=_NO_GRACE))
