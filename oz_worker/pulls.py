"""Pulling an image with an engine's own program, and what its many ways of failing mean."""

from __future__ import annotations

import contextlib
import enum
import re
import tempfile
from typing import Callable, Iterator, Mapping, NamedTuple

from oz_worker import progress
from oz_worker.containers import BROKEN_OFF, NO_ANSWER, Engine, answered, last_words
from oz_worker.engine_words import EngineDown, EngineError, Interrupted
from oz_worker.process import SpawnError
from oz_worker.redact import without_credentials
from oz_worker.timing import format_duration

_QUIET_CLI = {"DOCKER_CLI_HINTS": "false"}


class Why(enum.Enum):
    """Why an image was not pulled."""

    FULL = "the engine's disk is full"
    PLATFORM = "the registry has it for no platform that is wanted here"
    NAME = "that is no name of an image"
    LIMITED = "the registry's rate limit is reached"
    CERTIFICATE = "the registry's certificate is not trusted by the engine"
    PLAIN = "the registry speaks plain HTTP, which the engine does not accept from it"
    HELPER = "the credential helper failed"
    DENIED = "the registry denied access, or has no such image"
    UNAUTHORIZED = "the registry refused the user name and password, or wants some"
    MISSING = "the registry has no such image or tag"
    UNREACHABLE = "the registry cannot be reached"
    BROKEN_OFF = "the transfer broke off"
    STALLED = "the transfer stalled"
    LATE = "the pull took too long"
    OTHER = "the pull failed"


AWAY = frozenset((Why.LIMITED, Why.UNREACHABLE, Why.BROKEN_OFF, Why.STALLED, Why.LATE))
"""The registry is out of reach for the moment: a copy that is here may serve."""

_CURES = {
    Why.FULL: "free space where the engine keeps its images, for instance with `{cli} image prune`",
    Why.PLATFORM: "use an image built for {platform}, or set backend.docker.platform to one that it has",
    Why.NAME: "write it like registry.example.com/team/image:tag",
    Why.LIMITED: "log in with `{cli} login{registry}` for a higher limit, wait, or use a mirror",
    Why.CERTIFICATE: "give the engine the registry's authority, in {certificates}",
    Why.PLAIN: "give the registry TLS, or list it as insecure in {configuration}",
    Why.HELPER: "correct the credential helper in the CLI's configuration, for the user who runs the worker",
    Why.DENIED: "check the name, and log in with `{cli} login{registry}` as the user who runs the worker, or point "
    "{credentials} at the credentials",
    Why.UNAUTHORIZED: "log in again with `{cli} login{registry}` as the user who runs the worker, or point "
    "{credentials} at the right credentials",
    Why.MISSING: "check its name and tag",
    Why.UNREACHABLE: "check the engine's network, DNS and proxy, and whether the registry is up",
    Why.BROKEN_OFF: "check the network between the engine and the registry",
    Why.STALLED: "check the network between the engine and the registry, or raise backend.docker.pull_progress_timeout",
    Why.LATE: "use a smaller image or a nearer registry, or raise backend.docker.pull_timeout",
    Why.OTHER: "see what `{cli} pull` says as the user who runs the worker",
}

_WORDS: tuple[tuple[Why, str], ...] = (
    (Why.FULL, r"no space left on device|disk quota exceeded"),
    (
        Why.PLATFORM,
        r"no matching manifest for|no match for (current )?platform|does not match the specified platform"
        r"|no image found in (manifest list|image index) for|image operating system .* cannot be used",
    ),
    (
        Why.NAME,
        r"invalid reference format|invalid repository name|repository name must|short-name .* did not resolve"
        r"|invalid image reference|parsing image reference|invalid tag format",
    ),
    (Why.LIMITED, r"toomanyrequests|too many requests|rate limit"),
    (
        Why.CERTIFICATE,
        r"x509:|certificate (is not trusted|has expired|signed by)|tls: (failed to verify|bad certificate)",
    ),
    (Why.PLAIN, r"server gave HTTP response to HTTPS client"),
    (Why.HELPER, r"error getting credentials|docker-credential-|credential helper"),
    (
        Why.DENIED,
        r"access denied|access (to the resource )?is denied|access to the requested resource is not|no basic auth cred"
        r"|insufficient_scope|(?<!permission )\bdenied\b|\bforbidden\b",
    ),
    (Why.UNAUTHORIZED, r"unauthorized|authentication required|incorrect username|invalid username"),
    (Why.MISSING, r"manifest unknown|name unknown|unknown blob|not found|unknown to registry"),
    (
        Why.UNREACHABLE,
        r"no such host|connection refused|time ?out|deadline exceeded|network is unreachable|no route to host"
        r"|connection reset|\bEOF\b|broken pipe|server misbehaving|temporary failure in name|proxyconnect"
        r"|request canceled|short read|service unavailable|bad gateway|internal server error"
        r"|status(:| code( from registry)?) 5\d\d",
    ),
)
_PATTERNS = tuple((why, re.compile(f"(?i){words}")) for why, words in _WORDS)
_ADDRESS = re.compile(r"\w+://[^\s\"]+")
"""Names of people's choice stand there, which mean nothing."""
_REFERENCE = re.compile(
    r"((?:(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(?::[0-9]+)?/)?"
    r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*)*)"
    r"(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(?:@[A-Za-z0-9+._-]+:[0-9a-fA-F]{32,})?"
)
_LONGEST_NAME = 255
_CANCELLED = re.compile(r"(?i)context canceled")


