"""One watch: from a version on, everything that happens to the objects that match, as a stream of lines."""

from __future__ import annotations

import json
import threading
import time
from typing import Callable, Iterator, NamedTuple

from tests.cluster.refusals import Json, Refused
from tests.cluster.resources import JOBS, Resource
from tests.cluster.selectors import Matches
from tests.cluster.store import Change, Store

_LOOK = 1.0
"""Seconds after which a watch with nothing to say looks whether the other side is still there."""
_LAST_BOOKMARK = 2.0


class Asked(NamedTuple):
    """What a watch was asked for."""

    resource: Resource
    namespace: str
    matches: Matches
    version: int | None
    bookmarks: bool
    seconds: float


class Broken(Exception):
    """The stream must end with a reset, not cleanly."""


class Watch:
    """A stream that runs. Orders come from another thread; the stream's thread obeys between two lines."""

    def __init__(self, asked: Asked, agent: str) -> None:
        self.asked = asked
        self.agent = agent
        self._orders: list[str] = []
        self._lock = threading.Lock()  # guards _orders
        self.silent_until = 0.0
        self.dropped: Callable[[Json], bool] = lambda obj: False
        """Events of objects for which it holds are lost."""

    def order(self, word: str) -> None:
        """`end`, `reset`, `gone`, `garbage` or `error`: what the stream does next."""
        with self._lock:
            self._orders.append(word)

    def next_order(self) -> str:
        with self._lock:
            return self._orders.pop(0) if self._orders else ""

    @property
    def has_orders(self) -> bool:
        with self._lock:
            return bool(self._orders)


def _line(kind: str, obj: Json) -> bytes:
    return json.dumps({"type": kind, "object": obj}, separators=(",", ":")).encode() + b"\n"


def _bookmark(resource: Resource, version: int) -> Json:
    meta = {"resourceVersion": str(version), "creationTimestamp": None}
    empty: Json = {"kind": resource.kind, "apiVersion": resource.api_version, "metadata": meta}
    if resource == JOBS:
        template = {"metadata": {"creationTimestamp": None}, "spec": {"containers": None}}
        return {**empty, "spec": {"template": template}, "status": {}}
    return {**empty, "spec": {"containers": None}, "status": {}} if resource.kind == "Pod" else empty


def _told(change: Change, asked: Asked) -> tuple[str, Json] | None:
    """What this watch says about a change: an object that begins or ceases to match is added or deleted for it."""
    if change.resource.qualified != asked.resource.qualified:
        return None
    if asked.namespace and change.object["metadata"].get("namespace") != asked.namespace:
        return None
    before = change.before is not None and asked.matches(change.before)
    after = change.type != "DELETED" and asked.matches(change.object)
    if not before and not after:
        return None
    if before and after:
        return "MODIFIED", change.object
    if after:
        return "ADDED", change.object
    if change.type == "DELETED":
        return "DELETED", change.object
    assert change.before is not None
    meta = {**change.before["metadata"], "resourceVersion": str(change.version)}
    return "DELETED", {**change.before, "metadata": meta}


def lines(store: Store, watch: Watch, bookmark_every: float, alive: Callable[[], bool]) -> Iterator[bytes]:
    """The lines of the stream, b"" from time to time in between; it ends when the time is over. May raise Broken."""
    asked = watch.asked
    version = asked.version
    if version is None:
        found, version = store.objects(asked.resource, asked.namespace)
        yield from (_line("ADDED", obj) for obj in found if asked.matches(obj))
    end = time.monotonic() + asked.seconds
    bookmark = time.monotonic() + bookmark_every
    if asked.seconds > _LAST_BOOKMARK:
        bookmark = min(bookmark, end - _LAST_BOOKMARK)
    while not store.closed and alive():
        if order := watch.next_order():
            yield from _obey(order, version)
            return
        silent = time.monotonic() < watch.silent_until
        left = _LOOK if silent else min(end, bookmark, time.monotonic() + _LOOK) - time.monotonic()
        try:
            changes = store.since(version, max(left, 0), lambda: watch.has_orders)
        except Refused as refused:
            yield _line("ERROR", refused.status)
            return
        if time.monotonic() < watch.silent_until:
            version = changes[-1].version if changes else version
            continue  # what happens meanwhile is never told
        for change in changes:
            version = change.version
            told = _told(change, asked)
            if told is not None and not watch.dropped(told[1]):
                yield _line(*told)
        if time.monotonic() >= end:
            return
        if time.monotonic() >= bookmark:
            bookmark = time.monotonic() + bookmark_every
            if asked.bookmarks:
                yield _line("BOOKMARK", _bookmark(asked.resource, version))
        yield b""


def _obey(order: str, version: int) -> Iterator[bytes]:
    if order == "gone":
        text = f"too old resource version: {version} ({version + 1000})"
        yield _line("ERROR", Refused(410, "Expired", text).status)
    elif order == "error":
        text = "unable to decode an event from the watch stream"
        yield _line("ERROR", Refused(500, "InternalError", text).status)
    elif order == "garbage":
        yield b'{"type":"MODIFIED","object":{"kind":\n\x00\xff not json\n'
    elif order == "reset":
        raise Broken
