"""A container's environment and arguments as the kubelet makes them: sources, and `$(NAME)` in values."""

from __future__ import annotations

import base64
import re
from typing import Callable, Mapping

from tests.cluster.refusals import Json
from tests.cluster.resources import CONFIGMAPS, SECRETS, Resource

Find = Callable[[Resource, str], "Json | None"]
"""An object of the pod's namespace by its name."""

_SUBSCRIPT = re.compile(r"^metadata\.(labels|annotations)\['(.*)'\]$")


class ConfigFault(Exception):
    """The container cannot be made yet: CreateContainerConfigError."""


def expand(text: str, known: Mapping[str, str]) -> str:
    """`$(NAME)` becomes the value, or stays as it is when there is none; `$$` becomes `$`; any other `$` stays."""
    parts: list[str] = []
    at = 0
    while at < len(text):
        dollar = text.find("$", at)
        if dollar < 0 or dollar + 1 == len(text):
            return "".join([*parts, text[at:]])
        parts.append(text[at:dollar])
        following = text[dollar + 1]
        end = text.find(")", dollar + 2) if following == "(" else -1
        if following == "$":
            parts.append("$")
            at = dollar + 2
        elif end >= 0:
            name = text[dollar + 2 : end]
            parts.append(known.get(name, f"$({name})"))
            at = end + 1
        else:
            parts.append("$" + following)
            at = dollar + 2
    return "".join(parts)


def field(pod: Json, path: str) -> str:
    """The value of a fieldRef."""
    if match := _SUBSCRIPT.match(path):
        return str((pod["metadata"].get(match[1]) or {}).get(match[2], ""))
    if path in ("metadata.labels", "metadata.annotations"):
        rows = (pod["metadata"].get(path.partition(".")[2]) or {}).items()
        return "\n".join(f'{name}="{value}"' for name, value in sorted(rows))
    value: object = pod
    for step in path.split("."):
        value = value.get(step, "") if isinstance(value, dict) else ""
    return str(value)


def data_of(resource: Resource, obj: Json) -> dict[str, bytes]:
    """What a Secret or ConfigMap holds."""
    if resource == SECRETS:
        return {key: base64.b64decode(value) for key, value in (obj.get("data") or {}).items()}
    binary = {key: base64.b64decode(value) for key, value in (obj.get("binaryData") or {}).items()}
    return {**{key: value.encode() for key, value in (obj.get("data") or {}).items()}, **binary}


def _whole(find: Find, source: Json, prefix: str) -> dict[str, str]:
    """All of a Secret or ConfigMap, of an envFrom."""
    found: dict[str, str] = {}
    for kind, resource in (("secretRef", SECRETS), ("configMapRef", CONFIGMAPS)):
        ref = source.get(kind)
        if ref is None:
            continue
        obj = find(resource, ref["name"])
        if obj is None:
            if ref.get("optional"):
                continue
            raise ConfigFault(f'{resource.singular} "{ref["name"]}" not found')
        found |= {prefix + key: value.decode() for key, value in data_of(resource, obj).items()}
    return found


def _one(find: Find, source: Json, pod: Json) -> str | None:
    """The value of a valueFrom, None for an optional one that is not there."""
    if "fieldRef" in source:
        return field(pod, source["fieldRef"]["fieldPath"])
    for kind, resource in (("secretKeyRef", SECRETS), ("configMapKeyRef", CONFIGMAPS)):
        ref = source.get(kind)
        if ref is None:
            continue
        obj = find(resource, ref["name"])
        if obj is None and not ref.get("optional"):
            raise ConfigFault(f'{resource.singular} "{ref["name"]}" not found')
        value = data_of(resource, obj).get(ref["key"]) if obj else None
        if value is None and not ref.get("optional"):
            place = f"{pod['metadata']['namespace']}/{ref['name']}"
            raise ConfigFault(f"couldn't find key {ref['key']} in {resource.kind} {place}")
        return None if value is None else value.decode()
    return ""


def variables(container: Json, pod: Json, find: Find, services: Mapping[str, str]) -> dict[str, str]:
    """The variables that the pod gives a container; a value sees those before it. Raises ConfigFault."""
    found: dict[str, str] = {}
    for source in container.get("envFrom") or ():
        found |= _whole(find, source, source.get("prefix", ""))
    known = {**services, **found}
    for row in container.get("env") or ():
        if "valueFrom" in row:
            value = _one(find, row["valueFrom"], pod)
            if value is None:
                continue
        else:
            value = expand(row.get("value", ""), known)
        found[row["name"]] = known[row["name"]] = value
    return {**services, **found}
