"""The one door to a container engine: its command line, docker's or podman's. What differs between the two is here.

Engines are talked to by their own program, so that its contexts, variables, credential helpers and certificates work.
Everything is said in this file's words: a container, a volume, an event; no caller reads an engine's output itself.
"""

from __future__ import annotations

import logging
import re
import select
from datetime import datetime, timezone
from types import MappingProxyType
from typing import Any, Iterator, Mapping, Sequence

from oz_worker import errand
from oz_worker.engine_words import (
    INSPECTED,
    LABEL,
    LISTED,
    UNCLEAR,
    Container,
    EngineDown,
    EngineError,
    Event,
    Facts,
    Image,
    Interrupted,
    NameTaken,
    NoSuch,
    container_of,
    listed_of,
    object_of,
)
from oz_worker.process import ProgramMissing, SpawnError, TooLong
from oz_worker.timing import format_duration

logger = logging.getLogger(__name__)

FILLER = "oz-fill-"
"""Before the name of a container into which files are copied. Docker lets every question about one wait until the copy
has ended (`container inspect` hung for as long as a `cp` did, `ps` did not), so none of these is ever looked at."""
LOOK_TIMEOUT = 10.0
"""Seconds for a question of which the answer is no more than a look, where others wait for it."""

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
_UNANSWERED_AT_MOST = 3
_ONE_SECONDS = 3.0
_SIGNALLED = 128


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
        directory: str | None = None,
    ) -> bytes:
        """Run the program to its end and return its output.

        *extra* joins its environment, *timeout* replaces the engine's, *directory* is where it runs. *partly*: the
        output is wanted also where some of the things that were named do not exist. Raises EngineDown when nobody
        knows what came of it, Interrupted as one of these, NoSuch, NameTaken, or EngineError for any other refusal.
        """
        return self._call(
            arguments, stdin, extra or {}, timeout or self.timeout, interrupt, limit, partly=partly, directory=directory
        )

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
        directory: str | None = None,
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
                directory=directory,
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
            said = outcome.errors or (b"" if outcome.code > _SIGNALLED else outcome.output)  # half an answer is none
            refusal = self.refusal(arguments[0], outcome.code, said)
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
            about = object_of(self.call("info", "--format", "json"))
            host = about.get("host", {})
            version = about.get("version", {}).get("Version", "")
            return Facts(host.get("os", ""), host.get("arch", ""), version, host.get("logDriver", ""), self.clock())
        about = object_of(self.call("info", "--format", "{{json .}}"))
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

    def clock(self) -> str:
        """Now, on the engine's clock. Raises EngineError."""
        if self._podman:  # it has no daemon: its clock is ours, and `podman info` takes half a second
            return datetime.now(timezone.utc).isoformat()
        return self.facts().clock

    def containers(self, *filters: str) -> list[Container]:
        """All containers, in any state, that every one of *filters* (`label=a=b`, `volume=x`) fits; no fillers."""
        return self.inspect(*(one.id for one in self._listed(filters) if not one.name.startswith(FILLER)))

    def fillers(self, *filters: str) -> list[str]:
        """The names of the fillers that every one of *filters* fits."""
        return [one.name for one in self._listed(filters) if one.name.startswith(FILLER)]

    def overview(self, *filters: str) -> list[Container]:
        """Like `containers`, without volumes, and never held up by a single one: what `ps` says of those that live.

        How the others ended is asked of each by itself where asking for all together gets no answer; it is UNCLEAR
        where that gets none either. Raises EngineError.
        """
        listed = [one for one in self._listed(filters) if not one.name.startswith(FILLER)]
        over = [one for one in listed if not (one.lives or one.fresh)]
        ends = {one.id: one for one in self._ends(over)}
        return [ends.get(one.id, one) for one in listed if one.id in ends or one not in over]

    def _ends(self, over: Sequence[Container]) -> list[Container]:
        """These containers, without what is gone meanwhile."""
        try:
            return self.inspect(*(one.id for one in over), timeout=LOOK_TIMEOUT)
        except EngineDown as error:
            logger.info("asking for each container by itself: %s", error)
        found: list[Container] = []
        unanswered = 0
        for one in over:
            try:
                if unanswered < _UNANSWERED_AT_MOST:
                    found += self.inspect(one.id, timeout=_ONE_SECONDS)
                    continue
            except EngineDown:
                unanswered += 1
            found.append(one._replace(status=UNCLEAR))
        return found

    def _listed(self, filters: Sequence[str]) -> list[Container]:
        chosen = [part for one in filters for part in ("--filter", one)]
        said = self.call("ps", "--all", "--no-trunc", "--format", LISTED[self.kind], *chosen, limit=64 << 20)
        return [listed_of(line) for line in said.splitlines() if line.strip()]

    def inspect(self, *names: str, timeout: float = 0) -> list[Container]:
        """These containers, without those that do not exist. *timeout* as in `call`."""
        found: list[Container] = []
        for start in range(0, len(names), 100):
            some = names[start : start + 100]
            said = self._call(("container", "inspect", "--format", INSPECTED, *some), timeout=timeout, partly=True)
            found += [container_of(line) for line in said.splitlines() if line.startswith(b"{")]
        return found

    def environment_of(self, name: str) -> tuple[dict[str, str], list[str]]:
        """The environment and the arguments a container was given, for the redactor alone: without its image's own."""
        form = '{"environment":{{json .Config.Env}},"arguments":{{json .Config.Cmd}},"image":{{json .Image}}}'
        about = object_of(self.call("container", "inspect", "--format", form, name, limit=16 << 20))
        form = '{"environment":{{json .Config.Env}}}'
        said = self._call(("image", "inspect", "--format", form, str(about.get("image"))), partly=True)
        known = set((object_of(said).get("environment") or []) if said.strip() else [])
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
        about = object_of(said)
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
        store = object_of(self.call("info", "--format", "json")).get("store") or {}
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
            return self._event(object_of(line))
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


def labelled(labels: Mapping[str, str]) -> Iterator[str]:
    """The arguments that put labels of ours on something new."""
    for name, value in labels.items():
        yield "--label"
        yield f"{LABEL}{name}={value}"


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
