"""The one door to a container engine: its command line, docker's or podman's. What differs between the two is here.

Engines are talked to by their own program, so that its contexts, variables, credential helpers and certificates work.
Everything is said in this file's words: a container, a volume, an event; no caller reads an engine's output itself.
"""

from __future__ import annotations

import json
import re
import select
from datetime import datetime, timezone
from types import MappingProxyType
from typing import Any, Iterator, Mapping, NamedTuple, Sequence

from oz_worker import errand
from oz_worker.errors import OzWorkerError, Unanswered
from oz_worker.process import ProgramMissing, SpawnError, TooLong
from oz_worker.timing import format_duration

FILLER = "oz-fill-"
"""Before the name of a container into which files are copied. Docker lets every question about one wait until the copy
has ended (`container inspect` hung for as long as a `cp` did, `ps` did not), so none of these is ever looked at."""
LABEL = "oz-worker."
"""Before every label of ours (names.md): instance, worker, task, execution, unit, role, owner."""

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
NO_ANSWER = re.compile(
    r"(?i)cannot connect to|error during connect|failed to connect to the docker api|permission denied while trying"
    r"|is the docker daemon running|containerd\.sock|daemon is shutting down"
)
BROKEN_OFF = re.compile(r"(?i)unexpected eof|connection reset by peer|broken pipe")
"""Words of a CLI that has lost its engine; those of the second one can be an engine's that has lost somebody else."""
_GONE = re.compile(r"(?i)no such (container|object|volume|image)|no container with|image not known|no volume with")
_COMPLAINT = re.compile(r"(?i)\s*(error|cannot|failed|unable|docker: )")  # not a warning
_TAKEN = re.compile(r"(?i)is already in use|name .* in use")
_SAID_BYTES = 700
_SIGNALLED = 128
_INSPECTED = (
    '{"id":{{json .ID}},"name":{{json .Name}},"state":{{json .State}},"labels":{{json .Config.Labels}},'
    '"mounts":{{json .Mounts}},"image":{{json .Image}}}'
)


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
        """Whether its main process exists."""
        return self.status in ("running", "paused", "restarting", "stopping")

    @property
    def fresh(self) -> bool:
        """Whether it was never started; one whose removal failed half-way does not say so by its status."""
        return self.status in ("created", "configured", "initialized") or not (self.started or self.lives)

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


