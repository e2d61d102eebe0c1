"""What stands between a well-formed object and the store: namespaces, hooks, service accounts, quotas."""

from __future__ import annotations

import secrets
from decimal import Decimal
from typing import Any, Callable, Mapping, NamedTuple, Union

from tests.cluster.quantities import amount, asked, spelt
from tests.cluster.refusals import Json, Refused, forbidden, not_found
from tests.cluster.resources import NAMESPACES, PODS, QUOTAS, SERVICE_ACCOUNTS, Resource
from tests.cluster.store import Store

Hook = Callable[[Resource, Json], Union[str, None]]
"""May change the object, or refuse it by a sentence."""

TOKENS = "/var/run/secrets/kubernetes.io/serviceaccount"
_OVER = ("limits.cpu", "limits.memory", "requests.cpu", "requests.memory")


class Webhook(NamedTuple):
    """A hook as a cluster's operator would install it."""

    name: str
    hook: Hook
    code: int = 400

    def ask(self, resource: Resource, obj: Json) -> None:
        if said := self.hook(resource, obj):
            text = f'admission webhook "{self.name}" denied the request: {said}'
            raise Refused(self.code, "Forbidden" if self.code == 403 else "", text)


def namespace_is_there(store: Store, resource: Resource, namespace: str, name: str) -> None:
    """Raises Refused where nothing can be created."""
    found = store.get(NAMESPACES, "", namespace)
    if found is None:
        raise not_found(NAMESPACES, namespace)
    if found["metadata"].get("deletionTimestamp"):
        why = f"unable to create new content in namespace {namespace} because it is being terminated"
        raise forbidden(resource, name, why)


def service_account(store: Store, pod: Json) -> None:
    """Give a pod its service account, that account's pull secrets, and the volume with its token."""
    meta, spec = pod["metadata"], pod["spec"]
    name = spec.setdefault("serviceAccountName", "default")
    spec["serviceAccount"] = name
    account = store.get(SERVICE_ACCOUNTS, meta["namespace"], name)
    if account is None:
        place = f"{meta['namespace']}/{name}"
        why = f'error looking up service account {place}: serviceaccount "{name}" not found'
        raise forbidden(PODS, meta.get("name") or meta.get("generateName", ""), why)
    if not spec.get("imagePullSecrets") and account.get("imagePullSecrets"):
        spec["imagePullSecrets"] = account["imagePullSecrets"]
    wanted = spec.get("automountServiceAccountToken")
    if wanted is None:
        wanted = account.get("automountServiceAccountToken", True)
    if wanted:
        _mount_token(spec)


def _mount_token(spec: Json) -> None:
    volume = f"kube-api-access-{secrets.token_hex(3)[:5]}"
    used = False
    for container in [*(spec.get("initContainers") or ()), *spec["containers"]]:
        mounts = container.setdefault("volumeMounts", [])
        if not any(mount["mountPath"] == TOKENS for mount in mounts):
            mounts.append({"name": volume, "readOnly": True, "mountPath": TOKENS})
            used = True
    if used:
        root = {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}
        field = {"apiVersion": "v1", "fieldPath": "metadata.namespace"}
        sources: list[Json] = [
            {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}},
            {"configMap": root},
            {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": field}]}},
        ]
        spec.setdefault("volumes", []).append({"name": volume, "projected": {"sources": sources, "defaultMode": 0o644}})


def tolerations(spec: Json) -> None:
    """Let a pod stay for five minutes on a node that is lost."""
    found = spec.setdefault("tolerations", [])
    for key in ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"):
        if not any(each.get("key") == key for each in found):
            found.append({"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300})


def _usage(resource: Resource, obj: Json) -> dict[str, Decimal]:
    """What an object takes of a quota."""
    taken = {f"count/{resource.qualified}": Decimal(1)}
    if resource == PODS:
        if (obj.get("status") or {}).get("phase") in ("Succeeded", "Failed"):
            return taken
        taken["pods"] = Decimal(1)
        for what in _OVER:
            kind, name = what.split(".")
            taken[what] = asked(obj, name, kind)
        taken["cpu"], taken["memory"] = taken["requests.cpu"], taken["requests.memory"]
    return taken


def _must_say(pod: Json, hard: Mapping[str, Any], name: str) -> None:
    """A quota of cpu or memory refuses pods whose containers do not say how much they want."""
    missing: dict[str, list[str]] = {}
    for what in _OVER:
        kind, resource = what.split(".")
        if what not in hard and not (kind == "requests" and resource in hard):
            continue
        for container in pod["spec"]["containers"]:
            if not ((container.get("resources") or {}).get(kind) or {}).get(resource):
                missing.setdefault(what, []).append(container["name"])
    if missing:
        said = "; ".join(f"{what} for: {','.join(names)}" for what, names in missing.items())
        raise forbidden(PODS, pod["metadata"]["name"], f"failed quota: {name}: must specify {said}")


def quota(store: Store, resource: Resource, obj: Json) -> None:
    """Raises Refused where a quota of the namespace has no room for the object."""
    namespace, name = obj["metadata"]["namespace"], obj["metadata"]["name"]
    wanted = _usage(resource, obj)
    for found in store.objects(QUOTAS, namespace)[0]:
        hard = (found.get("spec") or {}).get("hard") or {}
        title = found["metadata"]["name"]
        if resource == PODS:
            _must_say(obj, hard, title)
        counted = [what for what in sorted(hard) if wanted.get(what)]
        if not counted:
            continue
        rows = [_usage(resource, each) for each in store.objects(resource, namespace)[0]]
        used = {what: sum((row.get(what, Decimal(0)) for row in rows), Decimal(0)) for what in counted}
        over = [what for what in counted if used[what] + wanted[what] > amount(hard[what])]
        if over:
            asks = ",".join(f"{what}={spelt(wanted[what])}" for what in over)
            has = ",".join(f"{what}={spelt(used[what])}" for what in over)
            limit = ",".join(f"{what}={hard[what]}" for what in over)
            why = f"exceeded quota: {title}, requested: {asks}, used: {has}, limited: {limit}"
            raise forbidden(resource, name, why)


def drop_image_volumes(spec: Json) -> None:
    """Where the cluster has image volumes switched off, the field is dropped without a word."""
    for volume in spec.get("volumes") or ():
        volume.pop("image", None)
