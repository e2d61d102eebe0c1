"""The dotenv file that a setup command may write, read strictly: a mistake is an error with its line, never a loss.

    NAME=value            until the end of the line or a `#` after a blank; blanks around it are not part of it
    NAME="va\\nlue"        escapes \\n \\r \\t \\" \\\\ \\$; may span lines
    NAME='value'          as it stands; may span lines
    export NAME=value     the word is ignored; `NAME: value` is read too

Outside single quotes `$NAME`, in capitals, and `${name}` stand for a variable of the file so far, else of the task,
else for nothing. A `$` before anything else stays: `pa$word` is a password.
"""

from __future__ import annotations

import re
from typing import Mapping

_BLANK = re.compile(r"[ \t\r]*")
_HEAD = re.compile(r"(?:export[ \t]+)?([A-Za-z_][A-Za-z0-9_.\-]*)[ \t]*[=:]")
_PLAIN = re.compile(r"[^\n]*")
_COMMENT = re.compile(r"[ \t]#.*")
_DOUBLE = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)
_SINGLE = re.compile(r"'([^']*)'")
_REST = re.compile(r"[ \t\r]*(?:#[^\n]*)?(?:\n|\Z)")
_PIECE = re.compile(
    r"\\(?P<escape>.)|\$\{(?P<braced>[A-Za-z_][A-Za-z0-9_]*)\}|\$(?P<name>[A-Z_][A-Z0-9_]*)(?![a-z])", re.DOTALL
)
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t"}


class EnvFileError(ValueError):
    """The file cannot be read; `line` is where, the text never holds a value."""

    def __init__(self, line: int, problem: str) -> None:
        super().__init__(problem)
        self.line = line


def parse(text: str, known: Mapping[str, str]) -> dict[str, str]:
    """The variables of a dotenv *text* in their order; *known* serves `$NAME`. Raises EnvFileError."""
    found: dict[str, str] = {}
    position = 0
    if "\0" in text:
        raise EnvFileError(_line(text, text.index("\0")), "there is a NUL byte")
    while position < len(text):
        position = _blank(text, position)
        if position >= len(text):
            break
        if text[position] == "\n":
            position += 1
        elif text[position] == "#":
            position = _end_of_line(text, position)
        else:
            name, value, position = _assignment(text, position, {**known, **found})
            found[name] = value
    return found


def _assignment(text: str, position: int, known: Mapping[str, str]) -> tuple[str, str, int]:
    head = _HEAD.match(text, position)
    if head is None:
        raise EnvFileError(_line(text, position), "expected NAME=value")
    start = _blank(text, head.end())
    quote = text[start : start + 1]
    if quote not in ("'", '"'):
        plain = _PLAIN.match(text, head.end())
        assert plain is not None  # it matches nothing, too
        return head[1], _expand(_COMMENT.sub("", plain[0]).strip(), known, escapes=False), plain.end()
    quoted = (_DOUBLE if quote == '"' else _SINGLE).match(text, start)
    if quoted is None:
        raise EnvFileError(_line(text, start), f"the value of {head[1]} has no closing {quote}")
    rest = _REST.match(text, quoted.end())
    if rest is None:
        raise EnvFileError(_line(text, quoted.end()), f"there is text behind the quoted value of {head[1]}")
    value = quoted[1] if quote == "'" else _expand(quoted[1], known, escapes=True)
    return head[1], value, rest.end()


def _expand(value: str, known: Mapping[str, str], *, escapes: bool) -> str:
    def piece(match: re.Match[str]) -> str:
        escaped = match["escape"]
        if escaped is None:
            return known.get(match["braced"] or match["name"], "")
        if escaped == "$":
            return "$"
        return _ESCAPES.get(escaped, escaped) if escapes else match[0]

    return _PIECE.sub(piece, value)


def _blank(text: str, position: int) -> int:
    match = _BLANK.match(text, position)
    return match.end() if match else position


def _end_of_line(text: str, position: int) -> int:
    end = text.find("\n", position)
    return len(text) if end < 0 else end + 1


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1
