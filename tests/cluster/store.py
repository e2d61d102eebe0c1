"""The objects of the cluster and their history: one counter of versions, copies in and out, a bounded past."""

from __future__ import annotations

import collections
import json
import threading
import time
from typing import Any, Callable, NamedTuple

from tests.cluster.refusals import Json, expired, too_large_version, too_old
from tests.cluster.resources import Resource

Place = tuple[str, str]
"""Namespace ("" for none) and name."""

_TOO_OLD = (
    "The provided continue parameter is too old to display a consistent list result. You can start a new list without "
    "the continue parameter."
)


class Taken(Exception):
    """There is an object with this name."""


class Change(NamedTuple):
    """One entry of the history. Its objects belong to the store and are never written to."""

    version: int
    type: str
    """ADDED, MODIFIED or DELETED."""
    resource: Resource
    object: Json
    before: Json | None


def copied(value: Any) -> Any:
    """A copy of a JSON value that shares nothing with it."""
    return json.loads(json.dumps(value))


def place_of(obj: Json) -> Place:
    return obj["metadata"].get("namespace", ""), obj["metadata"]["name"]


class Store:
    """All objects. Every method may be called from any thread; `listeners` are called under the lock, in order.

    An object that stands in the store is never changed: a change puts a new one in its place. What goes out is either
    such an object, which the caller must not write to, or a copy where it says so.
    """

    def __init__(self, history: int = 50_000) -> None:
        self._changed = threading.Condition(threading.RLock())  # guards everything below
        self._version = 1000
        self._objects: dict[str, dict[Place, Json]] = collections.defaultdict(dict)
        self._history: collections.deque[Change] = collections.deque(maxlen=history)
        self._forgotten = self._version
        self._closed = False
        self.listeners: list[Callable[[Change], None]] = []

    @property
    def lock(self) -> threading.Condition:
        """Held by who needs several steps to be one."""
        return self._changed

    @property
    def version(self) -> int:
        with self._changed:
            return self._version

    @property
    def closed(self) -> bool:
        return self._closed

    def get(self, resource: Resource, namespace: str, name: str) -> Json | None:
        with self._changed:
            return self._objects[resource.qualified].get((namespace, name))

    def objects(self, resource: Resource, namespace: str = "", at: int = 0) -> tuple[list[Json], int]:
        """The objects in order of their names, and the version that this is; *at* asks for an earlier one."""
        with self._changed:
            objects = self._objects[resource.qualified]
            if at and at != self._version:
                objects = self._as_it_was(resource, at)
            found = [obj for place, obj in sorted(objects.items()) if not namespace or place[0] == namespace]
            return found, at or self._version

    def count(self) -> dict[str, int]:
        """How many objects of each kind there are."""
        with self._changed:
            return {kind: len(objects) for kind, objects in self._objects.items() if objects}

    def _as_it_was(self, resource: Resource, version: int) -> dict[Place, Json]:
        if version > self._version:
            raise too_large_version(version, self._version)
        if version < self._forgotten:
            raise expired(_TOO_OLD)
        objects = dict(self._objects[resource.qualified])
        for change in reversed(self._history):
            if change.version <= version:
                break
            if change.resource.qualified == resource.qualified:
                if change.before is None:
                    del objects[place_of(change.object)]
                else:
                    objects[place_of(change.object)] = change.before
        return objects

    def add(self, resource: Resource, obj: Json) -> Json:
        """Put a new object in. Raises Taken."""
        with self._changed:
            objects = self._objects[resource.qualified]
            if place_of(obj) in objects:
                raise Taken
            return self._enter("ADDED", resource, obj, None)

    def put(self, resource: Resource, obj: Json) -> Json:
        """Put *obj* in the place of the one with its name; the same content is no change."""
        with self._changed:
            before = self._objects[resource.qualified][place_of(obj)]
            if obj == before:
                return before
            return self._enter("MODIFIED", resource, obj, before)

    def remove(self, resource: Resource, obj: Json) -> Json:
        """Take an object out; what is told and returned is *obj*, as it was last, with the version of its end."""
        with self._changed:
            before = self._objects[resource.qualified][place_of(obj)]
            return self._enter("DELETED", resource, obj, before)

    def _enter(self, kind: str, resource: Resource, obj: Json, before: Json | None) -> Json:
        self._version += 1
        new: Json = copied(obj)
        new["metadata"]["resourceVersion"] = str(self._version)
        if kind == "DELETED":
            del self._objects[resource.qualified][place_of(new)]
        else:
            self._objects[resource.qualified][place_of(new)] = new
        if len(self._history) == self._history.maxlen:
            self._forgotten = self._history[0].version
        change = Change(self._version, kind, resource, new, before)
        self._history.append(change)
        for listener in self.listeners:
            listener(change)
        self._changed.notify_all()
        return new

    def since(self, version: int, timeout: float, interrupted: Callable[[], bool] = lambda: False) -> list[Change]:
        """What happened after *version*, waited for until there is something.

        [] after *timeout* seconds, and when *interrupted* holds after a `wake`. Raises `Refused` (410) when that part
        of the past is forgotten.
        """
        limit = time.monotonic() + timeout
        with self._changed:
            while not self._closed and not interrupted():
                if version < self._forgotten:
                    raise too_old(version, self._forgotten)
                if version < self._version:
                    return self._after(version)
                left = limit - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            return []

    def _after(self, version: int) -> list[Change]:
        found = []
        for change in reversed(self._history):
            if change.version <= version:
                break
            found.append(change)
        return found[::-1]

    def forget(self) -> None:
        """Forget the past: whoever asks for it is told that it is too old."""
        with self._changed:
            self._version += 1  # also who has seen everything until now is too late
            self._history.clear()
            self._forgotten = self._version
            self._changed.notify_all()

    def wake(self) -> None:
        """Let everybody who waits look again."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Nobody waits any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
