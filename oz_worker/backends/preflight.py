"""Whether tasks can run in a cluster, found out before one is taken: permissions, then a small Job like a task's.

What it proves: that our account may do what a task needs; that quota and admission let a Job with a task's labels,
account and place make its pod; that the preflight image is pulled; that a root init container runs, or, where sidecars
are image volumes, that one is mounted. It does not prove that a node has room: that heals, and is only said.
"""

from __future__ import annotations

import logging
import time
from typing import Any, NamedTuple

from oz_worker.backends import job_facts
from oz_worker.backends.job_object import ROLE_PREFLIGHT, preflight_job, selector
from oz_worker.backends.job_waits import Limits
from oz_worker.cluster import AlreadyExists, Cluster, ClusterDown, ClusterError, Conflict, NotFound
from oz_worker.errors import NotUsable
from oz_worker.model import ExitFacts, Reason
from oz_worker.settings import KubernetesOptions
from oz_worker.timing import Deadline, format_duration

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5
_LAST_SECONDS = 5.0
"""How long each answer may take that is asked for when the time is up: the last ones decide."""
_AT_ONCE = -1.0
"""A limit that has passed also for what is seen for the first time."""
_RBAC = "deploy/kubernetes/rbac.yaml has the Role that is needed"


class Permission(NamedTuple):
    """Something that our account should be allowed. *without* says what is lost otherwise; "" for all."""

    verb: str
    resource: str
    subresource: str = ""
    without: str = ""

    @property
    def name(self) -> str:
        """As people say it: `get pods/log`."""
        return f"{self.verb} {self.resource}{f'/{self.subresource}' if self.subresource else ''}"


NEEDED = (
    *(Permission(verb, "jobs") for verb in ("create", "get", "list", "delete")),
    Permission("list", "pods"),
    Permission("watch", "jobs", without="Jobs are listed every few seconds instead of watched"),
    Permission("watch", "pods", without="pods are listed every few seconds instead of watched"),
    Permission("get", "pods", "log", without="reports of failures carry no output of the agent"),
    Permission("list", "events", without="reports of pods that never start lack the cluster's reasons"),
    Permission("patch", "jobs", without="a failed Job that still runs is deleted instead of stopped and kept"),
)
_FOR_SECRETS = Permission("create", "secrets")


