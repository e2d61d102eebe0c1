"""What of a Job is secret, read back from the Job itself: for the redactor of a worker that did not make it."""

from __future__ import annotations

from typing import Any, Mapping

from oz_worker.backends.environ import secrets_in
from oz_worker.backends.job_template import TASK
from oz_worker.cluster import Object


def secrets_of(job: Object) -> tuple[str, ...] | None:
    """The secrets in the environment and the arguments of the agent; None when they stand in a Secret of the task.

    That one cannot be read with the permissions a worker has.
    """
    task = _task(job)
    if uses_secret(job) or task is None:
        return None
    given = {str(one.get("name")): unescaped(one["value"]) for one in task.get("env") or [] if one.get("value")}
    return secrets_in(given, [unescaped(one) for one in task.get("args") or []])


def uses_secret(job: Object) -> bool:
    """Whether the agent's variables come from the task's own Secret, which has the Job's name."""
    task = _task(job) or {}
    name = job["metadata"]["name"]
    sources = [one.get("valueFrom") or {} for one in task.get("env") or []]
    return any((source.get("secretKeyRef") or {}).get("name") == name for source in sources)


def unescaped(text: str) -> str:
    """What the kubelet makes of a text in which every `$` is doubled."""
    return text.replace("$$", "$")


def _task(job: Object) -> Mapping[str, Any] | None:
    pod = ((job.get("spec") or {}).get("template") or {}).get("spec") or {}
    return next((one for one in pod.get("containers") or [] if one.get("name") == TASK), None)
