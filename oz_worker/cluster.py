"""The one door to a Kubernetes cluster: `kubectl`, its words and what they mean.

A cluster is talked to by its own program, so that kubeconfig, contexts, credential plugins, certificates and the
account of a pod work. Nearly everything goes by `--raw`: one request for one call, the same with every version of
the program, no discovery, and the server's own strict validation.
"""

from __future__ import annotations

import json
import re
from types import MappingProxyType
from typing import Any, Callable, Mapping, NamedTuple, Sequence
from urllib.parse import quote, urlencode

from oz_worker import errand
from oz_worker.containers import is_readable
from oz_worker.errors import OzWorkerError, Unanswered
from oz_worker.process import ProgramMissing, SpawnError, TooLong
from oz_worker.timing import format_duration

Object = Mapping[str, Any]
"""A thing in the cluster, as its API writes it in JSON."""

GROUPS: Mapping[str, str] = MappingProxyType(
    {"jobs": "/apis/batch/v1", "pods": "/api/v1", "events": "/api/v1", "secrets": "/api/v1"}
)
"""Where each kind of thing is that we touch."""

PAGE = 500
WATCH_SECONDS = 290
"""How long the server is asked to hold a watch; it ends one itself after 5 to 10 minutes otherwise."""

_SERVER = re.compile(r"Error from server(?: \((?P<reason>\w+)\))?: (?P<said>.*)", re.DOTALL)
_INVALID = re.compile(r"The \S+(?: \"[^\"]*\")? is invalid: (?P<said>.*)", re.DOTALL)
_UNAUTHORIZED = re.compile(r"You must be logged in to the server|the server has asked for the client to provide cred")
_PASSING = re.compile(
    r"(?i)etcdserver|rpc error|time(d )?out|deadline exceeded|has prevented the request from succeeding|unavailable"
    r"|too many requests|bad gateway|connection (refused|reset)|EOF|overloaded|leader"
)
"""Words of a server's error without a known reason that say: ask again."""
_TOO_LARGE = re.compile(r"request is too large|larger than max")
"""What no second try makes smaller, though it is the database of the cluster that says it."""
_NO_SUCH_PATH = "the server could not find the requested resource"
"""All that is known of a 404 that comes from no API server, but from something in front of it."""
_OTHER_UID = "Precondition failed"
_NOISE = re.compile(r"^([IWE]\d{4} |Unhandled Error|Warning: )")
_SAID_BYTES = 1500
_SIGNALLED = 128
_MOST_BYTES = 256 << 20


class ClusterError(OzWorkerError):
    """The cluster refused; `said` are the server's own words, without what the program puts around them."""

    def __init__(self, sentence: str, said: str = "") -> None:
        super().__init__(sentence)
        self.said = said or sentence


class ClusterDown(ClusterError, Unanswered):
    """Nothing is known of what was asked: no answer, or one that only says to ask again (429, 5xx, a broken line)."""


class Unauthorized(ClusterDown):
    """The server does not know who we are; a token that is renewed, or a plugin that recovers, mends that."""


class Interrupted(ClusterDown):
    """The caller's `interrupt` came first; nothing is known of what was asked."""


class NotFound(ClusterError):
    """What was named does not exist."""


class AlreadyExists(ClusterError):
    """Something of this name exists."""


class Conflict(ClusterError):
    """Our precondition does not hold: what bears the name is another one."""


class Forbidden(ClusterError):
    """Not allowed: by RBAC, a quota or an admission plugin. The words name the verb and the resource."""


class Invalid(ClusterError):
    """The object is not one that the server takes."""


class Expired(ClusterError):
    """The version to go on from is too old (410): list again."""


_REASONS: Mapping[str, type[ClusterError]] = {
    "NotFound": NotFound,
    "AlreadyExists": AlreadyExists,
    "Conflict": Conflict,
    "Forbidden": Forbidden,
    "Invalid": Invalid,
    "BadRequest": Invalid,
    "Expired": Expired,
    "Gone": Expired,
    "Unauthorized": Unauthorized,
    "InternalError": ClusterDown,
    "ServerTimeout": ClusterDown,
    "ServiceUnavailable": ClusterDown,
    "Timeout": ClusterDown,
    "TooManyRequests": ClusterDown,
    "StorageReadError": ClusterDown,
}


