"""Strict decoding against the published schemas of a version of Kubernetes (PyPI `kubernetes-validate`)."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from tests.cluster.refusals import Json, bad_request
from tests.cluster.resources import Resource

_QUANTITY = re.compile(r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+|[numkMGTPE]|[KMGTPE]i)?$")
_TIME = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)$")
_QUANTITY_RULE = "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'"
_ABSENT = object()
_SPELT = {str: "string", bool: "bool", list: "array", dict: "object", int: "number", float: "number"}


class _Mismatch(Exception):
    """A value has another type than the field."""


class _Object(dict[str, Any]):
    """A JSON object that remembers which of its keys came twice."""

    twice: tuple[str, ...] = ()


def _remember(pairs: list[tuple[str, Any]]) -> _Object:
    found = _Object(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        found.twice = tuple(sorted({name for name in names if names.count(name) > 1}))
    return found


@functools.lru_cache(maxsize=4)
def _definitions(version: str) -> dict[str, Any]:
    spec = importlib.util.find_spec("kubernetes_validate")
    if spec is None or not spec.origin:
        raise RuntimeError("the schemas of Kubernetes are missing: pip install kubernetes-validate")
    folder = Path(spec.origin).parent / "kubernetes-json-schema" / f"v{version}.0-local-strict"
    if not folder.is_dir():
        raise RuntimeError(f"kubernetes-validate has no schemas of Kubernetes {version}")
    found: dict[str, Any] = json.loads((folder / "_definitions.json").read_text())["$defs"]
    return found


class _Field(NamedTuple):
    """Where the decoder is: the path that messages name, and the same as Go's decoder names it."""

    path: str
    struct: str

    def inside(self, name: str) -> _Field:
        return _Field(f"{self.path}.{name}" if self.path else name, self.struct)

    @property
    def go(self) -> str:
        return f"{self.struct}." + re.sub(r"\[[0-9]+\]", "", self.path)