class Engine:
    """One engine. Holds no state of a container; safe from any thread; every call is bounded by *timeout* seconds."""

    def __init__(
        self, kind: str, program: str, *, environment: Mapping[str, str], instance: str, timeout: float
    ) -> None:
        self.kind = kind
        self.program = program
        self.environment = environment  # what its program runs with: contexts, credentials, proxies
        self.instance = instance
        self.timeout = timeout
        self._podman = kind == "podman"

    # -- calling -------------------------------------------------------------------------------------------------

    def call(
        self,
        *arguments: str,
        stdin: bytes = b"",
        extra: Mapping[str, str] | None = None,
        timeout: float = 0,
        interrupt: int = -1,
        limit: int = 1 << 20,
        partly: bool = False,
    ) -> bytes:
        """Run the program to its end and return its output.

        *extra* joins its environment, *timeout* replaces the engine's. *partly*: the output is wanted also where some
        of the things that were named do not exist. Raises EngineDown when nobody knows what came
        of it, Interrupted as one of these, NoSuch, NameTaken, or EngineError for any other refusal.
        """
        return self._call(arguments, stdin, extra or {}, timeout or self.timeout, interrupt, limit, partly=partly)

    def _call(
        self,
        arguments: Sequence[str],
        stdin: bytes = b"",
        extra: Mapping[str, str] = MappingProxyType({}),
        timeout: float = 0,
        interrupt: int = -1,
        limit: int = 64 << 20,
        *,
        partly: bool = False,
    ) -> bytes:
        timeout = timeout or self.timeout
        try:
            outcome = errand.run(
                [self.program, *arguments],
                environment={**self.environment, **extra},
                instance=self.instance,
                timeout=timeout,
                stdin=stdin,
                interrupt=interrupt,
                limit=limit,
            )
        except (ProgramMissing, TooLong) as error:
            raise EngineError(str(error)) from error
        except SpawnError as error:
            raise EngineDown(str(error)) from error  # no process, no memory: that passes
        if outcome.late:
            what = f"{self.kind} {arguments[0]}"
            if interrupt >= 0 and is_readable(interrupt):
                raise Interrupted(f"{what} was interrupted")
            raise EngineDown(f"{what} did not answer within {format_duration(timeout)}; is the engine well?")
        if outcome.code:
            refusal = self.refusal(arguments[0], outcome.code, outcome.errors or outcome.output)
            if not (partly and isinstance(refusal, NoSuch) and _only_gone(outcome.errors)):
                raise refusal
        return outcome.output

    def refusal(self, what: str, code: int, errors: bytes) -> EngineError:
        """The error that an exit code and the words on stderr stand for."""
        said = last_words(errors)
        if code > _SIGNALLED and not said:
            return EngineDown(f"{self.kind} {what} was killed by signal {code - _SIGNALLED}; is there enough memory?")
        sentence = f"{self.kind} {what}: {said or f'exit code {code}'}"
        words = errors.decode("utf-8", "replace").splitlines()
        if any((NO_ANSWER.search(line) or BROKEN_OFF.search(line)) and not answered(line) for line in words):
            return EngineDown(sentence, said, code)
        if _GONE.search(said):
            return NoSuch(sentence, said, code)
        if _TAKEN.search(said):
            return NameTaken(sentence, said, code)
        return EngineError(sentence, said, code)

    # -- looking -------------------------------------------------------------------------------------------------

    def facts(self) -> Facts:
        """What the engine is. Raises EngineError."""
        if self._podman:
            about = _object(self.call("info", "--format", "json"))
            host = about.get("host", {})
            clock = datetime.now(timezone.utc).isoformat()  # it has no daemon: its clock is ours
            version = about.get("version", {}).get("Version", "")
            return Facts(host.get("os", ""), host.get("arch", ""), version, host.get("logDriver", ""), clock)
        about = _object(self.call("info", "--format", "{{json .}}"))
        if not about.get("SystemTime"):  # some versions exit with 0 although nothing answered
            said = "; ".join(about.get("ServerErrors") or ["no answer"])
            raise EngineDown(f"docker info: {said}", said)
        machine = str(about.get("Architecture", ""))
        return Facts(
            str(about.get("OSType", "")),
            _ARCHITECTURES.get(machine, machine),
            str(about.get("ServerVersion", "")),
            str(about.get("LoggingDriver", "")),
            str(about["SystemTime"]),
        )

    def containers(self, *filters: str) -> list[Container]:
        """All containers, in any state, that every one of *filters* (`label=a=b`, `volume=x`) fits; no fillers."""
        return self.inspect(*(one for one, name in self._listed(filters) if not name.startswith(FILLER)))

    def fillers(self, *filters: str) -> list[str]:
        """The names of the fillers that every one of *filters* fits."""
        return [name for _, name in self._listed(filters) if name.startswith(FILLER)]

    def _listed(self, filters: Sequence[str]) -> list[tuple[str, str]]:
        chosen = [part for one in filters for part in ("--filter", one)]
        said = self.call("ps", "--all", "--no-trunc", "--format", "{{.ID}} {{.Names}}", *chosen, limit=8 << 20)
        pairs = (line.partition(" ") for line in said.decode().splitlines())
        return [(identity, name) for identity, _, name in pairs]

    def inspect(self, *names: str, timeout: float = 0) -> list[Container]:
        """These containers, without those that do not exist. *timeout* as in `call`."""
        found: list[Container] = []
        for start in range(0, len(names), 100):
            some = names[start : start + 100]
            said = self._call(("container", "inspect", "--format", _INSPECTED, *some), timeout=timeout, partly=True)
            found += [_container(line) for line in said.splitlines() if line.startswith(b"{")]
        return found

    def environment_of(self, name: str) -> tuple[dict[str, str], list[str]]:
        """The environment and the arguments a container was given, for the redactor alone: without its image's own."""
        form = '{"environment":{{json .Config.Env}},"arguments":{{json .Config.Cmd}},"image":{{json .Image}}}'
        about = _object(self.call("container", "inspect", "--format", form, name, limit=16 << 20))
        form = '{"environment":{{json .Config.Env}}}'
        said = self._call(("image", "inspect", "--format", form, str(about.get("image"))), partly=True)
        known = set((_object(said).get("environment") or []) if said.strip() else [])
        pairs = (entry.partition("=") for entry in about.get("environment") or [] if entry not in known)
        given = {key: value for key, _, value in pairs if key not in ("container", "TERM", "HOSTNAME")}
        return given, list(about.get("arguments") or [])

    def logs(self, name: str, *, lines: int, limit: int = 1 << 20, into: int = -1, timeout: float = 0) -> bytes:
        """The last *lines* of what a container printed on both streams: the last *limit* bytes, or the file *into*."""
        outcome = errand.run(
            [self.program, "logs", "--tail", str(lines), name],
            environment=self.environment,
            instance=self.instance,
            timeout=timeout or self.timeout,
            limit=limit,
            merged=True,
            into=into,
        )
        if outcome.late:
            raise EngineDown(f"{self.kind} logs did not answer within {format_duration(self.timeout)}")
        if outcome.code:
            raise self.refusal("logs", outcome.code, outcome.output)
        return outcome.output

    def image(self, reference: str, *, platform: str = "", interrupt: int = -1) -> Image | None:
        """The image of that name, None when the engine has none.

        *platform* chooses among several of one name, which docker can have since 28; older ones refuse it.
        """
        chosen = ["--platform", platform] if platform else []
        try:
            said = self.call("image", "inspect", *chosen, "--", reference, interrupt=interrupt, limit=8 << 20)
        except NoSuch:
            return None
        about = _object(said)
        return Image(
            str(about.get("Id") or ""),
            tuple(str(digest) for digest in about.get("RepoDigests") or []),
            str(about.get("Os") or ""),
            str(about.get("Architecture") or ""),
            str(about.get("Variant") or ""),
        )

    def pull_directory(self) -> str:
        """Where its program keeps half-read layers and leaves them when it is ended; "" for an engine that tidies up.

        Raises EngineError.
        """
        if not self._podman:
            return ""
        store = _object(self.call("info", "--format", "json")).get("store") or {}
        return str(store.get("imageCopyTmpDir") or self.environment.get("TMPDIR") or "/var/tmp")

    # -- events --------------------------------------------------------------------------------------------------

    def events(self, since: str, label: str) -> list[str]:
        """The command line of the endless stream of events of containers with *label* (`name=value`)."""
        actions = ("create", "start", "died", "remove") if self._podman else ("create", "start", "die", "destroy")
        filters = [part for action in actions for part in ("--filter", f"event={action}")]
        form = "json" if self._podman else "{{json .}}"
        chosen = ["--filter", "type=container", "--filter", f"label={label}", *filters]
        return [self.program, "events", "--since", since, *chosen, "--format", form]

    def event(self, line: bytes) -> Event | None:
        """One line of the stream, None for what is none of the four."""
        try:
            return self._event(_object(line))
        except (EngineError, AttributeError, TypeError):
            return None

    def _event(self, about: Mapping[str, Any]) -> Event | None:
        if self._podman:
            action = {"died": "die", "remove": "destroy"}.get(str(about.get("Status")), str(about.get("Status")))
            name, code = about.get("Name", ""), about.get("ContainerExitCode")
        else:
            about_it = (about.get("Actor") or {}).get("Attributes") or {}
            action, name, code = str(about.get("Action", "")), about_it.get("name", ""), about_it.get("exitCode")
        if action not in ("create", "start", "die", "destroy"):
            return None
        known = action == "die" and str(code).isdecimal()
        return Event(action, str(name), int(str(code)) if known else None)


