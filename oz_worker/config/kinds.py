"""Kinds of values: a function from a node to a value, raising `Wrong` with a sentence that says what to write instead.

The same kinds serve the file and the flags (a flag's text is a `Scalar` whose place is the flag). A kind is never
called with nothing (`key:` or `key: null`), which counts as absent everywhere, as it did in the existing worker.
"""

from __future__ import annotations

import math
import re
from typing import Any, Callable, Mapping
from urllib.parse import urlsplit

from oz_worker.config.nodes import Items, Node, Scalar, Table, describe
from oz_worker.config.reading import Reading, Wrong, listed, shown, suggest
from oz_worker.timing import parse_duration

Kind = Callable[[Node, Reading], Any]

LONGEST_SECONDS = 100 * 365 * 86400.0
LARGEST_NUMBER = 2**31 - 1
_SIZES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_SIZES |= {f"{letter}i{end}": 1024**power for power, letter in enumerate("kmgt", 1) for end in ("", "b")}
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_GO_PART = re.compile(r"(\d+\.?\d*|\.\d+)(ns|us|µs|μs|ms|s|m|h)")
_GO_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_HUMANTIME_UNIT = (
    r"(?:nsec|ns|usec|us|msec|ms|milliseconds?|seconds?|secs?|s|minutes?|mins?|m|hours?|hrs?|h|days?|d|weeks?|wk|w"
    r"|months?|M|years?|yr|y)"
)
_HUMANTIME = re.compile(rf"0|\s*(?:\d+\s*{_HUMANTIME_UNIT}\s*)+")


def names(text: str) -> frozenset[str]:
    """The words of *text*."""
    return frozenset(text.split())


def scalar(node: Node) -> Scalar:
    """*node* as a single value."""
    if not isinstance(node, Scalar):
        raise Wrong(f"expected a single value, got {describe(node)}")
    return node


def script(node: Node, _reading: Reading) -> str:
    """Text of any length and lines for a shell. Numbers, dates and yes/no are taken as their text."""
    text = scalar(node).text
    if "\0" in text or re.search("[\ud800-\udfff]", text):
        raise Wrong("contains a character that no program can be given (NUL or broken UTF-8); remove it")
    return text


def word(node: Node, _reading: Reading) -> str:
    """One line of text without control characters."""
    text = scalar(node).text
    found = _CONTROL.search(text)
    if found:
        raise Wrong(f"contains the control character U+{ord(found[0]):04X}; remove it")
    return text


def matching(pattern: str, example: str) -> Kind:
    """Text that matches *pattern* whole; empty means not set."""
    compiled = re.compile(pattern)

    def kind(node: Node, reading: Reading) -> str:
        text = word(node, reading)
        if text and not compiled.fullmatch(text):
            raise Wrong(f"{shown(text)} is not of the form {example}")
        return text

    return kind


def boolean(node: Node, reading: Reading) -> bool:
    """true or false; yes/no and on/off with a warning."""
    value = scalar(node)
    text = value.text.lower()
    if value.type == "bool":
        return text == "true"
    if text in ("y", "yes", "on", "n", "no", "off") and value.type == "str":
        answer = text in ("y", "yes", "on")
        reading.warn(value.place, f"{shown(value.text)} is read as {str(answer).lower()}; write true or false")
        return answer
    raise Wrong(f"expected true or false, got {shown(value.text)}")


def whole(least: int = 0, most: int = LARGEST_NUMBER) -> Kind:
    """A whole number within bounds."""

    def kind(node: Node, reading: Reading) -> int:
        value = scalar(node)
        number = _number(value, reading)
        if not least <= number <= most:
            raise Wrong(f"{shown(value.text)} is out of range; write a number from {least} to {most}")
        return number

    return kind


def limit(node: Node, reading: Reading) -> int:
    """A limit: 0 is unlimited; so are negative numbers, with a warning."""
    value = scalar(node)
    number = _number(value, reading)
    if number > LARGEST_NUMBER:
        raise Wrong(f"{shown(value.text)} is out of range; write 0 for unlimited")
    if number < 0:
        reading.warn(value.place, f"{number} is read as unlimited; write 0 if that is meant")
    return max(0, number)


