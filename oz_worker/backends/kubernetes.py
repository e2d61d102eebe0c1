"""Agents in Jobs of a Kubernetes cluster.

A unit is a Job with a name that follows from its task, and labels and annotations that say whose it is, so that a
worker that comes after a kill -9, or in another pod with an empty disk, finds it and learns how it ended. Nothing of a
running unit is in this process but a card on the board and the thread of its task.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import threading
import time
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

from oz_worker import clusters
from oz_worker.backends import job_facts
from oz_worker.backends.base import PROOF_SECONDS, Capabilities, Found, Unit
from oz_worker.backends.container_traces import Traces
from oz_worker.backends.environ import worker_environment
from oz_worker.backends.job_board import Board, started
from oz_worker.backends.job_object import ROLE_TASK, UNIT, job, job_name, labels, secret, selector
from oz_worker.backends.job_output import JobOutput
from oz_worker.backends.job_secrets import secrets_of, uses_secret
from oz_worker.backends.job_start import Refused, Starter, Taken
from oz_worker.backends.job_stop import JobStopper
from oz_worker.backends.job_waits import Limits
from oz_worker.backends.job_watch import Ears, JobWatch
from oz_worker.backends.job_whose import Whose, age, found, is_going, is_kept, is_over
from oz_worker.backends.patience import Patience
from oz_worker.backends.preflight import Preflight
from oz_worker.backends.removed import Removed
from oz_worker.backends.silence import Silence
from oz_worker.cluster import ClusterDown, ClusterError, Forbidden, Object
from oz_worker.errors import NotUsable, Stopped, TaskFault
from oz_worker.model import Cause, ExitFacts
from oz_worker.settings import KubernetesOptions
from oz_worker.timing import Deadline
from oz_worker.tree import end_earlier_helpers, end_helpers
from oz_worker.unreadable import Unreadable

logger = logging.getLogger(__name__)

START_SECONDS = 600.0
"""How long a Job is offered to a cluster that does not answer. One that was made is waited for for ever."""
RECENT_SECONDS = 600.0
"""A failed Job without any trace on our disk is reported once more if it ended since then (design 12, rule 27)."""
_SECRET_MADE = "secret-made"
_CLOSE_SECONDS = 3.0
_OUTAGE_SECONDS = 10.0
"""A silence that long is more than a hiccup: nobody in the cluster could do anything meanwhile."""
_LAST_WORDS_BYTES = 64 << 10
_LEAST_GRACE = 30
"""Kubernetes' own default of a pod's grace."""


class Kubernetes:
    """The backend `kubernetes`. Its contract is `Backend`'s.

    The lock guards `_snapshot` (what `recover` saw, until it is attached). An entry of `_last_words` (the output of a
    unit that is deleted at its deadline) is touched by its unit's thread only.
    """

    def __init__(
        self,
        options: KubernetesOptions,
        *,
        worker_id: str,
        instance: str,
        instance_dir: Path,
        host_environ: Mapping[str, str],
        cleanup: bool = True,
        task_log_max: int = 0,
        stop_grace: float = 10.0,
        on_death: Callable[[str, BaseException], None] = lambda name, error: None,
    ) -> None:
        self.capabilities = Capabilities(survives_worker=True, outlives_disk=True)
        grace = {"terminationGracePeriodSeconds": max(_LEAST_GRACE, math.ceil(stop_grace))}
        self._options = dataclasses.replace(options, pod_template={**grace, **options.pod_template})
        self._worker_id = worker_id
        self._instance = instance
        self._directory = instance_dir
        self._host = host_environ
        self._cleanup = cleanup
        self._log_max = task_log_max
        self._on_death = on_death
        self._lock = threading.Lock()
        self._removed = Removed()
        self._snapshot: dict[str, Object] = {}
        self._last_words: dict[str, bytes] = {}
        self._silence = Silence("the cluster")
        self._outage = False  # the watch's thread only

    # -- the worker's life ---------------------------------------------------------------------------------------

    def open(self) -> None:
        """End helpers of a dead worker, prove that tasks can run, start the watch. Raises NotUsable."""
        options, environment = self._options, worker_environment(self._host)
        end_earlier_helpers(self._instance)
        self._traces = Traces(self._directory, self._worker_id)
        self._traces.open()
        self._cluster = cluster = clusters.cluster_for(
            options, environment, instance=self._instance, instance_dir=self._directory
        )
        version = clusters.version_of(cluster, clusters.endpoint_of(options, environment))
        logger.info("Kubernetes %s, namespace %s", version, cluster.namespace)
        if options.preflight:
            preflight = Preflight(cluster, options, worker_id=self._worker_id, instance=self._instance)
            preflight.tidy()
            for sentence in (*preflight.permissions(), preflight.run()):
                if sentence:
                    logger.warning("%s", sentence)
        self._board = Board(cluster, Limits.of(options), self._late, lambda: self._watch.look())
        tags = labels(options, worker_id=self._worker_id, instance=self._instance, key=None, role=ROLE_TASK)
        self._whose = Whose(tags, lambda name: self._board.card(name) is not None)
        # What a unit finds out is no news to wait for: new work is refused from then on.
        patience = Patience(START_SECONDS, lambda: self._watch.look(), "the cluster")
        self._forever = Patience(0, lambda: self._watch.look(), "the cluster")
        self._starter = Starter(cluster, patience, self._whose)
        self._stopper = JobStopper(cluster, self._board, self._whose)
        self._output = JobOutput(cluster, self._board, self._log_max)
        ears = Ears(
            listed=self._board.listed,
            changed=self._board.changed,
            due=self._board.due,
            busy=self._board.busy,
            silent=self._silent,
            answers=self._answers,
        )
        self._watch = JobWatch(cluster, self._selector(), ears, self._on_death)
        self._watch.start()

    def close(self) -> None:
        """Stop the watch; Jobs run on."""
        self._watch.stop(_CLOSE_SECONDS)
        with contextlib.suppress(Unreadable):
            end_helpers(self._instance)  # what hangs with the cluster would outlive us

    def unavailable(self) -> str:
        """Why no work can be taken just now."""
        return self._silence.why

    # -- one unit's life -----------------------------------------------------------------------------------------

    def prepare(self, unit: Unit) -> None:
        """Leave a trace of it: the cluster itself gets the image and the sidecars."""
        _give_way(unit)
        try:
            self._traces.prepared(unit)
        except OSError as error:
            raise TaskFault(job_facts.no_room(error)) from error

    def start(self, unit: Unit) -> None:
        """Make the Job, and its Secret. It runs when the cluster has room for it."""
        _give_way(unit)
        assert unit.spec is not None
        ids = {"worker_id": self._worker_id, "instance": self._instance}
        thing = job(self._options, unit, unit.spec, **ids, cleanup=self._cleanup)
        self._removed.forget(unit.name)
        self._board.follow(unit)  # before it exists: it may be over before its creation is answered
        try:
            self._traces.starting(unit)
            made = self._starter.create(unit, thing)
            self._board.follow(unit, made.job)
            hidden = secret(self._options, unit, unit.spec, **ids, job_uid=str(made.job["metadata"]["uid"]))
            if hidden is not None:
                self._starter.create_secret(unit, hidden, taken_up=made.taken_up)
                self._note_secret(unit)
        except Stopped:
            facts = self.stop(unit)
            if facts.remains:
                raise TaskFault(facts) from None
            raise
        except OSError as error:
            self._give_up(unit)
            raise TaskFault(job_facts.no_room(error)) from error
        except Taken as taken:
            raise TaskFault(job_facts.taken(taken.job, self._whose.owner(taken.job))) from taken
        except Refused as error:
            self._give_up(unit)
            raise TaskFault(job_facts.not_created(str(error))) from error
        except ClusterDown as error:
            raise TaskFault(self._unanswered(unit, str(error))) from error
        self._watch.wake()

    def _note_secret(self, unit: Unit) -> None:
        """For who comes after a kill: without the note he looks whether the agent runs, which it may do by now."""
        try:
            self._traces.mark(unit, _SECRET_MADE)
        except OSError as error:
            logger.warning("unit %s: that its Secret was made could not be noted: %s", unit.name, error)

    def _unanswered(self, unit: Unit, sentence: str) -> ExitFacts:
        """Nobody said whether the Job was made. Unless it is proven that it was not, its agent may have run, or run."""
        try:
            existing = self._cluster.get("jobs", job_name(unit.key))
            made = existing is not None and self._whose.is_of(existing, unit)
        except ClusterError:
            made = True
        self._removed.note(unit.name, unit)
        remains = self._stopper.delete(unit, Deadline(PROOF_SECONDS)) if made else ""
        return dataclasses.replace(job_facts.not_created(sentence), agent_started=made, remains=remains)

    def _give_up(self, unit: Unit) -> None:
        """A Job that may have been made all the same must not run: it is removed now, or when it appears."""
        self._removed.note(unit.name, unit)
        if trouble := self._stopper.remove(unit):
            logger.warning("%s", trouble)

    def attach(self, unit: Unit) -> None:
        """Take up a Job of an earlier process."""
        try:
            self._forever.persist(lambda: self._attach(unit), unit)
        except Stopped:
            return  # `stop` is next

    def _attach(self, unit: Unit) -> None:
        """Raises ClusterDown also for a refusal: nothing that a cluster cannot say just now ends a running task."""
        with self._lock:
            existing = self._snapshot.pop(unit.name, None)
        try:
            existing = existing or self._cluster.get("jobs", job_name(unit.key))
            if existing is None or not self._whose.is_of(existing, unit):
                ran = self._traces.was_started(unit)
                unit.ended(self._vanished(unit) if ran else job_facts.never_ran())
                return
            unit.secrets = secrets_of(existing)
            self._board.follow(unit, existing)
            if uses_secret(existing) and self._traces.was_started(unit):
                self._end_if_without_secret(unit)
        except ClusterDown:
            raise
        except ClusterError as error:
            raise ClusterDown(str(error), error.said) from error
        self._watch.look()  # its pods, and what happened meanwhile

    def _vanished(self, unit: Unit) -> ExitFacts:
        return job_facts.vanished(self._cluster.named(job_name(unit.key)), ())

    def _end_if_without_secret(self, unit: Unit) -> None:
        """A kill came between the Job and its Secret, whose values nobody knows any more: the pod waits in vain.

        Unless the Secret was made all the same, and the agent runs. Raises ClusterError.
        """
        if self._traces.has_mark(unit, _SECRET_MADE):
            return
        pods = self._cluster.find("pods", f"{UNIT}={unit.name}").items
        if any(map(job_facts.agent_started, pods)):
            return
        self._board.mute(unit.name)
        if remains := self._stopper.delete(unit, Deadline(PROOF_SECONDS)):
            raise ClusterDown(f"{remains} has no Secret and could not be removed")
        card = self._board.card(unit.name)
        ran = card is not None and started(card)  # in the moment between the look and the end
        unit.ended(self._vanished(unit) if ran else job_facts.never_ran())

    def stop(self, unit: Unit) -> ExitFacts:
        """Delete the Job with everything that belongs to it."""
        card = self._board.card(unit.name)
        if unit.cause is Cause.DEADLINE and unit.facts is None and unit.secrets is not None:
            self._last_words[unit.name] = self.tail(unit, _LAST_WORDS_BYTES)  # they go with the Job
        facts = self._stopper.stop(unit, ran=card is None or card.existed)
        self._removed.note(unit.name, unit)
        return facts

    def stragglers(self, unit: Unit) -> str:
        """End what a failed Job still runs."""
        return self._stopper.halt(unit)

    def teardown(self, unit: Unit) -> str:
        """It is run in the pod, by the wrapper of the agent."""
        return ""

    def clean_up(self, unit: Unit, *, keep: bool) -> str:
        """Remove the Job, but for a failed one that the cluster removes itself in its time."""
        self._last_words.pop(unit.name, None)
        if keep:
            self._board.drop(unit.name)
            return ""
        if why := self._silence.why:
            return f"the Job {job_name(unit.key)} is removed later: {why}"
        trouble = self._stopper.remove(unit)
        if not trouble:
            self._board.drop(unit.name)
            self._removed.note(unit.name, unit)
            trouble = self._traces.forget(unit)  # what says that it exists goes last
        return trouble

    def output_at(self, unit: Unit) -> str:
        """The command that shows it."""
        return self._output.where(unit)

    def tail(self, unit: Unit, limit: int) -> bytes:
        """The end of the unit's output."""
        if unit.name in self._last_words:
            return self._last_words[unit.name][-limit:]
        return b"" if self._silence.why else self._output.tail(unit, limit)

    def collect(self, unit: Unit) -> str:
        """Fetch the output from the cluster, if it answers at all."""
        return self._silence.why or self._output.collect(unit, self._traces.directory(unit).output)

    def recover(self) -> Sequence[Found]:
        """List the units of this instance, those included that failed lately and of which no trace is left here."""
        try:
            jobs = self._jobs()
        except Forbidden as error:
            raise NotUsable(f"{error}; {self._restore()}") from error
        recent = [one for one in jobs if is_kept(one) and age(one, time.time()) < RECENT_SECONDS]
        units = self._listed([*recent, *(one for one in jobs if not _is_settled(one))])
        names = {unit.name for unit in units}
        with self._lock:
            self._snapshot = {unit.name: one for one in jobs if (unit := found(one)) is not None and unit.name in names}
        return units

    def units(self) -> Sequence[Found]:
        """List the units of this instance, touching nothing; without failed Jobs that only wait for their TTL."""
        return self._listed([one for one in self._jobs() if not _is_settled(one)])

    def look_after(self) -> Sequence[Found]:
        """Nothing grows old here: the cluster removes what has a TTL, and one worker has one instance."""
        return ()

    def cancel_dispatched(self, unit: Unit) -> str:
        """Nothing is ever handed over here."""
        return f"unit {unit.name} was not handed over: the kubernetes backend watches its Jobs itself"

    # -- what the watch hears, on its thread ---------------------------------------------------------------------

    def _late(self, thing: Object) -> None:
        """A Job of a unit that was removed here was made late, by a request of a dead program."""
        unit = found(thing)
        removed = self._removed.unit(unit.name) if unit is not None else None
        if removed is not None and not is_going(thing):
            logger.warning("removing the Job %s, which was made after its task had ended", thing["metadata"]["name"])
            if trouble := self._stopper.remove(removed):
                logger.warning("%s", trouble)

    def _silent(self, seconds: float, error: Exception) -> None:
        if isinstance(error, Forbidden):  # for ever, perhaps; but a right can come back, so no task is called failed
            self._silence.goes_on(f"{error}; {self._restore()}", "refuses to say how the tasks are")
        else:
            self._silence.goes_on(str(error))
        self._outage = seconds > _OUTAGE_SECONDS
        if self._outage:
            self._board.outage()

    def _restore(self) -> str:
        return (
            f"give this account its Role in the namespace {self._cluster.namespace} back"
            " (deploy/kubernetes/rbac.yaml); if the namespace is gone, cancel its tasks, for their ends stay unknown"
        )

    def _answers(self) -> None:
        if self._outage:  # once more: since the last call that went unanswered there may have been a pause
            self._board.outage()
        self._outage = False
        self._silence.ends()

    # -- small things --------------------------------------------------------------------------------------------

    def _selector(self) -> str:
        return selector(worker_id=self._worker_id, instance=self._instance)

    def _jobs(self) -> list[dict[str, Any]]:
        return self._cluster.find("jobs", self._selector(), keep=_settled_ones_pruned).items

    def _listed(self, jobs: Sequence[Object]) -> list[Found]:
        units = {unit.name: unit for unit in self._traces.list()}
        units.update({unit.name: unit for one in jobs if (unit := found(one)) is not None})
        return list(units.values())


def _is_settled(thing: Object) -> bool:
    """Whether nothing of it runs and nothing is left to do: it goes by its TTL, or is going."""
    return is_over(thing) and (is_kept(thing) or is_going(thing))


def _settled_ones_pruned(thing: dict[str, Any]) -> dict[str, Any]:
    """Of one that may be taken up all is needed; of the many that only wait for their TTL next to nothing."""
    return job_facts.pruned(thing) if _is_settled(thing) and age(thing, time.time()) >= RECENT_SECONDS else thing


def _give_way(unit: Unit) -> None:
    if unit.cause is not None:
        raise Stopped(f"unit {unit.name} was stopped before its Job was made")
