"""Reading the fields of a message: strict about what the worker needs, blind to everything else."""

from __future__ import annotations

from typing import Any, Mapping

from oz_worker.dialects.oz.go_json import folded, has_surrogate

ARGUMENT_BYTES = 128 * 1024
"""What Linux takes as one argument, its final NUL included."""

GO_SPACE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
"""What Go trims. `str.strip()` would take U+001C to U+001F as well."""


class FieldFault(Exception):
    """A field the worker needs cannot be used. `str()` names the field and what is wrong, never its value."""


class Fields:
    """One JSON object of a message (`mapping`) and the `path` that leads to it; collects warnings. For one thread.

    Every getter takes null for absent, as Go does, and raises FieldFault when the type is another one.
    """

    def __init__(self, mapping: Mapping[str, Any], path: str, warnings: list[str]) -> None:
        self.mapping = mapping
        self.path = path
        self._warnings = warnings
        self._folded: dict[str, str] | None = None  # made once: a million unknown fields must not cost a second each

    def where(self, name: str) -> str:
        """How messages for people name the field."""
        return f"{self.path}.{name}" if self.path else name

    def value(self, name: str) -> Any:
        """The value as decoded, None if absent."""
        if name in self.mapping:
            return self.mapping[name]
        if self._folded is None:
            self._folded = folded(self.mapping)
        key = self._folded.get(name.casefold())
        return None if key is None else self.mapping[key]

    def text(self, name: str) -> str:
        """A text that can be an argument or a variable; "" if absent."""
        value = self.value(name)
        return "" if value is None else checked_text(value, self.where(name))

    def flag(self, name: str) -> bool | None:
        """True, false, or None if absent."""
        value = self.value(name)
        if value is None or isinstance(value, bool):
            return value
        raise FieldFault(f"{self.where(name)} is {kind_of(value)} where true or false is needed")

    def number(self, name: str) -> int:
        """An optional whole number; 0 if absent. Anything else is ignored with a warning: a task is worth more."""
        value = self.value(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
            return value
        if value is not None:
            self._warnings.append(f"{self.where(name)} is {kind_of(value)}, no usable whole number, and is ignored")
        return 0

    def object(self, name: str) -> Fields | None:
        """A nested object, None if absent."""
        value = self.value(name)
        return None if value is None else self._nested(value, name)

    def optional_object(self, name: str) -> Fields | None:
        """The same, but another type is ignored with a warning."""
        value = self.value(name)
        if value is None or isinstance(value, dict):
            return self.object(name)
        self._warnings.append(f"{self.where(name)} is {kind_of(value)}, no object, and is ignored")
        return None

    def objects(self, name: str) -> list[Fields]:
        """A list of objects; empty if absent."""
        return [self._nested(value, f"{name}[{index}]") for index, value in enumerate(self._list(name))]

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts; empty if absent."""
        return tuple(
            checked_text(value, f"{self.where(name)}[{index}]") for index, value in enumerate(self._list(name))
        )

    def variables(self, name: str) -> dict[str, str]:
        """Environment variables, in their order; empty if absent."""
        value = self.value(name)
        nested = {} if value is None else value
        if not isinstance(nested, dict):
            raise FieldFault(f"{self.where(name)} is {kind_of(nested)} where an object is needed")
        for key, content in nested.items():
            # !a: the name comes from outside and must not break a line of the log.
            where = f"{self.where(name)}[{key[:80]!a}]"
            if not key or "=" in key or "\0" in key or has_surrogate(key):
                raise FieldFault(f"{where} is no name of an environment variable")
            checked_text(content, where, limit=None)
        return nested

    def warn(self, sentence: str) -> None:
        """Add a warning of the caller's own."""
        self._warnings.append(sentence)

    def _nested(self, value: Any, name: str) -> Fields:
        if not isinstance(value, dict):
            raise FieldFault(f"{self.where(name)} is {kind_of(value)} where an object is needed")
        return Fields(value, self.where(name), self._warnings)

    def _list(self, name: str) -> list[Any]:
        value = self.value(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise FieldFault(f"{self.where(name)} is {kind_of(value)} where a list is needed")
        return value


def checked_text(value: Any, where: str, *, limit: int | None = ARGUMENT_BYTES) -> str:
    """*value* if it can be handed to a process; FieldFault naming *where* otherwise."""
    if not isinstance(value, str):
        raise FieldFault(f"{where} is {kind_of(value)} where text is needed")
    if "\0" in value:
        raise FieldFault(f"{where} contains a NUL character, which no process can be given")
    if has_surrogate(value):
        raise FieldFault(f"{where} contains half of a surrogate pair, which is no text")
    if limit is not None and len(value.encode()) >= limit:
        raise FieldFault(f"{where} is longer than the {limit // 1024} KiB that one argument may have")
    return value


def trim(text: str) -> str:
    """*text* without the blanks at its ends that Go takes for blanks."""
    return text.strip(GO_SPACE)


def kind_of(value: Any) -> str:
    """What JSON calls *value*, for sentences that must not show it."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names[type(value)]