class Listing(NamedTuple):
    """A collection at one moment; a watch goes on from `version` and misses nothing."""

    items: list[dict[str, Any]]
    version: str


class Event(NamedTuple):
    """A line of a watch: `change` is ADDED, MODIFIED, DELETED or BOOKMARK, `version` how far the watch has come."""

    change: str
    thing: dict[str, Any]
    version: str


class Cluster:
    """One namespace of one cluster. Holds no state of it; safe from any thread.

    Every call blocks in the program, at most *timeout* seconds, and raises ClusterError: of these, ClusterDown when
    nobody knows what came of it.
    """

    def __init__(
        self,
        program: str,
        *,
        namespace: str,
        flags: Sequence[str],
        environment: Mapping[str, str],
        instance: str,
        timeout: float,
    ) -> None:
        self.program = program
        self.namespace = namespace
        self.flags = tuple(flags)  # which cluster: kubeconfig, context; and where to keep a cache
        self.environment = environment
        self.instance = instance
        self.timeout = timeout

    def call(
        self,
        *arguments: str,
        stdin: bytes = b"",
        timeout: float = 0,
        interrupt: int = -1,
        limit: int = _MOST_BYTES,
        into: int = -1,
    ) -> bytes:
        """Run the program to its end and return its output, or write it into the descriptor *into*.

        *timeout* replaces the cluster's; *interrupt*, when it becomes readable, ends the program at once.
        """
        what = f"kubectl {arguments[0]}"
        outcome = self._run(arguments, stdin, timeout or self.timeout, interrupt, limit, into)
        if outcome.code:
            raise refusal(what, outcome.code, outcome.errors or outcome.output)
        if outcome.truncated and into < 0:
            raise ClusterError(f"{what}: the answer is longer than {limit >> 20} MiB; what is in this namespace?")
        return outcome.output

    def _run(
        self,
        arguments: Sequence[str],
        stdin: bytes = b"",
        timeout: float = 0,
        interrupt: int = -1,
        limit: int = _MOST_BYTES,
        into: int = -1,
    ) -> errand.Outcome:
        what, timeout = f"kubectl {arguments[0]}", timeout or self.timeout
        try:
            outcome = errand.run(
                [self.program, *self.flags, *arguments],
                environment=self.environment,
                instance=self.instance,
                timeout=timeout,
                stdin=stdin,
                interrupt=interrupt,
                limit=limit,
                into=into,
            )
        except (ProgramMissing, TooLong) as error:
            raise ClusterError(str(error)) from error
        except SpawnError as error:
            raise ClusterDown(str(error)) from error  # no process, no memory: that passes
        if outcome.late:
            if interrupt >= 0 and is_readable(interrupt):
                raise Interrupted(f"{what} was interrupted")
            raise ClusterDown(f"{what} did not answer within {format_duration(timeout)}; is the API server well?")
        return outcome

    # -- looking -------------------------------------------------------------------------------------------------

    def version(self) -> str:
        """The server's version."""
        return str(_object(self.call("get", "--raw", "/version")).get("gitVersion", "?"))

    def find(
        self,
        kind: str,
        selector: str = "",
        fields: str = "",
        *,
        pages: int = 0,
        interrupt: int = -1,
        timeout: float = 0,
        keep: Callable[[dict[str, Any]], dict[str, Any]] = lambda thing: thing,
    ) -> Listing:
        """All things of a kind that fit, by pages of 500; *pages*: no more of them than that. The rest as in `call`.

        *keep* makes less of each as its page comes in: the whole of a thousand Jobs is some 50 MB.
        """
        items: list[dict[str, Any]] = []
        more = {"continue": ""}
        number = 0
        while True:
            asked = {"labelSelector": selector, "fieldSelector": fields, "limit": str(PAGE), **more}
            path = self.path(kind, query=asked)
            found, metadata = _list(self.call("get", "--raw", path, interrupt=interrupt, timeout=timeout))
            items += [keep(_thing(item)) for item in found]
            more = {"continue": str(metadata.get("continue") or "")}
            number += 1
            if not more["continue"] or number == pages:
                return Listing(items, str(metadata.get("resourceVersion") or ""))

    def get(self, kind: str, name: str, *, timeout: float = 0) -> dict[str, Any] | None:
        """The thing of that name, None when there is none."""
        try:
            return _thing(_object(self.call("get", "--raw", self.path(kind, name), timeout=timeout)))
        except NotFound:
            return None

    def watch(self, kind: str, selector: str, version: str) -> list[str]:
        """The command line of a watch that goes on from *version* (rule 24)."""
        asked = {"watch": "1", "allowWatchBookmarks": "true", "resourceVersion": version, "labelSelector": selector}
        path = self.path(kind, query={**asked, "timeoutSeconds": str(WATCH_SECONDS)})
        return [self.program, *self.flags, "get", "--raw", path]

    def logs(self, pod: str, container: str, *, lines: int, limit: int, into: int = -1, timeout: float = 0) -> bytes:
        """The last *lines* of what a container printed, or the file *into*.

        The server counts *limit* from the first of these lines on, so it cuts off the end: ask for fewer lines then.
        """
        asked = {"container": container, "tailLines": str(lines), "limitBytes": str(limit)}
        path = self.path("pods", f"{pod}/log", query=asked)
        return self.call("get", "--raw", path, timeout=timeout, limit=limit + 1024, into=into)

    def may(self, verb: str, resource: str, subresource: str = "") -> bool:
        """Whether we may do that in our namespace, as `kubectl auth can-i` has it."""
        more = [f"--subresource={subresource}"] if subresource else []
        outcome = self._run(["auth", "can-i", verb, resource, *more, f"--namespace={self.namespace}"])
        answer = outcome.output.split()[:1]  # its exit code is 1 for "no" and for every error
        if answer not in ([b"yes"], [b"no"]):
            raise refusal("kubectl auth can-i", outcome.code or 0, outcome.errors or outcome.output)
        return answer == [b"yes"]

    # -- changing ------------------------------------------------------------------------------------------------

    def create(self, kind: str, thing: Object, *, interrupt: int = -1) -> dict[str, Any]:
        """Create it, strictly: a field that the server does not know is refused. What the server made of it."""
        path = self.path(kind, query={"fieldValidation": "Strict", "fieldManager": "oz-worker"})
        text = json.dumps(thing).encode()
        return _thing(_object(self.call("create", "--raw", path, "-f", "-", stdin=text, interrupt=interrupt)))

    def delete(self, kind: str, name: str, uid: str, *, timeout: float = 0) -> None:
        """Order the end of exactly this one and all that belongs to it: it is gone when that is (rule 25).

        Raises NotFound, or Conflict when another one bears the name.
        """
        options = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "preconditions": {"uid": uid},
            "propagationPolicy": "Foreground",
        }
        self.call(
            "delete", "--raw", self.path(kind, name), "-f", "-", stdin=json.dumps(options).encode(), timeout=timeout
        )

    def patch(self, kind: str, name: str, change: Object, *, timeout: float = 0) -> None:
        """Merge *change* into it. The only call that needs discovery, and a cache for that."""
        words = ["patch", kind, name, f"--namespace={self.namespace}", "--type=merge", "--patch", json.dumps(change)]
        self.call(*words, "--output=name", timeout=timeout)

    # -- small things --------------------------------------------------------------------------------------------

    def path(self, kind: str, name: str = "", query: Mapping[str, str] = MappingProxyType({})) -> str:
        """The path of a kind, or of one thing of it, in our namespace."""
        asked = urlencode({key: value for key, value in query.items() if value}, quote_via=quote)
        place = f"{GROUPS[kind]}/namespaces/{self.namespace}/{kind}{f'/{name}' if name else ''}"
        return f"{place}?{asked}" if asked else place

    def named(self, name: str) -> Object:
        """A thing of which nothing but its name is known."""
        return {"metadata": {"name": name, "namespace": self.namespace}}

    def command(self, *words: str) -> str:
        """What to type at a shell to do the same, for people."""
        which = [flag for flag in self.flags if not flag.startswith("--cache-dir")]
        return " ".join(["kubectl", *which, f"--namespace={self.namespace}", *words])


