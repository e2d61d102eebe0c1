"""The Job controller: makes the pods of Jobs, counts how they end, and says what became of the Job."""

from __future__ import annotations

import time
from typing import Any

from tests.cluster import clock, conditions
from tests.cluster.api import Api
from tests.cluster.loop import Loop, Timer
from tests.cluster.refusals import Json, Refused
from tests.cluster.resources import JOBS, PODS
from tests.cluster.store import Change, Place, copied, place_of

TRACKING = "batch.kubernetes.io/job-tracking"
_FINISHED = ("Complete", "Failed")


def is_finished(job: Json) -> bool:
    return any(conditions.holds(job, kind) for kind in _FINISHED)


def _has_failed(pod: Json) -> bool:
    """A pod that is to be deleted counts as failed: it may never come to an end of its own."""
    phase = pod["status"].get("phase")
    return phase == "Failed" or (phase != "Succeeded" and bool(pod["metadata"].get("deletionTimestamp")))


def _is_over(pod: Json) -> bool:
    return pod["status"].get("phase") in ("Succeeded", "Failed")


class JobController:
    """Brings one Job after the other nearer to what it asks for, on the loop's thread."""

    def __init__(self, api: Api, loop: Loop, *, back_off: float, release: str) -> None:
        self._api = api
        self._loop = loop
        self._back_off = back_off
        self._release = tuple(int(part) for part in release.split("."))
        self._two_steps = self._release >= (1, 31)
        """Whether the end is announced (FailureTarget, SuccessCriteriaMet) before it is declared."""
        self._timers: dict[tuple[Place, str], Timer] = {}
        self._pods: dict[str, dict[Place, Json]] = {}
        self._failures: dict[str, int] = {}
        self._not_before: dict[str, float] = {}
        self._counted: dict[str, set[str]] = {}
        self._tries: dict[str, int] = {}
        api.store.listeners.append(self._heard)

    def _heard(self, change: Change) -> None:
        if change.resource == JOBS and change.type == "DELETED":
            self._loop.call(lambda: self._forget(change.object))
        elif change.resource == JOBS:
            self._loop.call(lambda: self._sync(place_of(change.object)))
        elif change.resource == PODS:
            self._loop.call(lambda: self._see(change))

    def _forget(self, job: Json) -> None:
        for key in [key for key in self._timers if key[0] == place_of(job)]:
            self._timers.pop(key).cancel()
        tables: tuple[dict[str, Any], ...] = (self._failures, self._not_before, self._counted, self._tries)
        for table in tables:
            table.pop(job["metadata"]["uid"], None)
        for pod in list(self._pods.get(job["metadata"]["uid"], {}).values()):
            self._let_go(pod)

    def _see(self, change: Change) -> None:
        pod = change.object
        owner = next((row for row in pod["metadata"].get("ownerReferences") or () if row.get("controller")), None)
        if owner is None or owner["kind"] != "Job":
            if TRACKING in (pod["metadata"].get("finalizers") or ()) and change.type != "DELETED":
                self._let_go(pod)  # disowned: nobody counts it
            for owned in self._pods.values():
                owned.pop(place_of(pod), None)
            return
        owned = self._pods.setdefault(owner["uid"], {})
        if change.type == "DELETED":
            owned.pop(place_of(pod), None)
        else:
            owned[place_of(pod)] = pod
        place = pod["metadata"]["namespace"], owner["name"]
        job = self._api.store.get(JOBS, *place)
        if job is not None and job["metadata"]["uid"] == owner["uid"]:
            self._sync(place)
        else:
            if change.type != "DELETED":
                self._let_go(pod)
            if not owned:
                self._pods.pop(owner["uid"], None)

    def _let_go(self, pod: Json) -> None:
        """Take our finalizer off a pod that is counted, or whose Job is gone."""

        def without(new: Json) -> None:
            rows = [each for each in new["metadata"].get("finalizers") or () if each != TRACKING]
            new["metadata"].pop("finalizers", None)
            if rows:
                new["metadata"]["finalizers"] = rows

        if TRACKING in (pod["metadata"].get("finalizers") or ()):
            self._api.change(PODS, *place_of(pod), without, uid=pod["metadata"]["uid"])

    def _at(self, place: Place, what: str, when: float) -> None:
        """Look again at *when* (seconds since 1970)."""
        if old := self._timers.pop((place, what), None):
            old.cancel()
        self._timers[place, what] = self._loop.later(max(0.0, when - time.time()) + 0.01, lambda: self._sync(place))

    def _owned(self, job: Json) -> list[Json]:
        """The pods of a Job as they are now, not as they were when the loop last heard of them."""
        known = self._pods.get(job["metadata"]["uid"], {})
        found = [(self._api.store.get(PODS, *place), pod["metadata"]["uid"]) for place, pod in sorted(known.items())]
        return [pod for pod, uid in found if pod is not None and pod["metadata"]["uid"] == uid]

    def _sync(self, place: Place) -> None:
        found = self._api.store.get(JOBS, *place)
        if found is None:
            return
        job: Json = copied(found)
        pods = self._owned(job)
        if job["metadata"].get("deletionTimestamp"):
            for pod in pods:
                self._let_go(pod)
            return
        if is_finished(job):
            self._after_the_end(place, job, pods)
            return
        self._count(job, pods)
        self._decide(place, job, pods)
        for pod in pods:
            if _is_over(pod) or _has_failed(pod):
                self._let_go(pod)

    def _count(self, job: Json, pods: list[Json]) -> None:
        """Fill in the status: ends that are new are counted once, by the finalizer that they still carry."""
        status, spec = job["status"], job["spec"]
        if not spec["suspend"]:
            status.setdefault("startTime", clock.now())
        fresh = [pod for pod in pods if TRACKING in (pod["metadata"].get("finalizers") or ())]
        counted = self._counted.setdefault(job["metadata"]["uid"], set())
        for pod in fresh:
            uid = pod["metadata"]["uid"]
            if uid in counted:
                continue
            if pod["status"].get("phase") == "Succeeded":
                status["succeeded"] = status.get("succeeded", 0) + 1
                counted.add(uid)
            elif _has_failed(pod):
                status["failed"] = status.get("failed", 0) + 1
                counted.add(uid)
                self._failures[job["metadata"]["uid"]] = self._failures.get(job["metadata"]["uid"], 0) + 1
        active = [pod for pod in pods if not _is_over(pod) and not pod["metadata"].get("deletionTimestamp")]
        status["active"] = len(active)
        status["ready"] = sum(conditions.holds(pod, "Ready") for pod in active)
        if self._release >= (1, 28):
            leaving = [pod for pod in pods if pod["metadata"].get("deletionTimestamp") and not _is_over(pod)]
            status["terminating"] = len(leaving)
        status["uncountedTerminatedPods"] = {}

    def _decide(self, place: Place, job: Json, pods: list[Json]) -> None:
        spec, status = job["spec"], job["status"]
        wanted = spec.get("completions")
        enough = (
            status.get("succeeded", 0) >= wanted
            if wanted is not None
            else bool(status.get("succeeded")) and not status["active"]
        )
        announced = conditions.condition(job, "FailureTarget")
        deadline = spec.get("activeDeadlineSeconds")
        if announced and announced["status"] == "True":
            self._fail(place, job, pods, announced["reason"], announced["message"])
        elif enough:
            self._succeed(place, job, pods)
        elif status.get("failed", 0) > spec["backoffLimit"]:
            self._fail(place, job, pods, "BackoffLimitExceeded", "Job has reached the specified backoff limit")
        elif deadline is not None and "startTime" in status and not spec["suspend"]:
            end = clock.seconds(status["startTime"]) + deadline
            if time.time() >= end:
                self._fail(place, job, pods, "DeadlineExceeded", "Job was active longer than specified deadline")
            else:
                self._at(place, "deadline", end)
                self._go_on(place, job, pods)
        else:
            self._go_on(place, job, pods)

    def _store(self, job: Json) -> Json | None:
        status = {key: value for key, value in job["status"].items() if key != "active" or value}
        return self._api.change(JOBS, *place_of(job), lambda new: new.update(status=status), uid=job["metadata"]["uid"])

    def _event(self, job: Json, kind: str, reason: str, message: str) -> None:
        self._api.record(
            JOBS, job, kind, reason, message, "job-controller", series="yes" if reason == "FailedCreate" else ""
        )

    def _go_on(self, place: Place, job: Json, pods: list[Json]) -> None:
        spec, status = job["spec"], job["status"]
        if spec["suspend"]:
            self._suspend(job, pods)
            return
        if conditions.holds(job, "Suspended"):
            conditions.put(job, "Suspended", "False", "JobResumed", "Job resumed")
            status["startTime"] = clock.now()
            self._event(job, "Normal", "Resumed", "Job resumed")
        self._store(job)
        left = spec["parallelism"]
        if spec.get("completions") is not None:
            left = min(left, spec["completions"] - status.get("succeeded", 0))
        for _ in range(left - status.get("active", 0)):
            if not self._make_pod(place, job):
                return

    def _suspend(self, job: Json, pods: list[Json]) -> None:
        if not conditions.holds(job, "Suspended"):
            conditions.put(job, "Suspended", "True", "JobSuspended", "Job suspended")
            self._event(job, "Normal", "Suspended", "Job suspended")
        job["status"].pop("startTime", None)
        self._store(job)
        self._delete_active(job, pods)

    def _make_pod(self, place: Place, job: Json) -> bool:
        """Whether there is one more now; after a failure, not before its pause is over."""
        uid = job["metadata"]["uid"]
        if failures := self._failures.pop(uid, 0):
            self._not_before[uid] = time.time() + self._back_off * 2 ** (failures - 1)
        if self._not_before.get(uid, 0.0) > time.time():
            self._at(place, "pause", self._not_before[uid])
            return False
        template = copied(job["spec"]["template"])
        meta = template.get("metadata") or {}
        name = job["metadata"]["name"]
        owner = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "name": name,
            "uid": uid,
            "controller": True,
            "blockOwnerDeletion": True,
        }
        pod = {"kind": "Pod", "apiVersion": "v1", "spec": template["spec"]}
        kept = {key: meta[key] for key in ("labels", "annotations") if meta.get(key)}
        finalizers = [*(meta.get("finalizers") or ()), TRACKING]
        pod["metadata"] = {**kept, "generateName": f"{name}-", "finalizers": finalizers, "ownerReferences": [owner]}
        try:
            made = self._api.create(PODS, place[0], pod)
        except Refused as refused:
            self._event(job, "Warning", "FailedCreate", f"Error creating: {refused.message}")
            tries = self._tries[uid] = self._tries.get(uid, -1) + 1
            self._at(place, "create", time.time() + min(self._back_off * 2**tries, 30.0))
            self._not_before[uid] = time.time() + min(self._back_off * 2**tries, 30.0)
            return False
        self._tries.pop(uid, None)
        self._pods.setdefault(uid, {})[place_of(made)] = made  # else we would make another before we hear of this one
        self._event(job, "Normal", "SuccessfulCreate", f"Created pod: {made['metadata']['name']}")
        return True

    def _delete_active(self, job: Json, pods: list[Json]) -> None:
        for pod in pods:
            if not _is_over(pod) and not pod["metadata"].get("deletionTimestamp"):
                try:
                    self._api.delete(PODS, *place_of(pod), {"preconditions": {"uid": pod["metadata"]["uid"]}})
                    self._event(job, "Normal", "SuccessfulDelete", f"Deleted pod: {pod['metadata']['name']}")
                except Refused:
                    pass  # it is gone

    def _fail(self, place: Place, job: Json, pods: list[Json], reason: str, message: str) -> None:
        living = [pod for pod in pods if not _is_over(pod)]
        if self._two_steps:
            conditions.put(job, "FailureTarget", "True", reason, message)
        if living and self._two_steps:
            self._store(job)
        else:
            if reason == "DeadlineExceeded" or living:
                job["status"].pop("active", None)
            conditions.put(job, "Failed", "True", reason, message)
            self._event(job, "Warning", reason, message)
            self._store(job)
        self._delete_active(job, pods)

    def _succeed(self, place: Place, job: Json, pods: list[Json]) -> None:
        words = ("CompletionsReached", "Reached expected number of succeeded pods") if self._two_steps else ("", "")
        living = [pod for pod in pods if not _is_over(pod)]
        if self._two_steps:
            conditions.put(job, "SuccessCriteriaMet", "True", *words)
        if living and self._two_steps:
            self._store(job)
            self._delete_active(job, pods)
            return
        conditions.put(job, "Complete", "True", *words)
        job["status"]["completionTime"] = clock.now()
        self._event(job, "Normal", "Completed", "Job completed")
        self._store(job)

    def _after_the_end(self, place: Place, job: Json, pods: list[Json]) -> None:
        for pod in pods:
            self._let_go(pod)
        self._delete_active(job, pods)
        ttl = job["spec"].get("ttlSecondsAfterFinished")
        if ttl is None:
            return
        ended = next(row for kind in _FINISHED if (row := conditions.condition(job, kind)))["lastTransitionTime"]
        end = clock.seconds(ended) + ttl
        if time.time() < end:
            self._at(place, "ttl", end)
            return
        options = {"propagationPolicy": "Foreground", "preconditions": {"uid": job["metadata"]["uid"]}}
        try:
            self._api.delete(JOBS, *place, options)
        except Refused:
            pass  # it is gone
