"""A request as the API understands it: whose verb on which resource, and what may be asked of the journal of all."""

from __future__ import annotations

import threading
import urllib.parse
from typing import Mapping, NamedTuple

from tests.cluster.resources import Resource, find

_VERBS = {"GET": "get", "HEAD": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}


class Target(NamedTuple):
    """What a path means. `resource` is None for what is no resource, such as discovery."""

    verb: str
    resource: Resource | None = None
    namespace: str = ""
    name: str = ""
    subresource: str = ""


class Request(NamedTuple):
    """One request, its body read."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    target: Target

    @property
    def agent(self) -> str:
        return self.headers.get("user-agent", "")

    @property
    def content_type(self) -> str:
        return self.headers.get("content-type", "application/json").partition(";")[0].strip()

    def flag(self, name: str) -> bool:
        return self.query.get(name, "").lower() in ("1", "t", "true")


def parse(method: str, raw: str) -> tuple[str, dict[str, str], Target]:
    """Path, query and target of a request line."""
    path, _, text = raw.partition("?")
    query = dict(urllib.parse.parse_qsl(text, keep_blank_values=True))
    return path, query, _target(method, path, query)


def _target(method: str, path: str, query: Mapping[str, str]) -> Target:
    verb = _VERBS.get(method, method.lower())
    parts = [urllib.parse.unquote(part) for part in path.strip("/").split("/")]
    if parts[0] == "api":
        group, rest = "", parts[1:]
    elif parts[0] == "apis" and len(parts) > 1:
        group, rest = parts[1], parts[2:]
    else:
        return Target(verb)
    if len(rest) < 2:
        return Target(verb)
    version, rest = rest[0], rest[1:]
    namespace = ""
    if rest[0] == "namespaces" and len(rest) > 2 and (len(rest) > 3 or rest[2] != "status"):
        namespace, rest = rest[1], rest[2:]
    resource = find(group, version, rest[0])
    name = rest[1] if len(rest) > 1 else ""
    if not name:
        collection = {"get": "list", "delete": "deletecollection"}
        verb = (
            "watch"
            if verb == "get" and query.get("watch", "").lower() in ("1", "t", "true")
            else collection.get(verb, verb)
        )
    return Target(verb, resource, namespace, name, "/".join(rest[2:]))


class Seen(NamedTuple):
    """A request that came, and how it was answered: 0 while it has no answer."""

    verb: str
    resource: str
    """Plural, with the subresource: `pods/log`; the path for what is no resource."""
    path: str
    agent: str
    code: int


class Journal:
    """All requests since the start. Any thread may ask and write."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _rows
        self._rows: list[Seen] = []

    def enter(self, request: Request) -> int:
        target = request.target
        resource = request.path
        if target.resource is not None:
            resource = target.resource.plural + (f"/{target.subresource}" if target.subresource else "")
        with self._lock:
            self._rows.append(Seen(target.verb, resource, request.path, request.agent, 0))
            return len(self._rows) - 1

    def answered(self, number: int, code: int) -> None:
        with self._lock:
            if number < len(self._rows):  # not forgotten meanwhile
                self._rows[number] = self._rows[number]._replace(code=code)

    def seen(self, verb: str = "", resource: str = "", *, path: str = "", agent: str = "") -> list[Seen]:
        """The requests with this verb and resource, whose path and user agent contain these texts."""
        with self._lock:
            rows = list(self._rows)
        return [
            row
            for row in rows
            if verb in ("", row.verb) and resource in ("", row.resource) and path in row.path and agent in row.agent
        ]

    def count(self, verb: str = "", resource: str = "", *, path: str = "", agent: str = "") -> int:
        return len(self.seen(verb, resource, path=path, agent=agent))
