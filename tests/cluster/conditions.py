"""The conditions of objects: set in place, as the parts of a cluster set them."""

from __future__ import annotations

from typing import Callable

from tests.cluster import clock
from tests.cluster.refusals import Json


def condition(obj: Json, kind: str) -> Json | None:
    """The condition of a type."""
    rows = (obj.get("status") or {}).get("conditions") or ()
    return next((row for row in rows if row["type"] == kind), None)


def holds(obj: Json, kind: str) -> bool:
    found = condition(obj, kind)
    return found is not None and found["status"] == "True"


def put(obj: Json, kind: str, status: str, reason: str = "", message: str = "", *, probe: bool = True) -> None:
    """Set a condition; the time of its transition stays while its status does. *probe*: as Jobs and Pods have it."""
    rows = obj.setdefault("status", {}).setdefault("conditions", [])
    old = condition(obj, kind)
    new: Json = {"type": kind, "status": status}
    if probe:
        new["lastProbeTime"] = None
    new["lastTransitionTime"] = old["lastTransitionTime"] if old and old["status"] == status else clock.now()
    new |= {key: value for key, value in (("reason", reason), ("message", message)) if value}
    if old is None:
        rows.append(new)
    else:
        rows[rows.index(old)] = new


def disrupted(reason: str, message: str) -> Callable[[Json], None]:
    """Say that a pod's end comes from outside."""
    return lambda pod: put(pod, "DisruptionTarget", "True", reason, message)
