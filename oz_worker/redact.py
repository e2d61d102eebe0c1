"""Secrets that mask themselves, and taking known secret values out of text."""

from __future__ import annotations

import bisect
import re
import sys
import threading
import urllib.parse
from typing import Any, Iterable, Iterator

from oz_worker.ordinary import is_ordinary
from oz_worker.spellings import SHORTEST, bare, encoded, spellings

MASK = "***"
PIECE = 256
"""Longer spellings are looked for in pieces of so many bytes; the last one may be up to three longer."""
_LONGEST = PIECE + 3
HELD = 1024
"""The most that a stream holds back, and the most line breaks that one piece may be torn apart by."""

_FOR_EVERY_FOURTH = 7
"""A piece of so many bytes holds, wherever it stands, a group of four that begins at a multiple of four."""
_A_BREAK = re.compile(rb"[\r\n]")

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>]+")
_AROUND = "\"';,"
_PUBLIC = frozenset(
    (
        *("command", "docker", "python", "python3", "localhost", "server", "servers", "plugin", "plugins", "public"),
        *("events", "message", "messages", "stream", "streamable", "streamable-http", "streamable_http", "github"),
        *("accept", "content-type", "application/json", "text/event-stream", "bearer"),
    )
)
"""Words of MCP configurations that are nobody's secret, in small letters, because what is masked is masked in any case;
masking them would blank out ordinary output."""


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
    """Replaces every known secret in text: plain, and in the spellings of `oz_worker.spellings`. Safe from any thread.

    Line breaks and capital letters do not count: a secret that is wrapped over lines, has lines of its own, or whose
    escapes are partly in capitals, is found all the same.

    How: long spellings are cut into pieces of 256 bytes, each of which is looked for by itself (so a part of a long
    secret is masked too, and nothing ever has to wait for more than 256 bytes). Of each piece four groups of four
    bytes are in a table, at offsets that follow each other. Whatever holds the piece holds one of these groups at a
    multiple of four, so it is enough to look up every fourth place of the text, and to compare where there is a hit:
    the time does not depend on the number of secrets, and grows with the length of the text only.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._lock = threading.Lock()  # guards changes; readers see each single step of one, which is enough
        self._pieces: dict[bytes, int] = {}  # how many secrets have each
        self._table: dict[int, tuple[tuple[int, int], ...]] = {}  # group -> offsets in pieces, lengths of the pieces
        self._step = 4  # 2 once there is a piece of six bytes: too short for a group at every fourth place
        self._outdated = 0  # pieces that are gone, and still in the table
        self._ends: tuple[list[bytes], list[bytes]] | None = None  # pieces in order; the same of the reversed ones
        self.add(secrets)

    def add(self, secrets: Iterable[str]) -> None:
        """Know these too. What is added twice must be removed twice."""
        pieces = list(_pieces_of(secrets))
        with self._lock:
            for piece in pieces:
                self._pieces[piece] = self._pieces.get(piece, 0) + 1
                if self._pieces[piece] == 1:
                    self._enter(self._table, piece)
            self._ends = None

    def remove(self, secrets: Iterable[str]) -> None:
        """Forget these, which were added."""
        pieces = list(_pieces_of(secrets))
        with self._lock:
            for piece in pieces:
                self._pieces[piece] -= 1
                if not self._pieces[piece]:
                    del self._pieces[piece]
                    self._outdated += 1
            self._ends = None
            if self._outdated > len(self._pieces) + 1000:
                fresh: dict[int, tuple[tuple[int, int], ...]] = {}
                for piece in self._pieces:
                    self._enter(fresh, piece)
                self._table, self._outdated = fresh, 0

    def __call__(self, text: str) -> str:
        """*text* with every secret masked; the very same text when there is none."""
        data = encoded(text)
        masked = self.masked(data)
        return text if masked is data else masked.decode("utf-8", "surrogateescape")

    def masked(self, data: bytes) -> bytes:
        """The same for bytes."""
        spans = self.spans(data)
        return _mask(data, spans, 0, len(data)) if spans else data

    def spans(self, data: bytes) -> list[tuple[int, int]]:
        """Where secrets stand in *data*; those that overlap or touch are one span."""
        squeezed = bare(data)
        found = self._found(squeezed)
        if found and len(squeezed) != len(data):
            place = _Places(data)
            found = [(place(start), place(end - 1) + 1) for start, end in found]
        return _merged(found)

    def open_end(self, data: bytes) -> int:
        """Where in the last KiB of *data* a secret may have begun that is not complete yet; its length if nowhere.

        A line that ends with less than six characters of one is complete: nearly every line does by accident.
        """
        window = data[-HELD:]
        squeezed = bare(window)
        count = _overlap(self._ordered()[0], squeezed[-_LONGEST + 1 :])
        if not count or (count < SHORTEST and window.endswith((b"\n", b"\r"))):
            return len(data)
        return len(data) - len(window) + _Places(window)(len(squeezed) - count)

    def torn_start(self, data: bytes) -> int:
        """How many bytes at the beginning of *data*, which was cut off there, may be the end of a secret."""
        window = data[:HELD]
        squeezed = bare(window)
        count = _overlap(self._ordered()[1], squeezed[: _LONGEST - 1][::-1])
        return _Places(window)(count - 1) + 1 if count >= SHORTEST else 0

    def _enter(self, table: dict[int, tuple[tuple[int, int], ...]], piece: bytes) -> None:
        size = len(piece)
        if size < _FOR_EVERY_FOURTH:
            self._step = 2
        middle = max(0, size - _FOR_EVERY_FOURTH) // 2  # beginnings are often the same
        for offset in range(middle, min(middle + 4, size - 3)):
            group = int.from_bytes(piece[offset : offset + 4], sys.byteorder)
            places = table.get(group, ())
            if (offset, size) not in places:
                longest_first = list(places)
                bisect.insort(longest_first, (offset, size), key=lambda place: -place[1])
                table[group] = tuple(longest_first)

    def _found(self, data: bytes) -> list[tuple[int, int]]:
        table, pieces, found = self._table, self._pieces, []
        for first in range(0, 4, self._step):
            groups = memoryview(data)[first : first + max(0, len(data) - first) // 4 * 4].cast("I")
            if table.keys().isdisjoint(groups):
                continue
            low = high = 0  # all between is found already: not looked at once more for each shorter piece of one byte
            for hit in [index for index, group in enumerate(groups) if group in table]:
                for offset, size in table.get(groups[hit], ()):
                    start = first + 4 * hit - offset
                    end = start + size
                    if start < 0 or (low <= start and end <= high) or data[start:end] not in pieces:
                        continue
                    found.append((start, end))
                    low, high = (min(low, start), max(high, end)) if start <= high and low <= end else (start, end)
        return found

    def _ordered(self) -> tuple[list[bytes], list[bytes]]:
        with self._lock:
            if self._ends is None:
                self._ends = sorted(self._pieces), sorted(piece[::-1] for piece in self._pieces)
            return self._ends


class RedactedStream:
    """Redacts output that arrives in pieces: a secret split over any of them is masked all the same.

    Not safe for concurrent use. Holds back only what may be the beginning of a secret, at most a KiB. *torn*: what
    comes first was cut off in front, perhaps in the middle of a secret. *between_lines*: if it was, then not in a line.
    """

    def __init__(self, redactor: Redactor, *, torn: bool = False, between_lines: bool = False) -> None:
        self._redactor = redactor
        self._torn = torn
        self._between_lines = between_lines
        self._shown = b""  # the last KiB of what was given out, before masking
        self._pending = b""
        self._ends_masked = False

    def feed(self, data: bytes) -> bytes:
        """What of the output so far can be shown: whatever no secret that is still arriving can reach."""
        self._pending += data
        if self._torn and len(self._pending) < 2 * HELD:  # so that the torn part is given out as one
            return b""
        return self._show(self._redactor.open_end(self._pending))

    def flush(self, *, torn: bool = False) -> bytes:
        """The rest. *torn*: it was cut off there, so what may be the beginning of a secret is masked too."""
        return self._show(len(self._pending), self._redactor.open_end(self._pending) if torn else -1)

    def _show(self, cut: int, open_end: int = -1) -> bytes:
        data, begin = self._shown + self._pending, len(self._shown)
        end = begin + cut
        spans = self._redactor.spans(data)
        if self._torn:
            torn = self._redactor.torn_start(data)
            if (
                spans and spans[0][0] < SHORTEST and not self._between_lines
            ):  # what is left of a piece before a whole one
                torn = max(torn, spans[0][0])
            spans = _merged([(0, torn), *spans]) if torn else spans
        self._torn = False
        if 0 <= open_end < cut:
            spans = _merged([*spans, (begin + open_end, end)])
        text = _mask(data, spans, begin, end, self._ends_masked)
        if cut:
            self._ends_masked = any(start < end <= stop for start, stop in spans)
        self._shown, self._pending = data[max(0, end - HELD) : end], data[end:]
        return text


class _Places:
    """From a place in a text without its line breaks to the place in the text."""

    def __init__(self, data: bytes) -> None:
        self._before = [found.start() - count for count, found in enumerate(_A_BREAK.finditer(data))]

    def __call__(self, place: int) -> int:
        return place + bisect.bisect_right(self._before, place)


def _pieces_of(secrets: Iterable[str]) -> Iterator[bytes]:
    for secret in set(secrets):
        for form in spellings(secret):
            yield from _cut(form)


def _cut(form: bytes) -> set[bytes]:
    """*form* in pieces of at most 256 bytes that cover it, none of them beginning within a character."""
    found, start = set(), 0
    while len(form) - start > _LONGEST:
        found.add(form[start : start + PIECE])
        start = _begin_of_character(form, min(start + PIECE, len(form) - PIECE))
    return found | {form[start:]}


def _begin_of_character(data: bytes, place: int) -> int:
    return next((place - back for back in range(3) if data[place - back] & 0xC0 != 0x80), place - 3)


def _merged(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _overlap(ordered: list[bytes], text: bytes) -> int:
    """How many bytes, at the most, of the end of *text* are the beginning of a piece, and not the whole of it."""
    for count in range(len(text), 0, -1):
        end = text[-count:]
        place = bisect.bisect_left(ordered, end)
        if any(piece.startswith(end) and len(piece) > count for piece in ordered[place : place + 2]):
            return count
    return 0


def _mask(data: bytes, spans: list[tuple[int, int]], begin: int, end: int, masked: bool = False) -> bytes:
    """*data* from *begin* to *end*. *masked*: what stands before has its mask; a span that goes on has it too."""
    parts, position = [], begin
    for start, stop in spans:
        start, stop = max(start, begin), min(stop, end)
        if start < stop:
            parts.append(data[position:start])
            if not (masked and start == begin):
                parts.append(MASK.encode())
            position = stop
    return b"".join((*parts, data[position:end]))


def held_in(document: Any) -> tuple[str, ...]:
    """What a JSON document of unknown make (that of MCP servers) may hold as secrets: any text in it can be one.

    All texts of it but words like `production` (`oz_worker.ordinary`), not the keys; and the parts of them that
    programs print alone: the last word (`Bearer TOKEN`), what stands behind the `=` or `:` of `--token=TOKEN` and
    `X-Key:TOKEN`, and of a URL its user, its password, each step of its path and each value of its query.
    """
    found: dict[str, None] = {}
    pending = [("", document)]
    while pending:
        name, value = pending.pop()
        if isinstance(value, dict):
            pending += value.items()
        elif isinstance(value, list):
            pending += [("key", one) for one in value]  # an argument without a name may be a key
        elif isinstance(value, str) and not is_ordinary(str(name), value):
            found.update(dict.fromkeys((value, *_parts(value))))
    return tuple(text for text in found if len(text) >= SHORTEST and text.lower() not in _PUBLIC)


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
