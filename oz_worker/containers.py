"""The one door to a container engine: its command line, docker's or podman's. What differs between the two is here.

Engines are talked to by their own program, so that its contexts, variables, credential helpers and certificates work.
Everything is said in this file's words: a container, a volume, an event; no caller reads an engine's output itself.
"""

from __future__ import annotations

import json
import os
import re
import select
import shutil
from datetime import datetime, timezone
from types import MappingProxyType
from typing import Any, Iterator, Mapping, NamedTuple, Sequence

from oz_worker import errand
from oz_worker.errors import NotUsable, OzWorkerError
from oz_worker.process import SpawnError
from oz_worker.timing import format_duration

FILLER = "oz-fill-"
"""Before the name of a container into which files are copied. Docker lets every question about one wait until the copy
has ended (`container inspect` hung for as long as a `cp` did, `ps` did not), so none of these is ever looked at."""
LABEL = "oz-worker."
"""Before every label of ours (names.md): instance, worker, task, execution, unit, role, owner."""

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_DOWN = re.compile(
    r"(?i)cannot connect to|error during connect|failed to connect to the docker api|permission denied while trying"
    r"|is the docker daemon running|unexpected eof|connection reset by peer|broken pipe|containerd\.sock"
    r"|daemon is shutting down"
)
_GONE = re.compile(r"(?i)no such (container|object|volume|image)|no container with|not known|no volume with")
_TAKEN = re.compile(r"(?i)is already in use|name .* in use")
_SAID_BYTES = 700
_SIGNALLED = 128
_INSPECTED = (
    '{"id":{{json .ID}},"name":{{json .Name}},"state":{{json .State}},"labels":{{json .Config.Labels}},'
    '"mounts":{{json .Mounts}},"created":{{json .Created}},"image":{{json .Image}}}'
)


class EngineError(OzWorkerError):
    """The engine refused; `said` are its own words, `code` the exit code of its program."""

    def __init__(self, sentence: str, said: str = "", code: int | None = None) -> None:
        super().__init__(sentence)
        self.said = said or sentence
        self.code = code


class EngineDown(EngineError):
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
    created: str
    image: str

    @property
    def lives(self) -> bool:
        """Whether its main process exists."""
        return self.status in ("running", "paused", "restarting", "stopping")

    @property
    def fresh(self) -> bool:
        """Whether it was never started."""
        return self.status in ("created", "configured", "initialized")

    def label(self, name: str) -> str:
        """One of our labels, "" when it is not there."""
        return self.labels.get(LABEL + name, "")


class Event(NamedTuple):
    """Something happened to a container: `action` is create, start, die or destroy."""

    action: str
    id: str
    name: str
    labels: Mapping[str, str]
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
        except SpawnError as error:
            raise EngineError(str(error)) from error
        if outcome.late:
            what = f"{self.kind} {arguments[0]}"
            if interrupt >= 0 and is_readable(interrupt):
                raise Interrupted(f"{what} was interrupted")
            raise EngineDown(f"{what} did not answer within {format_duration(timeout)}; is the engine well?")
        if outcome.code:
            refusal = self.refusal(arguments[0], outcome.code, outcome.errors or outcome.output)
            if not (partly and isinstance(refusal, NoSuch)):
                raise refusal
        return outcome.output

    def refusal(self, what: str, code: int, errors: bytes) -> EngineError:
        """The error that an exit code and the words on stderr stand for."""
        said = _last_words(errors)
        if code > _SIGNALLED and not said:
            return EngineDown(f"{self.kind} {what} was killed by signal {code - _SIGNALLED}; is there enough memory?")
        sentence = f"{self.kind} {what}: {said or f'exit code {code}'}"
        answered = "Error response from daemon" in said and not re.search(r"containerd\.sock|shutting down", said)
        if _DOWN.search(said) and not answered:
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

    def inspect(self, *names: str) -> list[Container]:
        """These containers, without those that do not exist."""
        found: list[Container] = []
        for start in range(0, len(names), 100):
            some = names[start : start + 100]
            said = self._call(("container", "inspect", "--format", _INSPECTED, *some), partly=True)
            found += [_container(_object(line)) for line in said.splitlines() if line.startswith(b"{")]
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

    def logs(self, name: str, *, lines: int, limit: int = 1 << 20, into: int = -1) -> bytes:
        """The last *lines* of what a container printed on both streams: the last *limit* bytes, or the file *into*."""
        outcome = errand.run(
            [self.program, "logs", "--tail", str(lines), name],
            environment=self.environment,
            instance=self.instance,
            timeout=self.timeout,
            limit=limit,
            merged=True,
            into=into,
        )
        if outcome.late:
            raise EngineDown(f"{self.kind} logs did not answer within {format_duration(self.timeout)}")
        if outcome.code:
            raise self.refusal("logs", outcome.code, outcome.output)
        return outcome.output

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
            about = _object(line)
        except EngineError:
            return None
        if self._podman:
            action = {"died": "die", "remove": "destroy"}.get(str(about.get("Status")), str(about.get("Status")))
            name, identity = str(about.get("Name", "")), str(about.get("ID", ""))
            labels, code = about.get("Attributes") or {}, about.get("ContainerExitCode")
        else:
            action, actor = str(about.get("Action", "")), about.get("Actor") or {}
            labels = actor.get("Attributes") or {}
            name, identity, code = str(labels.get("name", "")), str(actor.get("ID", "")), labels.get("exitCode")
        if action not in ("create", "start", "die", "destroy"):
            return None
        known = action == "die" and str(code).isdigit()
        return Event(action, identity, name, labels, int(str(code)) if known else None)


