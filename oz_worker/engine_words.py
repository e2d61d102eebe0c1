"""What an engine says, as values: its containers, images and events, and the ways in which it refuses.

Everything here is text turned into values; nothing is asked. Whatever cannot be read raises EngineError.
"""

from __future__ import annotations

import json
from typing import Any, Mapping, NamedTuple

from oz_worker.errors import OzWorkerError, Unanswered

LABEL = "oz-worker."
"""Before every label of ours (names.md): instance, worker, task, execution, unit, role, owner."""
_LABELS = ("instance", "worker", "task", "execution", "unit", "role", "owner")
_EACH_LABEL = ",".join(f'"{LABEL}{name}":{{{{json (.Label "{LABEL}{name}")}}}}' for name in _LABELS)
_LISTED = '{"id":{{json .ID}},"name":{{json .Names}},"status":{{json .State}},'
LISTED = {
    "docker": _LISTED + '"image":{{json .Image}},"labels":{' + _EACH_LABEL + "}}",
    "podman": _LISTED + '"image":{{json .ImageID}},"labels":{{json .Labels}}}',
}
"""The forms of `ps` that `listed_of` reads: docker's labels come as one text there, cut by commas, so each is asked."""
INSPECTED = (
    '{"id":{{json .ID}},"name":{{json .Name}},"state":{{json .State}},"labels":{{json .Config.Labels}},'
    '"mounts":{{json .Mounts}},"image":{{json .Image}}}'
)
"""The form of `container inspect` that `container_of` reads."""
NEVER_STARTED = ("created", "configured", "initialized")
UNCLEAR = "unclear"
"""The status of a container that has ended, of which the engine does not say how."""


class EngineError(OzWorkerError):
    """The engine refused; `said` are its own words, `code` the exit code of its program."""

    def __init__(self, sentence: str, said: str = "", code: int | None = None) -> None:
        super().__init__(sentence)
        self.said = said or sentence
        self.code = code


class EngineDown(EngineError, Unanswered):
    """Nothing is known of what was asked: the engine is stopped, hangs, or cannot be reached."""


class NoSuch(EngineError):
    """What was named does not exist."""


class NameTaken(EngineError):
    """A container of this name exists already."""


class Interrupted(EngineDown):
    """The caller's `interrupt` came first; nothing is known of what was asked."""


class Facts(NamedTuple):
    """What an engine says of itself. `clock` is its time, as `--since` takes it."""

    system: str
    architecture: str
    version: str
    log_driver: str
    clock: str


class Container(NamedTuple):
    """One container as it is just now. `status` is created, running, exited...; `error` why it could not be started."""

    id: str
    name: str
    labels: Mapping[str, str]
    status: str
    code: int
    oom: bool
    error: str
    volumes: tuple[str, ...]
    image: str
    started: bool

    @property
    def lives(self) -> bool:
        """Whether its main process exists, or may: what ended in a way that cannot be read is looked at again."""
        return self.status in ("running", "paused", "restarting", "stopping", UNCLEAR)

    @property
    def fresh(self) -> bool:
        """Whether it was never started; one whose removal failed half-way does not say so by its status."""
        return self.status in NEVER_STARTED or not (self.started or self.lives)

    def label(self, name: str) -> str:
        """One of our labels, "" when it is not there."""
        return self.labels.get(LABEL + name, "")


class Image(NamedTuple):
    """One image as the engine has it. `digests` are those it was pulled by (`name@sha256:...`); any text may be ""."""

    id: str
    digests: tuple[str, ...]
    system: str
    architecture: str
    variant: str


class Event(NamedTuple):
    """Something happened to a container: `action` is create, start, die or destroy."""

    action: str
    name: str
    code: int | None


def container_of(line: bytes) -> Container:
    """One line of `container inspect` in the form INSPECTED. Raises EngineError."""
    about = object_of(line)
    try:
        state = about.get("state") or {}
        mounts = about.get("mounts") or []
        return Container(
            id=str(about["id"]),
            name=str(about["name"]).lstrip("/"),
            labels=about.get("labels") or {},
            status=str(state.get("Status", "")),
            code=int(state.get("ExitCode") or 0) & 0xFF,
            oom=bool(state.get("OOMKilled")),
            error=str(state.get("Error") or ""),
            volumes=tuple(str(one["Name"]) for one in mounts if one.get("Type") == "volume" and one.get("Name")),
            image=str(about.get("image", "")),
            started=not str(state.get("StartedAt") or "0001-").startswith("0001-"),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise EngineError(f"the engine's program printed something unreadable: {line[:80]!r}") from error


def listed_of(line: bytes) -> Container:
    """One line of `ps`: as much of a container as that says, in the words of `container inspect`. Raises EngineError.

    A container that others link to has several names there; those with a slash are the others'.
    """
    about = object_of(line)
    try:
        names = str(about["name"]).split(",")
        return Container(
            id=str(about["id"]),
            name=next((one for one in names if "/" not in one), names[0]),
            labels=about.get("labels") or {},
            status=str(about["status"]).lower(),
            code=0,
            oom=False,
            error="",
            volumes=(),
            image=str(about.get("image", "")),
            started=str(about["status"]).lower() not in NEVER_STARTED,
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise EngineError(f"the engine's program printed something unreadable: {line[:80]!r}") from error


def object_of(text: bytes) -> dict[str, Any]:
    """A JSON object, also the only one of a list. Raises EngineError."""
    try:
        about = json.loads(text)
    except ValueError as error:
        raise EngineError(f"the engine's program printed something unreadable: {text[:80]!r}") from error
    if isinstance(about, list) and len(about) == 1:
        about = about[0]
    if not isinstance(about, dict):
        raise EngineError(f"the engine's program printed something unreadable: {text[:80]!r}")
    return about
