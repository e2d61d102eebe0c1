"""Pure data that every layer shares: what a task is, how a unit ended, what is reported."""

from __future__ import annotations

import enum
import hashlib
import posixpath
from dataclasses import dataclass, field
from typing import Any, Mapping, NamedTuple


class Key(NamedTuple):
    """What the server calls a piece of work; an empty execution id counts as one."""

    task_id: str
    execution_id: str = ""

    def __str__(self) -> str:
        """For the log: on one line whatever the ids hold."""
        name = f"{self.task_id}/{self.execution_id}" if self.execution_id else self.task_id
        return name if name.isprintable() else ascii(name)


class Reason(str, enum.Enum):
    """The closed set of failure reasons on the wire (oz.md 13): the server knows no others."""

    TASK_TIMEOUT = "task_timeout"
    TASK_CANCELLED = "task_cancelled"
    GRACEFUL_SHUTDOWN = "graceful_shutdown"
    IMAGE_PULL = "image_pull"
    INVALID_IMAGE = "invalid_image"
    SIDECAR_PREP = "sidecar_prep"
    CONTAINER_CREATE = "container_create"
    CONTAINER_START = "container_start"
    CONTAINER_WAIT = "container_wait"
    CONTAINER_EXIT = "container_exit"
    CONTAINER_OOM = "container_oom"
    WORKSPACE_SETUP = "workspace_setup"
    SETUP_COMMAND = "setup_command"
    TEARDOWN_COMMAND = "teardown_command"
    AGENT_INVOCATION = "agent_invocation"
    DISPATCH_COMMAND = "dispatch_command"
    DISPATCH_TIMEOUT = "dispatch_timeout"
    CANCEL_COMMAND = "cancel_command"
    JOB_CREATE = "job_create"
    JOB_WATCH = "job_watch"
    POD_WATCH = "pod_watch"
    JOB_FAILED = "job_failed"
    EVICTED = "evicted"
    UNSCHEDULABLE = "unschedulable"
    VOLUME_MOUNT = "volume_mount"
    INIT_CONTAINER = "init_container"
    ACTIVE_DEADLINE = "active_deadline"
    CLEANUP = "cleanup"
    UNKNOWN = "unknown"


class Refusal(enum.Enum):
    """Why an assignment is rejected: the words on the wire and the label in the metrics (names.md, Wire)."""

    AT_CAPACITY = ("worker at maximum concurrency", "at_capacity")
    DRAINING = ("worker is shutting down", "draining")
    ONE_SHOT = ("one_shot_complete", "one_shot")
    DISK = ("worker is out of disk space", "disk")
    BACKEND = ("backend unavailable", "backend")
    CANCELLING = ("previous execution is still being cancelled", "cancelling")

    @property
    def wire(self) -> str:
        """The reason as the server reads it."""
        return self.value[0]

    @property
    def label(self) -> str:
        """The reason as the metrics count it."""
        return self.value[1]


class Cause(str, enum.Enum):
    """Why the worker itself ends a unit. Committed before the first TERM; the first one committed stays."""

    CANCEL = "cancel"
    SHUTDOWN = "shutdown"
    DEADLINE = "deadline"


def plain_path(path: str) -> str:
    """The one spelling of a path in a container: `//a/./b/` is `/a/b`. A relative one stays relative."""
    normal = posixpath.normpath(path)
    return normal[1:] if normal.startswith("//") else normal  # POSIX lets two slashes at the start mean something


def mount_point(volume: str) -> str:
    """Where in the container `HOST:CONTAINER[:MODE]`, or a path alone, is mounted."""
    parts = volume.split(":")
    return plain_path(parts[1] if len(parts) > 1 else parts[0])


class Sidecar(NamedTuple):
    """An image whose files a task wants to see below *mount_path*."""

    image: str
    mount_path: str
    read_write: bool = False


class InstanceShape(NamedTuple):
    """The compute size asked for; 0 means not said."""

    vcpus: int = 0
    memory_gb: int = 0


@dataclass(frozen=True)
class TaskSpec:
    """One assignment, decoded and validated. Holds secrets in memory only: never stored, never logged.

    `argv` is what follows the `oz` program, from `agent` on (oz.md 6). `environment` is the common part of
    oz.md 7 in its order. `mcp` is the JSON that stands behind `--mcp` in argv, or empty. `document` is the
    opaque `task` mapping as received, which only the command backend forwards.
    """

    key: Key
    run_id: str
    argv: tuple[str, ...] = field(repr=False)  # the JSON behind --mcp often holds tokens
    environment: Mapping[str, str] = field(repr=False)
    secrets: tuple[str, ...] = field(default=(), repr=False)
    title: str = ""
    harness: str = ""
    mcp: str = field(default="", repr=False)
    docker_image: str = ""
    sidecars: tuple[Sidecar, ...] = ()
    shape: InstanceShape = InstanceShape()
    document: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class ExitFacts:
    """What a backend knows of an end, without policy: no cancel, no deadline, no shutdown in here.

    `code` is 0..255 with signals as 128 + signal, or None when it cannot be known. `reason` is what went wrong in
    the backend's eyes, None for success. `detail` is a sentence for people that names the cure. `agent_started` is
    False when it is proven that the agent never ran. `remains` says what could not be confirmed gone and where;
    empty is the proof that the unit is gone. `oom` marks an end by the kernel's memory killer. `uncancelled` says why
    a `cancel_command` that had to run for this end has failed.
    """

    code: int | None = None
    reason: Reason | None = None
    detail: str = ""
    agent_started: bool = True
    remains: str = ""
    dispatched: bool = False
    oom: bool = False
    uncancelled: str = ""


class ReportKind(str, enum.Enum):
    """The five things a worker says of a task."""

    CLAIMED = "claimed"
    REJECTED = "rejected"
    COMPLETED = "completed"
    FAILED = "failed"
    CLOSED = "closed"


class Report(NamedTuple):
    """One thing to tell the server; a dialect turns it into a frame. Completed with `cancelled` is a cancel."""

    kind: ReportKind
    key: Key
    message: str = ""
    reason: Reason | None = None
    exit_code: int | None = None
    cancelled: bool = False


def unit_name(key: Key, attempt: int) -> str:
    """The deterministic name of an attempt's unit: 16 hex digits (names.md, Environment)."""
    text = "\0".join((key.task_id, key.execution_id, str(attempt)))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
