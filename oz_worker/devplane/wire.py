"""The control plane's own copy of the Oz wire (oz.md 4, 13, 24; names.md, Wire): builds what a server says, judges
what a worker says.

Written apart from the worker's codec and importing nothing of it, so that judge and codec cannot share a mistake.
Reading is strict where the worker must be tolerant: a field too many, a wrong type, a reason the real server does not
know, a frame over its size are faults of the worker.
"""

from __future__ import annotations

import json
from typing import Any, Mapping, NamedTuple

FRAME_BYTES = 64 * 1024
MESSAGE_BYTES = 4 * 1024

CLAIMED = "task_claimed"
REJECTED = "task_rejected"
COMPLETED = "task_completed"
FAILED = "task_failed"
CLOSED = "execution_closed"
TERMINAL = (COMPLETED, FAILED)

REJECTIONS = frozenset(
    (
        "worker at maximum concurrency",
        "worker is shutting down",
        "one_shot_complete",
        "worker is out of disk space",
        "backend unavailable",
        "previous execution is still being cancelled",
    )
)
CANCELLING = "previous execution is still being cancelled"

REASONS = frozenset(
    [
        "task_timeout",
        "task_cancelled",
        "graceful_shutdown",
        "image_pull",
        "invalid_image",
        "sidecar_prep",
        "container_create",
        "container_start",
        "container_wait",
        "container_exit",
        "container_oom",
        "workspace_setup",
        "setup_command",
        "teardown_command",
        "agent_invocation",
        "dispatch_command",
        "dispatch_timeout",
        "cancel_command",
        "job_create",
        "job_watch",
        "pod_watch",
        "job_failed",
        "evicted",
        "unschedulable",
        "volume_mount",
        "init_container",
        "active_deadline",
        "cleanup",
        "unknown",
    ]
)

# type -> (fields that must be there, fields that may be); execution_id is judged against the assignment by the rules.
_FIELDS: Mapping[str, tuple[frozenset[str], frozenset[str]]] = {
    CLAIMED: (frozenset(("task_id", "worker_id")), frozenset(("execution_id",))),
    REJECTED: (frozenset(("task_id", "reason")), frozenset(("execution_id",))),
    COMPLETED: (frozenset(("task_id", "message")), frozenset(("execution_id", "task_state"))),
    FAILED: (frozenset(("task_id", "message", "failure_reason")), frozenset(("execution_id", "exit_code"))),
    CLOSED: (frozenset(("task_id",)), frozenset(("execution_id",))),
}


class WireFault(Exception):
    """What a worker sent is no frame of the protocol; `str()` says what is wrong with it."""


class Key(NamedTuple):
    """What a piece of work is called; an empty execution id counts as one."""

    task_id: str
    execution_id: str = ""

    def __str__(self) -> str:
        return f"{self.task_id}/{self.execution_id}" if self.execution_id else self.task_id


class Frame(NamedTuple):
    """One frame of a worker. `text` is what stood on the wire, to the byte: repeats are compared by it.

    Fields that the type does not have, or that were left out, are empty or None.
    """

    kind: str
    key: Key
    text: str
    worker_id: str = ""
    message: str = ""
    reason: str = ""
    exit_code: int | None = None
    cancelled: bool = False

    @property
    def terminal(self) -> bool:
        """Whether it ends an attempt (completed or failed)."""
        return self.kind in TERMINAL


def assignment(
    task_id: str,
    *,
    execution_id: str = "",
    task: Mapping[str, Any] | None = None,
    env_vars: Mapping[str, str] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> str:
    """The text of a `task_assignment`; *extra* adds or replaces fields of its data."""
    data: dict[str, Any] = {"task_id": task_id, "task": task}
    if execution_id:
        data["execution_id"] = execution_id
    if env_vars is not None:
        data["env_vars"] = dict(env_vars)
    data.update(extra or {})
    return json.dumps({"type": "task_assignment", "data": data})


def cancellation(task_id: str, execution_id: str = "") -> str:
    """The text of a `task_cancellation`: of one execution, or of all of the task's."""
    data = {"task_id": task_id, "execution_id": execution_id} if execution_id else {"task_id": task_id}
    return json.dumps({"type": "task_cancellation", "data": data})


def parse(text: str) -> Frame:
    """Read one text message of a worker. Raises WireFault for whatever is not exactly a frame of the protocol."""
    if len(text.encode()) > FRAME_BYTES:
        raise WireFault(f"the frame has {len(text.encode())} bytes; {FRAME_BYTES} are allowed")
    try:
        envelope = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise WireFault(f"the frame is not JSON: {error}") from None
    if not isinstance(envelope, dict) or set(envelope) != {"type", "data"}:
        raise WireFault('the frame is not an object with exactly "type" and "data"')
    kind, data = envelope["type"], envelope["data"]
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise WireFault(f"no frame of a worker has the type {kind!r}")
    if not isinstance(data, dict):
        raise WireFault(f"the data of {kind} is no object")
    return _judged(kind, data, text)


def _judged(kind: str, data: dict[str, Any], text: str) -> Frame:
    required, optional = _FIELDS[kind]
    if missing := required - set(data):
        raise WireFault(f"{kind} lacks {', '.join(sorted(missing))}")
    if extra := set(data) - required - optional:
        raise WireFault(f"{kind} has fields that the protocol does not know: {', '.join(sorted(extra))}")
    values = {name: _text(kind, name, value) for name, value in data.items() if name != "exit_code"}
    if len(values.get("message", "").encode()) > MESSAGE_BYTES:
        raise WireFault(f"the message of {kind} is over {MESSAGE_BYTES} bytes")
    reason = values.get("reason") or values.get("failure_reason") or ""
    if kind == REJECTED and reason not in REJECTIONS:
        raise WireFault(f"{kind} has a reason that the server does not know: {reason!r}")
    if kind == FAILED and reason not in REASONS:
        raise WireFault(f"{kind} has a failure_reason that the server does not know: {reason!r}")
    if values.get("task_state", "CANCELLED") != "CANCELLED":
        raise WireFault(f"{kind} has the task_state {values['task_state']!r}; only CANCELLED exists")
    code = data.get("exit_code")
    if "exit_code" in data and (type(code) is not int or not 1 <= code <= 255):
        raise WireFault(f"{kind} has the exit_code {code!r}; it is 1 to 255 or left out")
    return Frame(
        kind,
        Key(values["task_id"], values.get("execution_id", "")),
        text,
        worker_id=values.get("worker_id", ""),
        message=values.get("message", ""),
        reason=reason,
        exit_code=code,
        cancelled="task_state" in values,
    )


def _text(kind: str, name: str, value: Any) -> str:
    """*value* as a non-empty string; an id that is not there must be left out, not empty."""
    if not isinstance(value, str):
        raise WireFault(f"{name} of {kind} is {type(value).__name__}, not a string")
    if not value:
        raise WireFault(f"{name} of {kind} is empty; a field without a value is left out")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise WireFault(f"{name} of {kind} has a lone surrogate")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