def _number(value: Scalar, reading: Reading) -> int:
    if value.type not in ("int", "float"):
        in_quotes = value.type == "str" and re.fullmatch(r"[-+]?\d+", value.text)
        cure = "take the quotes away" if in_quotes else "write it like 4"
        raise Wrong(f"expected a whole number, got {shown(value.text)}; {cure}")
    text = value.text.replace("_", "")
    try:
        if value.type == "float":
            number = int(float(text))
        elif re.fullmatch(r"[-+]?0[0-9]+", text):
            number = int(text, 8)  # YAML 1.1 and the existing worker read a leading zero so
        else:
            number = int(text, 0)
    except (ValueError, OverflowError):
        raise Wrong(f"expected a whole number, got {shown(value.text)}; write it like 4") from None
    if not re.fullmatch(r"[-+]?(0|[1-9][0-9]*)", value.text):
        reading.warn(value.place, f"{shown(value.text)} is read as {number}; write it so if that is meant")
    return number


def duration(node: Node, _reading: Reading) -> float:
    """Seconds of `45m`, `1h30m`, `90s`; 0 is off."""
    value = scalar(node)
    text = value.text.strip()
    if text.startswith("-"):
        raise Wrong(f"{shown(text)} is negative; write 0s to turn it off")
    try:
        seconds = parse_duration(text)
    except ValueError:
        if value.type in ("int", "float"):
            raise Wrong(f"{shown(text)} has no unit; write {text}s for seconds, {text}m for minutes") from None
        raise Wrong(f"{shown(text)} is not a duration; write it like 90s, 45m, 1h30m or 500ms") from None
    return _bounded(seconds, text)


def positive_duration(node: Node, reading: Reading) -> float:
    """A duration that cannot be turned off."""
    seconds = duration(node, reading)
    if seconds <= 0:
        raise Wrong("must be longer than 0s")
    return seconds


def go_duration(node: Node, reading: Reading) -> float:
    """A duration of the existing worker: also with a sign and ns or us; zero and below is 0.0."""
    text = scalar(node).text.strip()
    rest = text.lstrip("+-") if text[:1] in "+-" else text
    parts = list(_GO_PART.finditer(rest))
    if rest and "".join(part[0] for part in parts) == rest:
        seconds = _bounded(sum(float(part[1]) * _GO_UNITS[part[2]] for part in parts), text)
        return 0.0 if text.startswith("-") else seconds
    return 0.0 if text in ("-0", "+0") else duration(node, reading)


def dispatch_timeout(node: Node, reading: Reading) -> float:
    """Zero and below mean 60 s, as in the existing worker."""
    return go_duration(node, reading) or 60.0


def _bounded(seconds: float, text: str) -> float:
    if not math.isfinite(seconds) or seconds > LONGEST_SECONDS:
        raise Wrong(f"{shown(text)} is more than a hundred years; write 0s to turn it off")
    return seconds


def humantime(node: Node, reading: Reading) -> str:
    """A duration that is handed to oz as it is; a warning where oz would refuse it."""
    value = scalar(node)
    text = word(node, reading)
    if text and not _HUMANTIME.fullmatch(text):
        reading.warn(value.place, f"oz will refuse {shown(text)}; write it like 45m, 1h30m or 0s (no fractions)")
    return text


def size(node: Node, _reading: Reading) -> int:
    """Bytes of `64MiB`, `1GB`, or a number of bytes; 0 is unlimited."""
    text = scalar(node).text.strip()
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    factor = _SIZES.get(parts[2].lower()) if parts else None
    if parts is None or factor is None:
        raise Wrong(f"{shown(text)} is not a size; write it like 64MiB, 2GiB or 0")
    number = float(parts[1]) * factor
    if number > 2**62:
        raise Wrong(f"{shown(text)} is larger than any disk; write 0 for unlimited")
    return int(parts[1]) * factor if parts[1].isdigit() else int(number)


def choice(*names: str, spellings: Mapping[str, str] | None = None) -> Kind:
    """One of *names*, or one of *spellings*, which stand for one of them."""
    others = spellings or {}

    def kind(node: Node, _reading: Reading) -> str:
        text = scalar(node).text
        if text in names:
            return text
        if text in others:
            return others[text]
        raise Wrong(f"expected {listed(names)}, got {shown(text)}{suggest(text, names)}")

    return kind


