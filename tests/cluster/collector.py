"""Garbage collection by ownerReferences, the two finalizers that go with it, and the end of namespaces."""

from __future__ import annotations

from tests.cluster.api import Api
from tests.cluster.deletion import FOREGROUND, ORPHAN
from tests.cluster.loop import Loop
from tests.cluster.refusals import Json, Refused
from tests.cluster.resources import NAMESPACES, NODES, STORED, Resource
from tests.cluster.store import Change, Place, place_of

_Row = tuple[Resource, Place]


class Collector:
    """Deletes what nobody owns any more, on the loop's thread."""

    def __init__(self, api: Api, loop: Loop) -> None:
        self._api = api
        self._loop = loop
        self._owned: dict[str, dict[tuple[str, Place], Resource]] = {}
        api.store.listeners.append(self._heard)

    def _heard(self, change: Change) -> None:
        meta = change.object["metadata"]
        if meta.get("ownerReferences") or change.type == "DELETED" or meta.get("deletionTimestamp"):
            self._loop.call(lambda: self._see(change))

    def _see(self, change: Change) -> None:
        obj, resource = change.object, change.resource
        meta = obj["metadata"]
        row = (resource.qualified, place_of(obj))
        owners = [owner["uid"] for owner in meta.get("ownerReferences") or ()]
        for uid in owners:
            rows = self._owned.setdefault(uid, {})
            if change.type == "DELETED":
                rows.pop(row, None)
                self._settle_owner(uid)
            else:
                rows[row] = resource
        if change.type == "DELETED":
            for name, place in list(self._owned.pop(meta["uid"], {})):
                self._loop.call(lambda name=name, place=place: self._collect(name, place))  # type: ignore[misc]
        elif change.type == "ADDED" and owners:
            self._collect(*row)
        if resource != NAMESPACES and meta.get("namespace") and change.type == "DELETED":
            self._end_namespace(meta["namespace"])
        if change.type != "DELETED" and meta.get("deletionTimestamp"):
            self._finalize(resource, obj)
            if resource == NAMESPACES:
                self._empty(meta["name"])

    def _exists(self, namespace: str, owner: Json) -> bool:
        for resource in STORED:
            if (resource.api_version, resource.kind) == (owner["apiVersion"], owner["kind"]):
                found = self._api.store.get(resource, namespace if resource.namespaced else "", owner["name"])
                return found is not None and found["metadata"]["uid"] == owner["uid"]
        return False

    @staticmethod
    def _resource(name: str) -> Resource:
        return next(resource for resource in STORED if resource.qualified == name)

    def _collect(self, name: str, place: Place) -> None:
        """Delete an object if none of its owners exists."""
        resource = self._resource(name)
        obj = self._api.store.get(resource, *place)
        owners = (obj or {}).get("metadata", {}).get("ownerReferences")
        if obj is None or not owners or any(self._exists(place[0], owner) for owner in owners):
            return
        self._delete(resource, obj)

    def _delete(self, resource: Resource, obj: Json) -> None:
        if obj["metadata"].get("deletionTimestamp"):
            return
        options = {"propagationPolicy": "Background", "preconditions": {"uid": obj["metadata"]["uid"]}}
        try:
            self._api.delete(resource, *place_of(obj), options)
        except Refused:
            pass  # it is gone, or another has its name

    def _finalize(self, resource: Resource, obj: Json) -> None:
        """Do what the finalizers of an object wait for."""
        finalizers = obj["metadata"].get("finalizers") or ()
        uid = obj["metadata"]["uid"]
        if ORPHAN in finalizers:
            for name, place in list(self._owned.pop(uid, {})):
                self._api.change(self._resource(name), *place, lambda other: _disown(other, uid))
            self._let_go(resource, obj, ORPHAN)
        elif FOREGROUND in finalizers:
            waits = False
            for name, place in list(self._owned.get(uid, {})):
                other = self._api.store.get(self._resource(name), *place)
                if other is None:
                    continue
                blocks = any(
                    owner["uid"] == uid and owner.get("blockOwnerDeletion")
                    for owner in other["metadata"].get("ownerReferences") or ()
                )
                waits = waits or blocks
                self._delete(self._resource(name), other)
            if not waits:
                self._let_go(resource, obj, FOREGROUND)

    def _settle_owner(self, uid: str) -> None:
        """One of what an owner holds is gone: perhaps it was the last that it waited for."""
        for resource in STORED:
            if resource in (NODES, NAMESPACES):
                continue
            for obj in self._api.store.objects(resource)[0] if resource.plural in ("jobs", "pods") else ():
                if obj["metadata"]["uid"] == uid and obj["metadata"].get("deletionTimestamp"):
                    self._finalize(resource, obj)

    def _let_go(self, resource: Resource, obj: Json, finalizer: str) -> None:
        def without(new: Json) -> None:
            new["metadata"]["finalizers"] = [
                each for each in new["metadata"].get("finalizers") or () if each != finalizer
            ]
            if not new["metadata"]["finalizers"]:
                del new["metadata"]["finalizers"]

        self._api.change(resource, *place_of(obj), without, uid=obj["metadata"]["uid"])

    def _empty(self, namespace: str) -> None:
        """Delete everything in a namespace that is to be deleted."""
        for resource in STORED:
            for obj in self._api.store.objects(resource, namespace)[0] if resource.namespaced else ():
                self._delete(resource, obj)
        self._end_namespace(namespace)

    def _end_namespace(self, namespace: str) -> None:
        found = self._api.store.get(NAMESPACES, "", namespace)
        if not found or not found["metadata"].get("deletionTimestamp"):
            return
        if not any(self._api.store.objects(resource, namespace)[0] for resource in STORED if resource.namespaced):
            self._api.change(NAMESPACES, "", namespace, lambda obj: obj["spec"].update(finalizers=[]))


def _disown(obj: Json, uid: str) -> None:
    rows = [owner for owner in obj["metadata"].get("ownerReferences") or () if owner["uid"] != uid]
    if rows:
        obj["metadata"]["ownerReferences"] = rows
    else:
        obj["metadata"].pop("ownerReferences", None)
