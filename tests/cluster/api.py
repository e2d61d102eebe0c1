"""The verbs of the API on stored objects, the same for requests and for the cluster's own controllers."""

from __future__ import annotations

import base64
import secrets
import time
import uuid
from typing import Callable, Mapping

from tests.cluster import admission, clock, defaults, deletion, patches, validation
from tests.cluster.refusals import (
    Cause,
    Json,
    Refused,
    already_exists,
    bad_request,
    invalid,
    not_found,
    stale,
)
from tests.cluster.resources import EVENTS, JOBS, NAMESPACES, PODS, SECRETS, Resource
from tests.cluster.schemas import Schemas
from tests.cluster.store import Store, Taken, copied

Change = Callable[[Json], None]
_LETTERS = "bcdfghjklmnpqrstvwxz2456789"
_LONGEST_BASE = 58
_KEPT = (
    "uid",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "generation",
    "namespace",
    "name",
)


def suffix() -> str:
    """Five random letters, as generated names end."""
    return "".join(secrets.choice(_LETTERS) for _ in range(5))


class Api:
    """Create, read, change and delete. Any thread may call any method.

    *webhooks* may be added and taken at any time. What comes back belongs to the store and must not be written to.
    """

    def __init__(self, store: Store, schemas: Schemas, *, image_volumes: bool = True) -> None:
        self.store = store
        self.schemas = schemas
        self.webhooks: list[admission.Webhook] = []
        self._image_volumes = image_volumes

    def create(self, resource: Resource, namespace: str, obj: Json, *, dry_run: bool = False) -> Json:
        """Put *obj* in: defaults, admission, rules. *obj* becomes ours. Raises Refused."""
        meta = obj.setdefault("metadata", {})
        name = meta.get("name") or meta.get("generateName", "")
        self._claim_namespace(resource, namespace, meta)
        if resource.namespaced:
            admission.namespace_is_there(self.store, resource, namespace, name)
        self._fill_in(resource, obj)
        if resource == PODS and "containers" in (obj.get("spec") or {}):
            admission.service_account(self.store, obj)
            admission.tolerations(obj["spec"])
        for webhook in list(self.webhooks):
            webhook.ask(resource, obj)
        if not meta.get("name") and meta.get("generateName"):
            meta["name"] = meta["generateName"][:_LONGEST_BASE] + suffix()
        self._identify(resource, obj)
        self._check(resource, obj, validation.rules(resource, obj))
        with self.store.lock:
            if resource in (PODS, JOBS, SECRETS):
                admission.quota(self.store, resource, obj)
            if dry_run:
                return obj
            try:
                return self.store.add(resource, obj)
            except Taken:
                raise already_exists(resource, meta["name"]) from None

    def _claim_namespace(self, resource: Resource, namespace: str, meta: Json) -> None:
        if not resource.namespaced:
            meta.pop("namespace", None)
        elif meta.setdefault("namespace", namespace) != namespace:
            raise bad_request("the namespace of the provided object does not match the namespace sent on the request")

    def _fill_in(self, resource: Resource, obj: Json) -> None:
        if resource in (PODS, JOBS):
            template = obj if resource == PODS else (obj.get("spec") or {}).get("template") or {}
            if not isinstance(template.get("spec"), dict):
                field = "spec" if resource == PODS else "spec.template.spec"
                cause = Cause(f"{field}.containers", "FieldValueRequired", "Required value")
                raise invalid(resource, obj["metadata"].get("name", ""), [cause])
            (defaults.pod if resource == PODS else defaults.job)(obj)
            if resource == JOBS and not self.schemas.has("io.k8s.api.batch.v1.JobSpec", "podReplacementPolicy"):
                obj["spec"].pop("podReplacementPolicy", None)
            if not self._image_volumes:
                admission.drop_image_volumes(template["spec"])
        elif resource == SECRETS:
            plain = obj.pop("stringData", None) or {}
            if plain:
                data = {key: base64.b64encode(value.encode()).decode() for key, value in plain.items()}
                obj["data"] = {**(obj.get("data") or {}), **data}
            obj.setdefault("type", "Opaque")
        elif resource == NAMESPACES:
            obj.setdefault("spec", {})["finalizers"] = ["kubernetes"]
            obj["metadata"].setdefault("labels", {})["kubernetes.io/metadata.name"] = obj["metadata"].get("name", "")

    @staticmethod
    def _identify(resource: Resource, obj: Json) -> None:
        """What only the server may say about an object."""
        meta = obj["metadata"]
        for field in (
            "deletionTimestamp",
            "deletionGracePeriodSeconds",
            "resourceVersion",
            "managedFields",
            "selfLink",
        ):
            meta.pop(field, None)
        meta["uid"] = str(uuid.uuid4())
        meta["creationTimestamp"] = clock.now()
        if resource == JOBS:
            meta["generation"] = 1
            obj["status"] = {}
            defaults.job_identity(obj)
        elif resource == PODS:
            obj["status"] = {"phase": "Pending", "qosClass": defaults.quality(obj)}
        elif resource == NAMESPACES:
            obj["status"] = {"phase": "Active"}

    @staticmethod
    def _check(resource: Resource, obj: Json, causes: list[Cause]) -> None:
        if causes:
            raise invalid(resource, obj["metadata"].get("name", ""), causes)

    def get(self, resource: Resource, namespace: str, name: str) -> Json:
        """Raises Refused (404)."""
        found = self.store.get(resource, namespace, name)
        if found is None:
            raise not_found(resource, name)
        return found

    def change(self, resource: Resource, namespace: str, name: str, how: Change, *, uid: str = "") -> Json | None:
        """Change an object as the cluster's own parts do; None when it is gone, or is another than that of *uid*."""
        with self.store.lock:
            found = self.store.get(resource, namespace, name)
            if found is None or (uid and found["metadata"]["uid"] != uid):
                return None
            new = copied(found)
            how(new)
            return self.settle(resource, new)

    def settle(self, resource: Resource, new: Json) -> Json:
        """Store a changed object, or remove it when nothing holds it any more. Called with the store's lock."""
        if deletion.is_over(resource, new):
            return self.store.remove(resource, new)
        return self.store.put(resource, new)

    def update(self, resource: Resource, namespace: str, name: str, new: Json, subresource: str = "") -> Json:
        """Replace an object, or only its status. Raises Refused (404, 409, 422)."""
        with self.store.lock:
            old = self.get(resource, namespace, name)
            version = (new.get("metadata") or {}).get("resourceVersion")
            if version and version != old["metadata"]["resourceVersion"]:
                raise stale(resource, name)
            return self._replace(resource, old, new, subresource)

    def _replace(self, resource: Resource, old: Json, new: Json, subresource: str, *, dry_run: bool = False) -> Json:
        meta = new.setdefault("metadata", {})
        if meta.get("uid") not in (None, old["metadata"]["uid"]):
            why = (
                f"Precondition failed: UID in precondition: {meta['uid']}, UID in object meta: {old['metadata']['uid']}"
            )
            from_other = stale(resource, old["metadata"]["name"])
            raise Refused(409, "Conflict", from_other.message.partition(": ")[0] + f": {why}", from_other.details)
        for field in _KEPT:
            meta.pop(field, None)
            if field in old["metadata"]:
                meta[field] = old["metadata"][field]
        meta["resourceVersion"] = old["metadata"]["resourceVersion"]
        if subresource == "status":
            new = {**old, "status": new.get("status", {})}
        elif "status" in old:
            new["status"] = old["status"]
        if subresource != "status":
            self._fill_in_again(resource, new)
            if resource == JOBS and new["spec"] != old["spec"]:
                meta["generation"] = old["metadata"].get("generation", 1) + 1
            self._check(resource, new, [*validation.update(resource, old, new), *validation.rules(resource, new)])
        return new if dry_run else self.settle(resource, new)

    def _fill_in_again(self, resource: Resource, new: Json) -> None:
        if resource == JOBS:
            defaults.job(new)
        elif resource == PODS:
            defaults.pod(new)
        elif resource == SECRETS:
            self._fill_in(resource, new)

    def patch(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        kind: str,
        body: bytes,
        *,
        mode: str = "Strict",
        subresource: str = "",
        dry_run: bool = False,
    ) -> tuple[Json, list[str]]:
        """Apply a patch of the content type *kind*; the object and warnings. Raises Refused."""
        with self.store.lock:
            old = self.store.get(resource, namespace, name)
            if old is None and kind == patches.APPLY:
                obj, said = self.schemas.decoded(patches.parsed(kind, body), resource, mode)
                return self.create(resource, namespace, obj, dry_run=dry_run), said
            if old is None:
                raise not_found(resource, name)
            patched = patches.apply(self.schemas, resource, copied(old), kind, body)
            version = (patched.get("metadata") or {}).get("resourceVersion")
            if version != old["metadata"]["resourceVersion"]:
                raise stale(resource, name)
            new, said = self.schemas.decoded(patched, resource, mode)
            return self._replace(resource, old, new, subresource, dry_run=dry_run), said

    def delete(self, resource: Resource, namespace: str, name: str, options: Mapping[str, object]) -> Json:
        """Begin the end of an object, or end it; the object or a Status. Raises Refused (404, 409)."""
        with self.store.lock:
            old = self.get(resource, namespace, name)
            deletion.check(resource, old, options)
            new = copied(old)
            deletion.begin(resource, new, options, time.time())
            if options.get("dryRun"):
                return dict(new)
            after = self.settle(resource, new)
            if deletion.is_over(resource, new) and resource != PODS:
                details = {
                    "name": name,
                    "group": resource.group,
                    "kind": resource.plural,
                    "uid": old["metadata"]["uid"],
                }
                shown = {key: value for key, value in details.items() if value}
                return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": shown}
            return after

    def record(
        self, about: Resource, obj: Json, kind: str, reason: str, message: str, source: str, **more: str
    ) -> None:
        """Write an event about *obj*, with *more* host and path, or (series) count up the one that says the same."""
        meta = obj["metadata"]
        namespace = meta.get("namespace", "default")
        target = {
            "kind": about.kind,
            "namespace": namespace,
            "name": meta["name"],
            "uid": meta["uid"],
            "apiVersion": about.api_version,
        }
        if more.get("path"):
            target["fieldPath"] = more["path"]
        component = {"component": source, **({"host": more["host"]} if more.get("host") else {})}
        with self.store.lock:
            for event in self.store.objects(EVENTS, namespace)[0] if more.get("series") else ():
                same = event["involvedObject"].get("uid") == meta["uid"] and event["reason"] == reason
                if (
                    same
                    and event["message"] == message
                    and event["involvedObject"].get("fieldPath") == more.get("path")
                ):
                    self.store.put(EVENTS, {**event, "count": event["count"] + 1, "lastTimestamp": clock.now()})
                    return
            name = f"{meta['name']}.{time.time_ns():x}"
            event = {
                "kind": "Event",
                "apiVersion": "v1",
                "involvedObject": target,
                "reason": reason,
                "message": message,
                "type": kind,
            }
            event |= {
                "metadata": {
                    "name": name,
                    "namespace": namespace,
                    "uid": str(uuid.uuid4()),
                    "creationTimestamp": clock.now(),
                }
            }
            event |= {"source": component, "firstTimestamp": clock.now(), "lastTimestamp": clock.now(), "count": 1}
            event |= {"eventTime": None, "reportingComponent": source, "reportingInstance": more.get("host", "")}
            place = self.store.get(NAMESPACES, "", namespace)
            if place is not None and "deletionTimestamp" not in place["metadata"]:
                self.store.add(EVENTS, event)
