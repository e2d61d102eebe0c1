"""Environment variables for tasks: `environment:` in the file and `-e` on the command line."""

from __future__ import annotations

import re
from typing import Sequence

from oz_worker.config.kinds import script, word
from oz_worker.config.nodes import Items, Node, Scalar, Table, describe
from oz_worker.config.reading import Reading, Wrong, shown, suggest

_SECOND_ENTRY = re.compile(r",\s*[A-Za-z_][A-Za-z0-9_]*=")


def environment(node: Node, reading: Reading) -> dict[str, str]:
    """A list of `{name, value?}`; a missing value is inherited from the worker's own environment."""
    if not isinstance(node, Items):
        raise Wrong(f"expected a list of `- name: NAME` with `value: TEXT` below it, got {describe(node)}")
    values: dict[str, str] = {}
    for item in node.values:
        try:
            name, value = _entry(item, reading)
        except Wrong as error:
            reading.problem(error.place or item.place, str(error))
            continue
        if name in values:
            reading.warn(item.place, f"{name} stands here a second time; this value counts")
        values[name] = value
    return values


def _entry(node: Node, reading: Reading) -> tuple[str, str]:
    if not isinstance(node, Table):
        raise Wrong(f"expected `- name: NAME` with `value: TEXT` below it, got {describe(node)}")
    for key, entry in node.entries.items():
        if key not in ("name", "value"):
            reading.problem(entry.place, f"unknown key {shown(key)}{suggest(key, ('name', 'value'))}")
    given = node.entries.get("name")
    if given is None or _is_nothing(given.value):
        raise Wrong("the entry has no name; write `- name: NAME`")
    name = _name(given.value, reading)
    value = node.entries.get("value")
    if value is None or _is_nothing(value.value):
        return name, _inherited(name, given.value.place, reading)
    try:
        return name, script(value.value, reading)
    except Wrong as error:
        raise Wrong(f"the value of {name} {error}", value.value.place) from None


def _is_nothing(node: Node) -> bool:
    return isinstance(node, Scalar) and node.type == "null"


def _name(node: Node, reading: Reading) -> str:
    place = node.place
    try:
        name = word(node, reading)
    except Wrong as error:
        raise Wrong(f"the name of the variable {error}", place) from None
    if not name:
        raise Wrong("the name of the variable is empty", place)
    if re.search(r"[\s=\x00-\x1f\x7f\ud800-\udfff]", name):
        raise Wrong(
            f"{shown(name)} cannot be the name of a variable; remove the space, `=` or control character", place
        )
    return name


def _inherited(name: str, place: str, reading: Reading) -> str:
    if name not in reading.environ:
        reading.warn(place, f"{name} is not set in the worker's environment; tasks get it empty")
    return reading.environ.get(name, "")


def from_flags(entries: Sequence[str], reading: Reading) -> dict[str, str]:
    """`-e NAME=VALUE` and `-e NAME` (inherited). Values are taken as they are, commas and backslashes too.

    The existing worker split each entry at commas. What it did to values is told; in the part before `=`, where a
    comma cannot be meant otherwise, it still separates.
    """
    values: dict[str, str] = {}
    for entry in entries:
        before, has_value, value = entry.partition("=")
        names = before.split(",")
        try:
            if not entry:
                raise Wrong("the entry is empty; write -e NAME=VALUE or -e NAME")
            for name in names:
                _name(Scalar("", name), reading)
            if has_value:
                script(Scalar("", value), reading)
        except Wrong as error:
            # Never the entry itself: its value may be a secret.
            label = names[-1] if has_value and names[-1].isidentifier() else ""
            reading.problem("-e", f"{label + ': ' if label else ''}{error}")
            continue
        if len(names) > 1:
            reading.warn("-e", f"{before} is read as {len(names)} variables; write -e once for each")
        for name in names[: -1 if has_value else None]:
            values[name] = _inherited(name, "-e", reading)
        if has_value:
            values[names[-1]] = value
            _tell_about_commas(names[-1], value, reading)
    return values


def _tell_about_commas(name: str, value: str, reading: Reading) -> None:
    if _SECOND_ENTRY.search(value):
        reading.warn("-e", f"{name} is one variable, commas included; write -e once for each if several were meant")
    elif "\\," in value:
        reading.warn("-e", f"{name} keeps its backslash before the comma; commas need none here")