def path(node: Node, reading: Reading) -> str:
    """An absolute path; `~` and relative ones are resolved; empty means not set."""
    text = word(node, reading)
    return reading.path(text) if text else ""


def directory(node: Node, reading: Reading) -> str:
    """A directory of its own: not `/`."""
    found = path(node, reading)
    if found == "/":
        raise Wrong("must be a directory of its own, not /")
    return found


def program(node: Node, reading: Reading) -> str:
    """A program: a bare name is looked up on PATH when it is used, anything with a slash is a path."""
    text = word(node, reading)
    return path(node, reading) if "/" in text or text.startswith("~") else text


def worker_id(node: Node, reading: Reading) -> str:
    """What runs are routed by, exactly."""
    text = word(node, reading)
    if text.startswith("warp"):
        raise Wrong(f"{shown(text)} begins with `warp`, which is reserved; choose another worker_id")
    if len(text) > 256:
        raise Wrong("is longer than 256 characters; choose a shorter worker_id")
    if text != text.strip():
        reading.warn(node.place, "the worker_id begins or ends with a space; runs must be routed to exactly that")
    return text


def url(*schemes: str) -> Kind:
    """An address with one of *schemes* and without a user in it; any scheme when none is named."""

    def kind(node: Node, reading: Reading) -> str:
        text = word(node, reading).strip()
        if not text:
            return ""
        wanted = listed(f"{scheme}://" for scheme in schemes) if schemes else "https://"
        try:
            parts = urlsplit(text)
            port_fits = parts.port is None or parts.port > 0
        except ValueError:
            raise Wrong(f"is not an address; write it like {wanted}host/path") from None
        if (schemes and parts.scheme not in schemes) or not parts.scheme or not parts.hostname or not port_fits:
            raise Wrong(f"is not an address that begins with {wanted} and names a host")
        if " " in text:
            raise Wrong("contains a space; write %20 or remove it")
        if "@" in parts.netloc:
            raise Wrong("contains a user or a password; remove it, the worker signs in with its API key")
        return text

    return kind


def listen(node: Node, reading: Reading) -> str:
    """`host:port` to listen on; empty is off."""
    text = word(node, reading).strip()
    parts = re.fullmatch(r"(\[[0-9A-Fa-f:.%\w]+\]|[^\s:/\[\]]*):(\d{1,5})", text)
    if text and (parts is None or int(parts[2]) > 65535):
        raise Wrong(f"{shown(text)} is not host:port; write it like 127.0.0.1:8080 or 0.0.0.0:8080")
    return text


def list_of(kind: Kind) -> Kind:
    """A list, each item of *kind*; every wrong item is told."""

    def read(node: Node, reading: Reading) -> tuple[Any, ...]:
        if not isinstance(node, Items):
            raise Wrong(f"expected a list (lines that begin with `- `), got {describe(node)}")
        values = []
        for item in node.values:
            try:
                if isinstance(item, Scalar) and (item.type == "null" or not item.text.strip()):
                    raise Wrong("the entry is empty; fill it in or remove the line")
                values.append(kind(item, reading))
            except Wrong as error:
                reading.problem(error.place or item.place, str(error))
        return tuple(values)

    return read


def map_of(kind: Kind, key: Kind = word, *, empty: bool = True) -> Kind:
    """A mapping from *key* to *kind*; every wrong entry is told. Without *empty*, entries with no value are dropped."""

    def read(node: Node, reading: Reading) -> dict[str, Any]:
        if not isinstance(node, Table):
            raise Wrong(f"expected a mapping (lines like `name: value`), got {describe(node)}")
        values = {}
        for name, entry in node.entries.items():
            try:
                checked = key(Scalar(entry.place, name), reading)
                if not checked:
                    raise Wrong("the name before the colon is empty", entry.place)
                value = entry.value
                if isinstance(value, Scalar) and value.type == "null":
                    value = Scalar(value.place, "")
                if not empty and isinstance(value, Scalar) and not value.text:
                    reading.warn(entry.place, f"{shown(name)} has no value and is ignored")
                    continue
                values[checked] = kind(value, reading)
            except Wrong as error:
                reading.problem(error.place or entry.place, str(error))
        return values

    return read