def _only_gone(errors: bytes) -> bool:
    """Whether every line says that something does not exist: else something was not asked, and nothing is proven."""
    lines = [line for line in errors.decode("utf-8", "replace").splitlines() if line.strip()]
    return all(_GONE.search(line) for line in [line for line in lines if _COMPLAINT.match(line)] or lines)


def answered(said: str) -> bool:
    """Whether an engine that is well has spoken itself."""
    return "Error response from daemon" in said and not re.search(r"containerd\.sock|shutting down", said)


def _container(line: bytes) -> Container:
    about = _object(line)
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


def labelled(labels: Mapping[str, str]) -> Iterator[str]:
    """The arguments that put labels of ours on something new."""
    for name, value in labels.items():
        yield "--label"
        yield f"{LABEL}{name}={value}"


def _object(text: bytes) -> dict[str, Any]:
    try:
        about = json.loads(text)
    except ValueError as error:
        raise EngineError(f"the engine's program printed something unreadable: {text[:80]!r}") from error
    if isinstance(about, list) and len(about) == 1:
        about = about[0]
    if not isinstance(about, dict):
        raise EngineError(f"the engine's program printed something unreadable: {text[:80]!r}")
    return about


def last_words(errors: bytes) -> str:
    """The end of what a program said, on one line, without its hints."""
    lines = [line.strip() for line in errors.decode("utf-8", "replace").splitlines()]
    kept = [line for line in lines if line and not line.startswith(("See 'docker", "Run 'docker"))]
    return " ".join(kept)[-_SAID_BYTES:]


def is_readable(descriptor: int) -> bool:
    """Whether an interrupt has come."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))
