"""YAML text to a tree that remembers where everything stands; refuses what could hurt or was not meant.

`yaml.compose` and an own walk, not `safe_load`: every mistake found later, also one of meaning, has its line and
column. Scalars keep their source text and the type that a plain reading gives them; the schema decides what a field
accepts. The pure Python loader on purpose: the C one kills the process on deep nesting.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple, Union

import yaml

from oz_worker.config.reading import Reading

LARGEST = 1024 * 1024
DEEPEST = 40
MOST_NODES = 20_000

_PLAIN = "plain"
_CORE = "tag:yaml.org,2002:"
_TYPES = (
    ("null", re.compile(r"~|null|Null|NULL|")),
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE")),
    ("int", re.compile(r"[-+]?(0b[01_]+|0o[0-7_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*)")),
    ("float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")),
)


class Scalar(NamedTuple):
    """A single value: its source text, and `type` str, int, float, bool or null."""

    place: str
    text: str
    type: str = "str"


class Items(NamedTuple):
    """A list."""

    place: str
    values: tuple[Any, ...]


class Entry(NamedTuple):
    """A value in a mapping and the place of its key."""

    place: str
    value: Any


class Table(NamedTuple):
    """A mapping; keys are text, in the order of the file."""

    place: str
    entries: dict[str, Entry]


Node = Union[Scalar, Items, Table]


def plain_type(text: str) -> str:
    """The type that *text* has when it stands without quotes: str, int, float, bool or null."""
    return next((name for name, pattern in _TYPES if pattern.fullmatch(text)), "str")


def describe(node: Node) -> str:
    """What *node* is, for a sentence, without its content."""
    if isinstance(node, Table):
        return "a mapping"
    if isinstance(node, Items):
        return "a list"
    names = {"null": "nothing", "bool": "true/false", "int": "a whole number", "float": "a number", "str": "text"}
    return names[node.type]


def parse(data: bytes, file: str, reading: Reading) -> Table | None:
    """The mapping of the first document in *data*, or None after noting in *reading* why there is none."""
    if len(data) > LARGEST:
        reading.problem(file, "is larger than 1 MiB; no configuration is: is it the right file?")
        return None
    try:
        text = _decode(data)
    except UnicodeDecodeError as error:
        # The second half of a UTF-16 file has no line; its start is as good a place.
        before = data[: error.start].decode("utf-8", "replace")
        reading.problem(_at(file, before), "is not UTF-8 from here on; save the file as UTF-8")
        return None
    try:
        return _Walk(file, reading).root(text)
    except _Refused as error:
        reading.problem(error.place, error.sentence)
    except yaml.reader.ReaderError as error:
        character = text[error.position] if error.position < len(text) else "\0"
        reading.problem(
            _at(file, text[: error.position]), f"has the control character U+{ord(character):04X}; remove it"
        )
    except yaml.MarkedYAMLError as error:
        reading.problem(*_syntax(file, text, error))
    return None


class _Refused(Exception):
    def __init__(self, place: str, sentence: str) -> None:
        super().__init__(sentence)
        self.place = place
        self.sentence = sentence


class _TooMuch(yaml.MarkedYAMLError):
    """Beyond a bound; its problem is a sentence."""


def _decode(data: bytes) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16")
    return data.decode("utf-8-sig")


def _at(file: str, before: str) -> str:
    """The place right behind *before*."""
    lines = before.split("\n")
    return f"{file}:{len(lines)}:{len(lines[-1]) + 1}"


def _syntax(file: str, text: str, error: yaml.MarkedYAMLError) -> tuple[str, str]:
    mark = error.problem_mark or error.context_mark
    place = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else file
    if isinstance(error, _TooMuch):
        return place, str(error.problem)
    if mark and text[mark.index : mark.index + 1] == "\t":
        return place, "a tab stands where YAML wants spaces; indent with spaces"
    problem = " ".join(part for part in (error.context, error.problem) if part)
    return place, f"is not YAML: {problem}; check indentation, quotes and colons here and on the line above"


class _Loader(yaml.SafeLoader):
    """Composes nodes within bounds; types nothing (a plain scalar is tagged as such, no yes/no, no dates)."""

    depth = 0
    count = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        self.count += 1
        if self.count > MOST_NODES:
            raise _TooMuch(
                None, None, f"has more than {MOST_NODES} values; no configuration has: is it the right file?", mark
            )
        if self.depth >= DEEPEST:
            raise _TooMuch(None, None, f"is nested deeper than {DEEPEST} levels; is a bracket left open?", mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode:
            return _PLAIN if implicit[0] else _CORE + "str"
        return _CORE + ("seq" if kind is yaml.SequenceNode else "map")

    def scan_to_next_token(self) -> None:
        """Also skip tabs that do not indent: other YAML readers do, and files in use have them."""
        while True:
            super().scan_to_next_token()
            blank = 0
            while self.peek(blank) in " \t":
                blank += 1
            if blank == 0:
                return
            indents = not self.buffer[self.pointer - self.column : self.pointer].strip()
            if indents and self.peek(blank) not in "\r\n#\0":
                return
            self.forward(blank)


class _Walk:
    """Turns composed nodes into ours: expands aliases within bounds, merges `<<`, refuses doubled keys."""

    def __init__(self, file: str, reading: Reading) -> None:
        self._file = file
        self._reading = reading
        self._count = 0
        self._open: set[int] = set()  # nodes on the way down: meeting one again is a loop
        self._seen: set[int] = set()

    def root(self, text: str) -> Table | None:
        """The first document's mapping."""
        loader = _Loader(text)
        try:
            if not loader.check_node():
                self._reading.problem(self._file, "is empty; config.example.yaml shows what belongs here")
                return None
            node = loader.compose_document()
            self._look_behind(loader)
        finally:
            loader.dispose()
        tree = self._convert(node)
        if isinstance(tree, Scalar) and tree.type == "null":
            self._reading.warn(tree.place, "the file holds nothing but an empty document")
            return Table(tree.place, {})
        if not isinstance(tree, Table):
            self._reading.problem(tree.place, f"keys like `worker_id: my-worker` belong here, not {describe(tree)}")
            return None
        return tree

    def _look_behind(self, loader: _Loader) -> None:
        """Only the first document counts; what follows need not even be YAML."""
        try:
            if loader.check_event(yaml.StreamEndEvent):
                return
            mark = loader.peek_event().start_mark  # type: ignore[no-untyped-call]
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
        place = f"{self._file}:{mark.line + 1}:{mark.column + 1}" if mark else self._file
        self._reading.warn(place, "a second YAML document begins here; only the first one is read")

    def _place(self, node: Any) -> str:
        return f"{self._file}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"

    def _convert(self, node: Any) -> Node:
        place = self._place(node)
        self._count += 1
        if self._count > MOST_NODES:
            raise _Refused(place, f"aliases unfold to more than {MOST_NODES} values; write the values out")
        if len(self._open) >= DEEPEST:
            raise _Refused(place, f"nested deeper than {DEEPEST} levels by aliases; write the values out")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, place)
        if id(node) in self._open:
            raise _Refused(place, "this anchor contains an alias of itself; write the values out")
        if id(node) in self._seen:
            self._reading.warn(self._file, "uses anchors and aliases; they are accepted")
        self._seen.add(id(node))
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return Items(place, tuple(self._convert(value) for value in node.value))
            return Table(place, self._entries(node))
        finally:
            self._open.discard(id(node))

    def _scalar(self, node: yaml.ScalarNode, place: str) -> Scalar:
        tag = str(node.tag)
        if tag == _PLAIN:
            return Scalar(place, node.value, plain_type(node.value))
        name = tag.removeprefix(_CORE)
        if name not in ("str", "int", "float", "bool", "null"):
            self._reading.warn(place, f"the tag {tag} is ignored; the value is read as text")
            name = "str"
        return Scalar(place, node.value, name)

    def _entries(self, node: yaml.MappingNode) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        merged: list[Any] = []
        for key, value in node.value:
            place = self._place(key)
            if not isinstance(key, yaml.ScalarNode):
                raise _Refused(place, "a key must be a word, not a list or a mapping")
            if key.value == "<<":
                self._reading.warn(place, "`<<` merges keys from elsewhere; it is accepted")
                merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
                continue
            entry = Entry(place, self._convert(value))
            if key.value in entries:
                first = entries[key.value].place
                self._reading.problem(place, f"the key {key.value!r} stands here and at {first}; keep one of the two")
            entries.setdefault(key.value, entry)
        for source in merged:
            table = self._convert(source)
            if not isinstance(table, Table):
                raise _Refused(table.place, f"`<<` needs a mapping, not {describe(table)}")
            for name, entry in table.entries.items():
                entries.setdefault(name, entry)
        return entries
