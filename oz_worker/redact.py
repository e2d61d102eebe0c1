"""Secrets that mask themselves, and taking known secret values out of text."""

from __future__ import annotations

import base64
import json
import re
import urllib.parse
from typing import Any, Iterable

MASK = "***"
SHORTEST = 6
"""Shorter values are not masked: `1`, `true` or `main` would blank out ordinary text."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>]+")
_AROUND = "\"';,"
_PUBLIC = frozenset(
    (
        *("command", "docker", "python", "python3", "localhost", "server", "servers", "plugin", "plugins", "public"),
        *("events", "message", "messages", "stream", "streamable", "streamable-http", "streamable_http", "github"),
        *("accept", "content-type", "application/json", "text/event-stream", "Bearer", "bearer"),
    )
)
"""Words of MCP configurations that are nobody's secret; masking them would blank out ordinary output."""


_USER_INFO = re.compile(
    r"(?:(?<=://)[^\s\"'<>]*|(?<![\w./:@-])[^\s/@:\"'<>]+:(?!//)[^\s\"'<>]+)@(?![\w+.-]+:[0-9a-f]{32})"
)
_QUERY = re.compile(r"(://[^\s\"'<>?]*\?)[^\s\"'<>]+")


def without_credentials(text: str) -> str:
    """*text* with what may let somebody in taken out of its URLs: users with passwords, signed queries.

    Also out of what people write in the place of an image (`user:password@registry/image`); `image@sha256:...` stays.
    """
    return _QUERY.sub(rf"\1{MASK}", _USER_INFO.sub(f"{MASK}@", text))


class Secret:
    """A value that shows only when asked by `reveal()`; `str`, `repr` and formatting give the mask."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The value itself, for the one place that needs it."""
        return self._value

    def __str__(self) -> str:
        return MASK if self._value else ""

    __repr__ = __str__

    def __bool__(self) -> bool:
        return bool(self._value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)


class Redactor:
    """Replaces every known secret in text, plain and in the usual encodings. Immutable, safe from any thread."""

    def __init__(self, secrets: Iterable[str]) -> None:
        forms = {form for secret in secrets for form in _forms(secret)}
        self.longest = max((len(form) for form in forms), default=0)
        self._forms = tuple(forms)

    def __call__(self, text: str) -> str:
        """*text* with every secret masked."""
        return self._mask(text, self.spans(text))

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where secrets stand in *text*; those that overlap or touch are one span.

        One search for each form, because that is many times faster than one pattern for all of them.
        """
        found: list[tuple[int, int]] = []
        for form in self._forms:
            start = text.find(form)
            while start >= 0:
                found.append((start, start + len(form)))
                start = text.find(form, start + 1)
        merged: list[tuple[int, int]] = []
        for start, end in sorted(found):
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((start, end))
        return merged

    def open_end(self, text: str) -> int:
        """Where in *text* a secret may have begun that is not complete yet; its length when none has."""
        first = len(text)
        for form in self._forms:
            place = text.find(form[0], max(0, len(text) - len(form) + 1), first)
            while place >= 0:
                if form.startswith(text[place:]):
                    first = place
                    break
                place = text.find(form[0], place + 1, first)
        return first

    def _mask(self, text: str, spans: list[tuple[int, int]]) -> str:
        parts, position = [], 0
        for start, end in spans:
            parts += [text[position:start], MASK]
            position = end
        return "".join((*parts, text[position:]))


class RedactedStream:
    """Redacts a text that arrives in pieces: a secret split over any two of them is masked all the same.

    Not safe for concurrent use. Holds back only what may be the beginning of a secret.
    """

    def __init__(self, redactor: Redactor) -> None:
        self._redactor = redactor
        self._pending = ""

    def feed(self, text: str) -> str:
        """What of the text so far can be shown: whatever no secret that is still arriving can reach."""
        self._pending += text
        cut = self._redactor.open_end(self._pending)
        for start, end in self._redactor.spans(self._pending):
            if start < cut < end:
                cut = start
        # A secret that begins before the cut is complete in what is pending, so it was seen above.
        done, self._pending = self._pending[:cut], self._pending[cut:]
        return self._redactor(done)

    def flush(self) -> str:
        """The rest."""
        done, self._pending = self._pending, ""
        return self._redactor(done)


def held_in(document: Any) -> tuple[str, ...]:
    """What a JSON document of unknown make (that of MCP servers) may hold as secrets: any text in it can be one.

    All texts of it, not the keys; and the parts of them that programs print alone: the last word (`Bearer TOKEN`), what
    stands behind the `=` or `:` of `--token=TOKEN` and `X-Key:TOKEN`, and of a URL its user, its password, each step of
    its path and each value of its query.
    """
    found: dict[str, None] = {}
    pending = [document]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list):
            pending += value
        elif isinstance(value, str):
            found.update(dict.fromkeys((value, *_parts(value))))
    return tuple(text for text in found if len(text) >= SHORTEST and text not in _PUBLIC)


def _parts(text: str) -> Iterable[str]:
    """Those parts of a text that may be secrets of their own."""
    words = text.split()
    for word in words[-1:]:
        yield from (word, word.strip(_AROUND))
    for word in words:
        if "://" not in word.partition("=")[0]:
            for mark in "=:":
                yield word.partition(mark)[2].strip(_AROUND)
    for url in _URL.findall(text):
        yield url
        rest = url.partition("://")[2]
        # By hand: urllib refuses some URLs that programs take.
        before, _, fragment = rest.partition("#")
        before, _, query = before.partition("?")
        authority, *steps = before.split("/")
        user_info = authority.rpartition("@")[0]
        parts = [user_info, *user_info.split(":", 1), *steps]
        for pair in re.split("[&;]", f"{query}&{fragment}"):
            parts += [pair.partition("=")[2] or pair]
        for part in parts:
            yield from (part, urllib.parse.unquote(part))


def _forms(secret: str) -> Iterable[str]:
    """The spellings under which a secret shows up in output; a multi-line one also line by line."""
    for part in {secret, *secret.splitlines()}:
        if len(part.strip()) < SHORTEST:
            continue
        raw = part.encode("utf-8", "surrogateescape")
        yield part
        yield urllib.parse.quote(raw, safe="")
        yield urllib.parse.quote(raw)  # as a path: slashes stay
        yield urllib.parse.quote_plus(raw)
        yield json.dumps(part)[1:-1]
        yield json.dumps(part, ensure_ascii=False)[1:-1]
        # Base64 of a secret inside a longer text starts at one of three offsets; the ends depend on neighbours.
        for offset in range(3):
            encoded = base64.b64encode(b"\0" * offset + raw).decode()
            inner = encoded[{0: 0, 1: 2, 2: 3}[offset] : len(encoded) - (4 if encoded.endswith("=") else 0)]
            if len(inner) >= 8:
                yield inner
                yield inner.replace("+", "-").replace("/", "_")
