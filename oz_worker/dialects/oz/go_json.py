"""Writing JSON as Go's encoder does, to the letter, and finding values in JSON text.

The existing worker keeps every MCP server as it came (a raw value) and lets Go write the object around them. So the
bytes behind `--mcp` are: no blanks, top-level keys sorted and escaped anew, everything below as it stood in the
source - numbers, order and escapes - with only `<`, `>`, `&`, U+2028 and U+2029 escaped where they stood unescaped.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, Mapping

_SPACE = re.compile(r"[ \t\n\r]*")
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[ \t\n\r]+|NaN|-?Infinity')
_HTML = re.compile("[<>&\u2028\u2029]")
_ESCAPED = re.compile('[\x00-\x1f"\\\\<>&\u2028\u2029]')
_SURROGATE = re.compile("[\ud800-\udfff]")
_SHORT = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def _integer(text: str) -> int | None:
    # Below the limit of digits at which int() raises; without that limit a long one would take minutes.
    return int(text) if len(text) <= 400 else None


def _real(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def _constant(_: str) -> None:
    """NaN and Infinity are no JSON, but no reason to lose an assignment either: they read as null."""


DECODER = json.JSONDecoder(parse_int=_integer, parse_float=_real, parse_constant=_constant)
"""Decodes to values that can be encoded again: a number that none can hold becomes null."""


def scrub(text: str) -> str:
    """*text* with each lone surrogate replaced by U+FFFD, as Go does when it decodes."""
    return _SURROGATE.sub("\ufffd", text)


def has_surrogate(text: str) -> bool:
    """Whether *text* is no valid Unicode and can be neither an argument nor a variable."""
    return _SURROGATE.search(text) is not None


def quote(text: str) -> str:
    """*text* as Go's encoder writes a string."""
    return '"' + _ESCAPED.sub(_escape, scrub(text)) + '"'


def compact(raw: str) -> str:
    """A raw JSON value as Go's encoder writes it; ValueError for NaN and Infinity, which no JSON reader takes."""
    return _HTML.sub(_escape, _TOKEN.sub(_without_blanks, raw))


def raw_object(text: str, at: int) -> str:
    """The object at *at* of *text* as Go writes a map of raw values: keys sorted, values compacted."""
    values = {scrub(key): text[start:end] for key, (start, end) in spans(text, at).items()}
    return "{" + ",".join(f"{quote(key)}:{compact(values[key])}" for key in sorted(values)) + "}"


def spans(text: str, at: int = 0) -> dict[str, tuple[int, int]]:
    """Where the values of the object that begins at *at* stand. *text* must be known to decode."""
    found: dict[str, tuple[int, int]] = {}
    at = _skip(text, _skip(text, at) + 1)
    while text[at] != "}":
        key, at = DECODER.raw_decode(text, at)
        start = _skip(text, _skip(text, at) + 1)
        _, end = DECODER.raw_decode(text, start)
        found[key] = (start, end)
        at = _skip(text, end)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return found


def member(mapping: Mapping[str, Any], name: str) -> Any:
    """The value of field *name*: the exact spelling, else the last one that differs only in case; None if absent."""
    if name in mapping:
        return mapping[name]
    key = folded(mapping).get(name.casefold())
    return None if key is None else mapping[key]


def folded(mapping: Mapping[str, Any]) -> dict[str, str]:
    """The last key for each spelling without case. Go folds letter by letter: a ligature equals nothing longer."""
    return {key.casefold(): key for key in mapping if len(key.casefold()) == len(key)}


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None  # the pattern matches the empty string
    return match.end()


def _escape(match: re.Match[str]) -> str:
    return _SHORT.get(match[0]) or f"\\u{ord(match[0]):04x}"


def _without_blanks(match: re.Match[str]) -> str:
    token = match[0]
    if token[0] == '"':
        return token
    if token.isspace():
        return ""
    raise ValueError(f"{token} is no JSON")
