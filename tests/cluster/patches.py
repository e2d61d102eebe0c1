"""The kinds of patches: JSON, merge, strategic, and server-side apply as far as it is a strategic merge."""

from __future__ import annotations

import json
from typing import Any

import yaml

from tests.cluster.refusals import Json, Refused, bad_request, cannot_patch
from tests.cluster.resources import Resource
from tests.cluster.schemas import Schemas

JSON_PATCH = "application/json-patch+json"
MERGE = "application/merge-patch+json"
STRATEGIC = "application/strategic-merge-patch+json"
APPLY = "application/apply-patch+yaml"


def parsed(kind: str, body: bytes) -> Any:
    """The patch. Raises Refused (400, 415)."""
    if kind not in (JSON_PATCH, MERGE, STRATEGIC, APPLY):
        raise cannot_patch(kind)
    try:
        found = yaml.safe_load(body) if kind == APPLY else json.loads(body)
    except (ValueError, yaml.YAMLError) as error:
        raise bad_request(f"error decoding patch: {error}") from None
    if not isinstance(found, list if kind == JSON_PATCH else dict):
        raise bad_request("error decoding patch: it is of the wrong type")
    return found


def apply(schemas: Schemas, resource: Resource, obj: Json, kind: str, body: bytes) -> Json:
    """*obj*, which becomes ours, with the patch."""
    patch = parsed(kind, body)
    if kind == JSON_PATCH:
        for operation in patch:
            _operate(obj, operation)
        return obj
    merged = merge(obj, patch) if kind == MERGE else strategic(schemas, resource.definition, obj, patch)
    assert isinstance(merged, dict)
    return merged


def merge(target: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merge(result.get(key), value)
    return result


def strategic(schemas: Schemas, definition: str, target: Any, patch: Json) -> Json:
    """A merge that knows by which key the rows of a list are one."""
    if patch.get("$patch") == "replace":
        return {key: value for key, value in patch.items() if key != "$patch"}
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if key.startswith("$deleteFromPrimitiveList/"):
            name = key.partition("/")[2]
            result[name] = [each for each in result.get(name) or [] if each not in value]
        elif key.startswith("$"):
            continue
        elif value is None:
            result.pop(key, None)
        else:
            strategy, merge_key = schemas.merge_key(definition, key)
            inner = schemas.definition_of(definition, key)
            if isinstance(value, dict):
                result[key] = strategic(schemas, inner, result.get(key), value)
            elif isinstance(value, list) and "merge" in strategy:
                result[key] = _merge_rows(schemas, inner, result.get(key) or [], value, merge_key)
            else:
                result[key] = value
    return result


def _merge_rows(schemas: Schemas, definition: str, old: list[Any], patch: list[Any], key: str) -> list[Any]:
    if not key:
        return [*old, *(each for each in patch if each not in old)]
    if any(row.get("$patch") == "replace" for row in patch):
        return [row for row in patch if "$patch" not in row]
    rows = {row.get(key): row for row in old}
    for row in patch:
        if row.get("$patch") == "delete":
            rows.pop(row.get(key), None)
        else:
            rows[row.get(key)] = strategic(schemas, definition, rows.get(row.get(key)), row)
    return [*rows.values()]


def _operate(obj: Any, operation: Json) -> None:
    """One step of RFC 6902, in place."""
    path = [part.replace("~1", "/").replace("~0", "~") for part in str(operation.get("path", "")).split("/")[1:]]
    try:
        place = obj
        for part in path[:-1]:
            place = place[int(part)] if isinstance(place, list) else place[part]
        last: Any = path[-1]
        if isinstance(place, list):
            last = len(place) if last == "-" else int(last)
        kind = operation.get("op")
        if kind == "test":
            if place[last] != operation.get("value"):
                raise Refused(
                    422,
                    "Invalid",
                    f"the server rejected our request: testing value {operation['path']} failed",
                )
        elif kind == "remove":
            del place[last]
        elif kind == "add" and isinstance(place, list):
            place.insert(last, operation["value"])
        elif kind in ("add", "replace"):
            if kind == "replace":
                place[last]
            place[last] = operation["value"]
        else:
            raise bad_request(f"unsupported operation: {kind}")
    except (KeyError, IndexError, ValueError, TypeError):
        raise Refused(
            422,
            "Invalid",
            f"the server rejected our request: {operation.get('path')} does not exist",
        ) from None