def refusal(what: str, code: int, errors: bytes) -> ClusterError:
    """The error that an exit code and the words on stderr stand for."""
    text = _without_noise(errors)
    if code > _SIGNALLED and not text:
        return ClusterDown(f"{what} was killed by signal {code - _SIGNALLED}; is there enough memory?")
    server, invalid = _SERVER.search(text), _INVALID.search(text)
    said = (server["said"] if server else invalid["said"] if invalid else text[-_SAID_BYTES:])[:_SAID_BYTES]
    sentence = f"{what}: {said or f'exit code {code}'}"
    if server:
        return _kind_of(server["reason"] or "", said)(sentence, said)
    if invalid:
        return Invalid(sentence, said)
    if _UNAUTHORIZED.search(text):
        return Unauthorized(f"{what}: the server does not accept these credentials ({said}); renew the token", said)
    # What the program says itself: it did not reach the server, or could not read its configuration just now.
    return ClusterDown(sentence, said)


def _kind_of(reason: str, said: str) -> type[ClusterError]:
    """What a refusal by the server is, from its reason and words."""
    kind = _REASONS.get(reason)
    if "denied the request" in said:  # a webhook may answer by any code
        return Forbidden
    if kind is None:
        return ClusterDown if _PASSING.search(said) and not _TOO_LARGE.search(said) else ClusterError
    if kind is NotFound and said.startswith(_NO_SUCH_PATH):
        return ClusterDown  # no proof that what was named does not exist
    if kind is Conflict and _OTHER_UID not in said:
        return ClusterDown  # two changes of one thing at once, like those of a quota by two Jobs
    return kind


