"""The binary form that typed clients of kubectl send for a few small kinds; no other kind is understood in it."""

from __future__ import annotations

import base64
from typing import Any, Iterator, Mapping, NamedTuple, Union

from tests.cluster.refusals import Json, cannot_read

MEDIA_TYPE = "application/vnd.kubernetes.protobuf"
_MAGIC = b"k8s\x00"


class _Message(NamedTuple):
    """The fields of a message by number: name and kind; a list is repeated."""

    fields: Mapping[int, tuple[str, _Kind]]


_Kind = Union[str, list[Any], _Message]
"""`text`, `number`, `yes`, `map`, `bytes map`, a message, or a list of one of them."""

_OWNER = _Message(
    {
        1: ("kind", "text"),
        3: ("name", "text"),
        4: ("uid", "text"),
        5: ("apiVersion", "text"),
        6: ("controller", "yes"),
        7: ("blockOwnerDeletion", "yes"),
    }
)
_META = _Message(
    {
        1: ("name", "text"),
        2: ("generateName", "text"),
        3: ("namespace", "text"),
        5: ("uid", "text"),
        6: ("resourceVersion", "text"),
        11: ("labels", "map"),
        12: ("annotations", "map"),
        13: ("ownerReferences", [_OWNER]),
        14: ("finalizers", ["text"]),
    }
)
_WANTED = _Message(
    dict(
        enumerate(
            [(name, "text") for name in ("namespace", "verb", "group", "version", "resource", "subresource", "name")], 1
        )
    )
)
_PLAIN = _Message({1: ("path", "text"), 2: ("verb", "text")})
_ACCESS = _Message({1: ("resourceAttributes", _WANTED), 2: ("nonResourceAttributes", _PLAIN)})
_CONDITIONS = _Message({1: ("uid", "text"), 2: ("resourceVersion", "text")})
_KINDS = {
    "SelfSubjectAccessReview": _Message({1: ("metadata", _META), 2: ("spec", _ACCESS)}),
    "SelfSubjectRulesReview": _Message({1: ("metadata", _META), 2: ("spec", _Message({1: ("namespace", "text")}))}),
    "Secret": _Message(
        {
            1: ("metadata", _META),
            2: ("data", "bytes map"),
            3: ("type", "text"),
            4: ("stringData", "map"),
            5: ("immutable", "yes"),
        }
    ),
    "ConfigMap": _Message(
        {1: ("metadata", _META), 2: ("data", "map"), 3: ("binaryData", "bytes map"), 4: ("immutable", "yes")}
    ),
    "Namespace": _Message({1: ("metadata", _META)}),
    "ServiceAccount": _Message({1: ("metadata", _META), 4: ("automountServiceAccountToken", "yes")}),
    "DeleteOptions": _Message(
        {
            1: ("gracePeriodSeconds", "number"),
            2: ("preconditions", _CONDITIONS),
            3: ("orphanDependents", "yes"),
            4: ("propagationPolicy", "text"),
            5: ("dryRun", ["text"]),
        }
    ),
}
_ENVELOPE = _Message({1: ("typeMeta", _Message({1: ("apiVersion", "text"), 2: ("kind", "text")})), 2: ("raw", "bytes")})


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


def _fields(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Number, value of a varint, and bytes of each field."""
    at = 0
    while at < len(data):
        head, at = _varint(data, at)
        if head & 7 == 0:
            value, at = _varint(data, at)
            yield head >> 3, value, b""
        elif head & 7 == 2:
            size, at = _varint(data, at)
            yield head >> 3, 0, data[at : at + size]
            at += size
        else:
            raise ValueError("a field of an unknown form")


def _one(kind: Any, value: int, data: bytes) -> Any:
    if isinstance(kind, _Message):
        return _message(data, kind)
    if kind == "text":
        return data.decode()
    return {"bytes": data, "number": value, "yes": bool(value)}[kind]


def _message(data: bytes, message: _Message) -> Json:
    found: Json = {}
    for number, value, part in _fields(data):
        if number not in message.fields:
            continue
        name, kind = message.fields[number]
        if isinstance(kind, list):
            found.setdefault(name, []).append(_one(kind[0], value, part))
        elif kind in ("map", "bytes map"):
            pair = {number: each for number, _, each in _fields(part)}
            text = pair.get(2, b"")
            shown = base64.b64encode(text) if kind == "bytes map" else text
            found.setdefault(name, {})[pair.get(1, b"").decode()] = shown.decode()
        else:
            found[name] = _one(kind, value, part)
    return {key: value for key, value in found.items() if value not in ("", {})}


def decoded(data: bytes) -> Json:
    """The object. Raises Refused (415) for a kind that is not known here."""
    try:
        if not data.startswith(_MAGIC):
            raise ValueError("no magic number")
        envelope = _message(data[4:], _ENVELOPE)
        kind = envelope["typeMeta"]["kind"]
        return {**envelope["typeMeta"], **_message(envelope.get("raw", b""), _KINDS[kind])}
    except (ValueError, KeyError, IndexError):
        raise cannot_read(f"{MEDIA_TYPE}, of a kind that this server only takes as JSON") from None