class PullFailed(EngineError):
    """An image was not pulled; one sentence with the cure, in which no URL holds a password."""

    def __init__(self, why: Why, sentence: str, said: str) -> None:
        super().__init__(sentence, said)
        self.why = why


class Pull(NamedTuple):
    """One pull. `platform` "" leaves the choice to the engine, which runs on `engine_platform`; limits in seconds."""

    reference: str
    platform: str
    engine_platform: str
    timeout: float
    quiet: float


def pull(engine: Engine, wanted: Pull, interrupt: int, moved: Callable[[str], None] = lambda last: None) -> None:
    """Pull one image, for as long as *interrupt* is not readable. *moved* hears how far it is, and must not block.

    Blocks the calling thread only; the engine ends the transfer when its program is gone. Raises PullFailed, EngineDown
    (also Interrupted), or EngineError when the program cannot be started.
    """
    chosen = ["--platform", wanted.platform] if wanted.platform else []
    try:
        with room(engine) as place:
            ending = progress.watch(
                [engine.program, "pull", *chosen, "--", wanted.reference],
                environment={**engine.environment, **_QUIET_CLI, **place},
                instance=engine.instance,
                timeout=wanted.timeout,
                quiet=wanted.quiet,
                shows_on="stderr" if engine.kind == "podman" else "stdout",
                interrupt=interrupt,
                moved=lambda last: moved(_brief(last)),
            )
    except SpawnError as error:
        raise EngineError(str(error)) from error
    if ending.interrupted:
        raise Interrupted(f"{engine.kind} pull was interrupted")
    if ending.stalled:
        at = f" for {format_duration(wanted.quiet)} (last: {_brief(ending.last) or 'nothing'})"
        raise failure(engine, wanted, Why.STALLED, f"no progress{at}")
    if ending.code is None:
        raise failure(engine, wanted, Why.LATE, f"longer than {format_duration(wanted.timeout)}")
    if ending.code:
        said = _final_words(ending.words)
        raise failure(engine, wanted, why(engine, said), said or f"exit code {ending.code}")


def why(engine: Engine, said: str) -> Why:
    """What an engine's last words mean. Raises EngineDown when they are the CLI's, about an engine out of reach."""
    daemon = engine.kind != "podman"
    if daemon and NO_ANSWER.search(said) and not answered(said):
        raise EngineDown(f"{engine.kind} pull: {without_credentials(said)}", said)
    # What ends a stream of progress is the engine's word about the registry, or the CLI's about the engine.
    if not answered(said) and (_CANCELLED.search(said) or BROKEN_OFF.search(said)):
        return Why.BROKEN_OFF
    plain = _ADDRESS.sub(" ", said)
    return next((reason for reason, pattern in _PATTERNS if pattern.search(plain)), Why.OTHER)


def failure(engine: Engine, wanted: Pull, reason: Why, said: str) -> PullFailed:
    """The error for people: what, why, the cure, and the engine's own words."""
    podman = engine.kind == "podman"
    cure = _CURES[reason].format(
        cli=engine.kind,
        platform=wanted.platform or wanted.engine_platform,
        registry=_registry(wanted.reference),
        certificates="/etc/containers/certs.d" if podman else "/etc/docker/certs.d",
        configuration="registries.conf" if podman else "daemon.json",
        credentials="REGISTRY_AUTH_FILE" if podman else "DOCKER_CONFIG",
    )
    words = _brief(said.replace("Error response from daemon: ", "").removeprefix("Error: "))
    return PullFailed(reason, f"image {shown(wanted.reference)}: {reason.value}; {cure} ({words})", said)


def is_name(reference: str) -> bool:
    """Whether an engine would take it for an image's name. Asked before the engine is: what it says of others depends
    on its version and on what it is asked, down to `page not found` for a name of two lines."""
    found = _REFERENCE.fullmatch(reference)
    return found is not None and len(found[1]) <= _LONGEST_NAME


def shown(reference: str) -> str:
    """A reference fit for logs and reports, whatever somebody wrote there."""
    safe = without_credentials(reference)[:300]
    return safe if safe.isprintable() and safe.strip() else repr(safe)


def _brief(text: str) -> str:
    return re.sub(r"\[[=> .-]*\]\s*", "", without_credentials(text))[:500]


def _final_words(words: bytes) -> str:
    """The last sentence of an engine, without the warnings and the progress before it."""
    lines = words.decode("utf-8", "replace").splitlines()
    errors = [number for number, line in enumerate(lines) if line.startswith("Error")]
    chosen = lines[errors[-1] :] if errors else [line for line in lines if not line.startswith("WARNING")]
    return last_words("\n".join(chosen).encode())


def _registry(reference: str) -> str:
    """` HOST` of a reference that names its registry, else "" for the CLI's default."""
    host, slash, _ = without_credentials(reference).partition("://")[2 if "://" in reference else 0].partition("/")
    host = host.rpartition("@")[2]
    return f" {host}" if slash and re.fullmatch(r"[\w.:\[\]-]+", host) and re.search(r"[.:]|^localhost$", host) else ""


@contextlib.contextmanager
def room(engine: Engine) -> Iterator[Mapping[str, str]]:
    """The variables that give podman a temporary place, gone afterwards with what it leaves there."""
    above = engine.pull_directory()
    if not above:
        yield {}
        return
    try:
        place = tempfile.TemporaryDirectory(prefix="oz-podman-", dir=above, ignore_cleanup_errors=True)
    except OSError:  # podman will say what is wrong with it
        yield {}
        return
    with place as path:
        yield {"TMPDIR": path}
