"""Who issued a certificate: the one thing that Python does not tell of a certificate that it does not believe."""

from __future__ import annotations

from typing import Iterator, NamedTuple

_NAMES = {b"\x55\x04\x03": "CN", b"\x55\x04\x0a": "O", b"\x55\x04\x0b": "OU"}
"""The parts of a name that people know an authority by, by their object identifiers (2.5.4.x)."""
_UTF16 = 0x1E


class _Item(NamedTuple):
    tag: int
    body: bytes


def issuer_of(der: bytes) -> str:
    """The issuer of a DER-encoded certificate, like `CN=Example Root, O=Example`; "" when it cannot be read."""
    try:
        certificate = next(_items(der))
        fields = list(_items(next(_items(certificate.body)).body))
        fields = fields[1:] if fields[0].tag == 0xA0 else fields  # the version, which the oldest ones lack
        found = dict(_name(fields[2].body))  # behind serial number and algorithm
    except (StopIteration, IndexError, ValueError):
        return ""
    return ", ".join(f"{label}={found[label]}" for label in _NAMES.values() if label in found)


def _name(body: bytes) -> Iterator[tuple[str, str]]:
    for group in _items(body):
        for pair in _items(group.body):
            kind, value = list(_items(pair.body))[:2]
            if kind.body in _NAMES:
                text = value.body.decode("utf-16-be" if value.tag == _UTF16 else "utf-8", "replace")
                yield _NAMES[kind.body], "".join(c if c.isprintable() else "?" for c in text[:200])


def _items(data: bytes) -> Iterator[_Item]:
    """The elements one behind the other in *data*. ValueError for what is cut off."""
    at = 0
    while at < len(data):
        if at + 2 > len(data):
            raise ValueError("cut off")
        tag, length = data[at], data[at + 1]
        at += 2
        if length & 0x80:
            count = length & 0x7F
            length = int.from_bytes(data[at : at + count], "big")
            at += count
        if at + length > len(data):
            raise ValueError("cut off")
        yield _Item(tag, data[at : at + length])
        at += length