def _without_noise(errors: bytes) -> str:
    """What the program said, on one line, without its own log lines. Its end may matter, or its beginning."""
    lines = [line.strip() for line in errors.decode("utf-8", "replace").splitlines()]
    return " ".join(line for line in lines if line and not _NOISE.match(line)).removeprefix("error: ")


def event_of(line: bytes) -> Event:
    """One line of a watch. Raises Expired for an error of the server, ClusterDown for one that cannot be read."""
    about = _object(line)
    change, thing = about.get("type"), about.get("object")
    if change == "ERROR":
        said = thing if isinstance(thing, dict) else {}
        raise Expired(str(said.get("message") or said.get("reason") or "an error of the server"))
    if change == "BOOKMARK" and isinstance(thing, dict) and isinstance(thing.get("metadata"), dict):
        return Event(change, thing, str(thing["metadata"].get("resourceVersion") or ""))
    if change not in ("ADDED", "MODIFIED", "DELETED"):
        raise ClusterDown(f"a watch printed something unreadable: {line[:80]!r}")
    thing = _thing(thing)
    return Event(change, thing, str(thing["metadata"].get("resourceVersion") or ""))


def _thing(about: Any) -> dict[str, Any]:
    """*about*, which has a name and a uid, on which everything else relies. Raises ClusterDown for another answer."""
    metadata = about.get("metadata") if isinstance(about, dict) else None
    if isinstance(metadata, dict) and all(
        metadata.get(name) and isinstance(metadata[name], str) for name in ("name", "uid")
    ):
        found: dict[str, Any] = about
        return found
    raise ClusterDown(f"kubectl printed something that is no object of a cluster: {str(about)[:80]}")


def _list(text: bytes) -> tuple[list[Any], dict[str, Any]]:
    """Items and metadata of a list. Raises ClusterDown for anything else: an empty list says that nothing exists."""
    about = _object(text)
    items, metadata = about.get("items"), about.get("metadata")
    whole = str(about.get("kind")).endswith("List") and isinstance(metadata, dict)
    if not whole or not (items is None or isinstance(items, list)):
        raise ClusterDown(f"kubectl printed something that is no list: {text[:80]!r}")
    return items or [], metadata or {}


def _object(text: bytes) -> dict[str, Any]:
    try:
        about = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ClusterDown(f"kubectl printed something unreadable: {text[:80]!r}") from error
    if not isinstance(about, dict):
        raise ClusterDown(f"kubectl printed something unreadable: {text[:80]!r}")
    return about