class Preflight:
    """The checks at the start of one worker. One thread uses it; each call is bounded."""

    def __init__(self, cluster: Cluster, options: KubernetesOptions, *, worker_id: str, instance: str) -> None:
        self._cluster = cluster
        self._options = options
        self._worker_id = worker_id
        self._instance = instance

    def missing(self) -> list[Permission]:
        """What our account may not do, of what it should. Raises NotUsable when that cannot be found out."""
        wanted = [*NEEDED, *([_FOR_SECRETS] if self._options.env_in_secret else [])]
        try:
            return [one for one in wanted if not self._cluster.may(one.verb, one.resource, one.subresource)]
        except ClusterError as error:
            raise NotUsable(f"the permissions in {self._place()} cannot be found out: {error}") from error

    def permissions(self) -> list[str]:
        """What is lost for want of a permission, in sentences. Raises NotUsable for one that no task can do without."""
        missing = self.missing()
        fatal = [one.name for one in missing if not one.without]
        if fatal:
            raise NotUsable(f"this account may not {', '.join(fatal)} in {self._place()}; {_RBAC}")
        return [f"this account may not {one.name} in {self._place()}: {one.without}" for one in missing]

    def tidy(self) -> None:
        """Remove what an earlier preflight left, when it was killed."""
        try:
            for job in self._cluster.find("jobs", self._selector()).items:
                self._delete(str(job["metadata"]["name"]), str(job["metadata"]["uid"]))
        except ClusterError as error:
            logger.info("Jobs of an earlier preflight go by their own TTL: %s", error)

    def run(self) -> str:
        """Run the Job and remove it; "" or a sentence about what is well but slow. Raises NotUsable."""
        try:
            thing = preflight_job(
                self._options, worker_id=self._worker_id, instance=self._instance, stamp=time.time_ns()
            )
        except ValueError as error:
            raise NotUsable(f"backend.kubernetes: {error}") from error
        name = str(thing["metadata"]["name"])
        try:
            made = self._cluster.create("jobs", thing)
        except (ClusterDown, AlreadyExists) as error:
            raise NotUsable(f"the preflight Job could not be created in {self._place()}: {error.said}") from error
        except ClusterError as error:
            cure = f"mend that; {_RBAC}" if "cannot create resource" in error.said else "mend that"
            raise NotUsable(f"the preflight Job was refused in {self._place()}: {error.said}; {cure}") from error
        try:
            return self._judge(self._until_known(name))
        except ClusterError as error:
            raise NotUsable(f"the preflight Job in {self._place()} cannot be watched: {error}") from error
        finally:
            self._delete(name, str(made["metadata"]["uid"]))

    def _until_known(self, name: str) -> ExitFacts | None:
        """How the Job ended, or why it does not begin; None when even at the end of the time nothing tells."""
        deadline = Deadline(self._options.preflight_timeout)
        limits = Limits.of(self._options).within(self._options.preflight_timeout)
        waits, events = job_facts.NO_WAITS, list[dict[str, Any]]()
        while True:
            last = deadline.passed()
            try:
                job, pods = self._look(name, deadline)
            except ClusterDown:
                if last:
                    raise
                time.sleep(_LOOK_SECONDS)
                continue
            if last:  # whatever it waits for has lasted too long; what the cluster last said of it is not yet here
                limits, events = limits.within(_AT_ONCE), self._events(job, *pods)
            verdict = job_facts.judge(job_facts.Seen(job, pods, events, waits), limits, time.monotonic())
            if verdict.facts is not None or last:
                return verdict.facts
            waits = verdict.waits
            if verdict.wants_events:
                events = self._events(job, *pods)
            time.sleep(_LOOK_SECONDS)

    def _look(self, name: str, deadline: Deadline) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The Job and its pods. Raises ClusterError."""
        patience = min(self._cluster.timeout, max(_LAST_SECONDS, deadline.left()))
        job = self._cluster.get("jobs", name, timeout=patience)
        if job is None:
            raise NotFound(f"the Job {name} is gone")
        pods = self._cluster.find("pods", self._selector(), timeout=patience).items
        return job, [pod for pod in pods if any(one.get("uid") == job["metadata"]["uid"] for one in _owners(pod))]

    def _events(self, *things: dict[str, Any]) -> list[dict[str, Any]]:
        """What the cluster said of *things*, asked for each by itself: a busy namespace has thousands of others."""
        wanted = [f"involvedObject.uid={thing['metadata']['uid']}" for thing in things]
        try:
            return [event for one in wanted for event in self._cluster.find("events", fields=one, pages=1).items]
        except ClusterError:
            return []

    def _judge(self, facts: ExitFacts | None) -> str:
        long = format_duration(self._options.preflight_timeout)
        if facts is None:
            raise NotUsable(
                f"the preflight Job in {self._place()} did not end within {long}; look at it with"
                f" `{self._cluster.command('get', 'events')}`, or raise backend.kubernetes.preflight_timeout"
            )
        if facts.reason is Reason.UNSCHEDULABLE:
            return f"the preflight Job found no room for now, tasks may wait: {facts.detail}"
        if facts.reason is not None:
            raise NotUsable(
                f"the preflight Job in {self._place()} failed: {facts.detail} Mend that, choose another"
                " backend.kubernetes.preflight_image, or set backend.kubernetes.preflight to false."
            )
        return ""

    def _delete(self, name: str, uid: str) -> None:
        try:
            self._cluster.delete("jobs", name, uid)
        except (NotFound, Conflict):
            pass
        except ClusterError as error:
            logger.info("the preflight Job %s goes by its own TTL: %s", name, error)

    def _selector(self) -> str:
        return selector(worker_id=self._worker_id, instance=self._instance, role=ROLE_PREFLIGHT)

    def _place(self) -> str:
        return f"the namespace {self._cluster.namespace}"


def _owners(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return list(pod["metadata"].get("ownerReferences") or [])