class Schemas:
    """The schemas of one version, such as "1.32". Never changes; any thread may use it."""

    def __init__(self, version: str) -> None:
        self.version = version
        self._known = _definitions(version)

    def knows(self, definition: str) -> bool:
        return definition in self._known

    def has(self, definition: str, field: str) -> bool:
        """Whether a kind has this field in this version."""
        return field in self._known[definition]["properties"]

    def merge_key(self, definition: str, field: str) -> tuple[str, str]:
        """How a strategic patch treats a list or object: its strategy and the key of a list, and "" for none."""
        schema = self._known.get(definition, {}).get("properties", {}).get(field, {})
        return schema.get("x-kubernetes-patch-strategy", ""), schema.get("x-kubernetes-patch-merge-key", "")

    def definition_of(self, definition: str, field: str) -> str:
        """The definition of what a field holds, be it one, a list or a map of them; "" for a plain value."""
        schema = self._known.get(definition, {}).get("properties", {}).get(field, {})
        for inner in (schema, schema.get("items") or {}, schema.get("additionalProperties") or {}):
            if isinstance(inner, dict) and "$ref" in inner:
                return _name_of(inner)
        return ""

    def decode(self, text: bytes, resource: Resource, mode: str) -> tuple[Json, list[str]]:
        """The object in *text* without what its schema does not know, and warnings about that.

        *mode* is Strict, Warn or Ignore, as `fieldValidation` says it. Raises Refused (400).
        """
        try:
            found = json.loads(text, object_pairs_hook=_remember)
        except ValueError as error:
            raise bad_request(
                f"the object provided is unrecognized (must be of type {resource.kind}): {error}"
            ) from None
        if not isinstance(found, dict) or not isinstance(found.get("metadata", {}), (dict, type(None))):
            raise bad_request(f"the object provided is unrecognized (must be of type {resource.kind})")
        return self.decoded(found, resource, mode)

    def decoded(self, found: Json, resource: Resource, mode: str) -> tuple[Json, list[str]]:
        """The same for a value that is parsed already."""
        if not found.get("kind"):
            raise bad_request(f"Object 'Kind' is missing in '{json.dumps(found)[:200]}'")
        version = found.get("apiVersion")
        if found["kind"] != resource.kind or version != resource.api_version:
            sent = f"{found['kind']} in version {json.dumps(version)}"
            raise bad_request(
                f"{sent} cannot be handled as a {resource.kind}: expected {resource.api_version}, Kind={resource.kind}"
            )
        said: list[str] = []
        cannot = f'{resource.kind} in version "{resource.version}" cannot be handled as a {resource.kind}'
        try:
            obj = self._value(found, {"$ref": resource.definition}, _Field("", resource.kind), said)
        except _Mismatch as error:
            raise bad_request(f"{cannot}: {error}") from None
        if said and mode == "Strict":
            raise bad_request(f"{cannot}: strict decoding error: {', '.join(said)}")
        return obj, said if mode == "Warn" else []

    def _value(self, value: Any, schema: Json, field: _Field, said: list[str]) -> Any:
        if "$ref" in schema:
            return self._named(value, _name_of(schema), field, said)
        types = schema.get("type") or []
        kind = next((name for name in ([types] if isinstance(types, str) else types) if name != "null"), "object")
        if value is None:
            return _ABSENT
        if kind == "array":
            if not isinstance(value, list):
                raise self._mismatch(value, field, "[]" + _go_type(schema.get("items") or {}))
            rows = ((row, field._replace(path=f"{field.path}[{number}]")) for number, row in enumerate(value))
            items = [self._value(row, schema.get("items") or {}, place, said) for row, place in rows]
            return ["" if item is _ABSENT else item for item in items]
        if kind == "object":
            return self._map(value, schema, field, said)
        fits = {"string": isinstance(value, str), "boolean": isinstance(value, bool)}
        fits["integer"] = isinstance(value, int) and not isinstance(value, bool)
        fits["number"] = fits["integer"] or isinstance(value, float)
        if not fits[kind]:
            raise self._mismatch(
                value, field, schema.get("format") if kind == "integer" else kind.replace("boolean", "bool")
            )
        return value

    def _map(self, value: Any, schema: Json, field: _Field, said: list[str]) -> Any:
        if not isinstance(value, dict):
            raise self._mismatch(value, field, "map[string]" + _go_type(schema.get("additionalProperties") or {}))
        inner = schema.get("additionalProperties")
        if not isinstance(inner, dict):
            return dict(value)
        said += [f'duplicate field "{field.inside(name).path}"' for name in getattr(value, "twice", ())]
        pairs = {name: self._value(each, inner, field.inside(name), said) for name, each in value.items()}
        return {name: "" if each is _ABSENT else each for name, each in pairs.items()}

    def _named(self, value: Any, name: str, field: _Field, said: list[str]) -> Any:
        if value is None:
            return _ABSENT
        short = name.rsplit(".", 1)[-1]
        if short in ("Time", "MicroTime"):
            if not isinstance(value, str) or not _TIME.match(value):
                raise _Mismatch(f'parsing time {json.dumps(value)} as "2006-01-02T15:04:05Z07:00": cannot parse')
            return value
        if short == "Quantity":
            if isinstance(value, bool) or not isinstance(value, (str, int, float)) or not _QUANTITY.match(str(value)):
                raise _Mismatch(_QUANTITY_RULE)
            return str(value)
        if short == "IntOrString":
            if isinstance(value, bool) or not isinstance(value, (str, int)):
                raise self._mismatch(value, field, "intstr.IntOrString")
            return value
        schema = self._known[name]
        if "properties" not in schema:
            return self._value(value, {"type": "object", **schema}, field, said)
        return self._struct(value, schema["properties"], field._replace(struct=short), said)

    def _struct(self, value: Any, properties: Json, field: _Field, said: list[str]) -> Any:
        if not isinstance(value, dict):
            raise self._mismatch(value, field, field.struct)
        said += [f'duplicate field "{field.inside(name).path}"' for name in getattr(value, "twice", ())]
        found = {}
        for name, each in value.items():
            if name not in properties:
                said.append(f'unknown field "{field.inside(name).path}"')
                continue
            decoded = self._value(each, properties[name], field.inside(name), said)
            if decoded is not _ABSENT:
                found[name] = decoded
        return found

    @staticmethod
    def _mismatch(value: Any, field: _Field, wanted: str | None) -> _Mismatch:
        spelt = _SPELT[type(value) if type(value) in _SPELT else dict]
        return _Mismatch(f"json: cannot unmarshal {spelt} into Go struct field {field.go} of type {wanted or 'int64'}")


def _name_of(schema: Json) -> str:
    return str(schema["$ref"]).rsplit("/", 1)[-1]


def _go_type(schema: Json) -> str:
    if "$ref" in schema:
        return _name_of(schema).rsplit(".", 1)[-1]
    return "string"