def find_program(kind: str, path: str, environment: Mapping[str, str]) -> str:
    """The engine's program: *path* if given, else *kind* on PATH. Raises NotUsable."""
    if path:
        if not (os.path.isfile(path) and os.access(path, os.X_OK)):
            raise NotUsable(f"backend.docker.engine_path {path} is no program that may be run; correct the path")
        return os.path.abspath(path)
    found = shutil.which(kind, path=environment.get("PATH", os.defpath))
    if not found:
        raise NotUsable(f"no program {kind} on PATH; install it, or set backend.docker.engine_path")
    return found


def endpoint_of(kind: str, environment: Mapping[str, str]) -> str:
    """Which engine the program will talk to, by its own rules: the variable, the context, else the default."""
    host = environment.get("CONTAINER_HOST" if kind == "podman" else "DOCKER_HOST", "")
    if host or kind == "podman":
        return f"{kind} {host or 'of this host'}"
    context = environment.get("DOCKER_CONTEXT", "")
    if not context:
        folder = environment.get("DOCKER_CONFIG") or os.path.join(environment.get("HOME", "/"), ".docker")
        try:
            with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
                context = str(json.load(file).get("currentContext", ""))
        except (OSError, ValueError, AttributeError):
            context = ""
    return f"{kind} context {context}" if context not in ("", "default") else f"{kind} of this host"


def opened(engine: Engine) -> Facts:
    """What the engine says of itself, fit to run Linux agents. Raises NotUsable with the cure."""
    try:
        facts = engine.facts()
    except EngineError as error:
        raise NotUsable(f"the {engine.kind} engine cannot be used: {error}. {_cure(error)}") from error
    if facts.system != "linux" or facts.architecture not in ("amd64", "arm64"):
        is_what = f"{facts.system or 'unknown'}/{facts.architecture or 'unknown'}"
        raise NotUsable(f"the {engine.kind} engine runs {is_what} containers; agents need linux/amd64 or linux/arm64")
    return facts


def _cure(error: EngineError) -> str:
    if "permission denied" in error.said.lower():
        return "Let this user use the engine's socket, for example by its group (docker), and start the worker again"
    host = os.environ.get("DOCKER_HOST", "")
    where = f"DOCKER_HOST is {host}" if host and "@" not in host else "see DOCKER_HOST and `docker context ls`"
    return f"Start the engine, or name the right one: {where}"


def _container(about: Mapping[str, Any]) -> Container:
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
        volumes=tuple(str(mount["Name"]) for mount in mounts if mount.get("Type") == "volume" and mount.get("Name")),
        created=str(about.get("created", "")),
        image=str(about.get("image", "")),
    )


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
    if not isinstance(about, dict):
        raise EngineError(f"the engine's program printed something unreadable: {text[:80]!r}")
    return about


def _last_words(errors: bytes) -> str:
    """The end of what a program said, on one line, without its hints."""
    lines = [line.strip() for line in errors.decode("utf-8", "replace").splitlines()]
    kept = [line for line in lines if line and not line.startswith(("See 'docker", "Run 'docker"))]
    return " ".join(kept)[-_SAID_BYTES:]


def is_readable(descriptor: int) -> bool:
    """Whether an interrupt has come."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))
