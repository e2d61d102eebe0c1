"""The old OpenAPI document in its binary form: kubectl before 1.29 reads in it whether the server decodes strictly.

It lists one operation for each kind, with its `fieldValidation` parameter; schemas are left out.
"""

from __future__ import annotations

from tests.cluster.resources import RESOURCES, Resource

MEDIA_TYPE = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf"
_SWAGGER, _INFO, _PATHS = 1, 2, 8
_PATCH, _POST = 8, 4
_PARAMETERS, _EXTENSION = 8, 13


def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def _field(number: int, *parts: bytes) -> bytes:
    """A field of bytes, text or a message."""
    data = b"".join(parts)
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _parameter() -> bytes:
    query = _field(2, b"query") + _field(4, b"fieldValidation") + _field(6, b"string")
    return _field(_PARAMETERS, _field(1, _field(2, _field(3, query))))


def _kind(resource: Resource) -> bytes:
    yaml = f"group: {resource.group!r}\nkind: {resource.kind}\nversion: {resource.version}\n".encode()
    return _field(_EXTENSION, _field(1, b"x-kubernetes-group-version-kind"), _field(2, _field(2, yaml)))


def document(release: str) -> bytes:
    """The document."""
    paths = b""
    for resource in RESOURCES:
        verb = _PATCH if "patch" in resource.verbs else _POST
        operation = _field(verb, _parameter(), _kind(resource))
        path = resource.path("{namespace}", "{name}" if verb == _PATCH else "").encode()
        paths += _field(2, _field(1, path), _field(2, operation))
    info = _field(1, b"Kubernetes") + _field(2, f"v{release}.0".encode())
    return _field(_SWAGGER, b"2.0") + _field(_INFO, info) + _field(_PATHS, paths)
