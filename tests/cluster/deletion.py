"""How objects end: preconditions, grace, finalizers and what becomes of what they own."""

from __future__ import annotations

from typing import Mapping

from tests.cluster import clock
from tests.cluster.refusals import Cause, Json, conflict, invalid
from tests.cluster.resources import JOBS, NAMESPACES, PODS, Resource

FOREGROUND = "foregroundDeletion"
ORPHAN = "orphan"
_POLICIES = ("Foreground", "Background", "Orphan")


def check(resource: Resource, obj: Json, options: Mapping[str, object]) -> None:
    """Raises Refused where the preconditions do not hold, or the options make no sense."""
    name, meta = obj["metadata"]["name"], obj["metadata"]
    policy = options.get("propagationPolicy")
    if policy is not None and policy not in _POLICIES:
        known = ", ".join(f'"{each}"' for each in (*_POLICIES, "nil"))
        cause = Cause(
            "propagationPolicy", "FieldValueNotSupported", f'Unsupported value: "{policy}": supported values: {known}'
        )
        raise invalid(Resource("", "DeleteOptions", ""), "", [cause])
    wanted = options.get("preconditions") or {}
    if not isinstance(wanted, dict):
        return
    if wanted.get("uid") not in (None, meta["uid"]):
        raise conflict(
            resource,
            name,
            f"Precondition failed: UID in precondition: {wanted['uid']}, UID in object meta: {meta['uid']}",
        )
    if wanted.get("resourceVersion") not in (None, meta["resourceVersion"]):
        why = "Precondition failed: ResourceVersion in precondition: {}, ResourceVersion in object meta: {}"
        raise conflict(resource, name, why.format(wanted["resourceVersion"], meta["resourceVersion"]))


def _grace(resource: Resource, obj: Json, options: Mapping[str, object]) -> int:
    if resource != PODS or not obj["spec"].get("nodeName") or obj["status"].get("phase") in ("Succeeded", "Failed"):
        return 0
    asked = options.get("gracePeriodSeconds")
    if isinstance(asked, int):
        return max(asked, 0)
    return int(obj["spec"].get("terminationGracePeriodSeconds", 30))


def begin(resource: Resource, obj: Json, options: Mapping[str, object], at: float) -> None:
    """Mark *obj* as to be deleted, in place."""
    meta = obj["metadata"]
    finalizers = [each for each in meta.get("finalizers") or () if each not in (FOREGROUND, ORPHAN)]
    policy = options.get("propagationPolicy")
    if policy is None and options.get("orphanDependents") is not None:
        policy = "Orphan" if options["orphanDependents"] else "Background"
    if policy is None and (kept := set(meta.get("finalizers") or ()) & {FOREGROUND, ORPHAN}):
        policy = "Foreground" if FOREGROUND in kept else "Orphan"
    if policy is None and resource == JOBS:
        policy = "Orphan"  # batch/v1 keeps the pods for old clients' sake, alone among the kinds here
    finalizers += {"Foreground": [FOREGROUND], "Orphan": [ORPHAN]}.get(str(policy), [])
    if finalizers:
        meta["finalizers"] = finalizers
    else:
        meta.pop("finalizers", None)
    grace = _grace(resource, obj, options)
    if "deletionTimestamp" in meta:
        grace = min(grace, meta.get("deletionGracePeriodSeconds", 0))
        if grace < meta.get("deletionGracePeriodSeconds", 0):
            meta["deletionTimestamp"] = clock.stamp(at + grace)
    else:
        meta["deletionTimestamp"] = clock.stamp(at + grace)
    meta["deletionGracePeriodSeconds"] = grace
    if "generation" in meta:
        meta["generation"] += 1
    if resource == NAMESPACES:
        obj["status"] = {**(obj.get("status") or {}), "phase": "Terminating"}


def is_over(resource: Resource, obj: Json) -> bool:
    """Whether nothing holds an object that is to be deleted."""
    meta = obj["metadata"]
    if "deletionTimestamp" not in meta or meta.get("finalizers"):
        return False
    if resource == NAMESPACES:
        return not obj["spec"].get("finalizers")
    return not meta.get("deletionGracePeriodSeconds")


def warning(resource: Resource, options: Mapping[str, object]) -> str:
    """What a server says to who deletes a Job and does not say what shall become of its pods."""
    if resource == JOBS and options.get("propagationPolicy") is None and options.get("orphanDependents") is None:
        return (
            "child pods are preserved by default when jobs are deleted; set propagationPolicy=Background to remove "
            "them or set propagationPolicy=Orphan to suppress this warning"
        )
    return ""
