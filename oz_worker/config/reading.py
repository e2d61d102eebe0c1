"""What one reading of a configuration has found so far, and the surroundings its values refer to."""

from __future__ import annotations

import os
from typing import Iterable, Mapping


class Wrong(ValueError):
    """One value is wrong; `str()` is the rest of a sentence that begins with its place."""

    def __init__(self, sentence: str, place: str = "") -> None:
        super().__init__(sentence)
        self.place = place


class Reading:
    """Collects mistakes and warnings, so that all are told at once. Used by one thread."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = environ
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self.wrong: set[str] = set()
        """Dotted names of keys whose value is wrong, which was noted: they are not missing as well."""

    def problem(self, place: str, sentence: str) -> None:
        """Note a mistake at *place* (`file:line:column` or a flag)."""
        line = f"{place}: {sentence}" if place else sentence
        if line not in self.problems:  # an alias may bring the same node twice
            self.problems.append(line)

    def warn(self, place: str, sentence: str) -> None:
        """Note something that is accepted and was probably not meant."""
        line = f"{place}: {sentence}" if place else sentence
        if line not in self.warnings:
            self.warnings.append(line)

    def path(self, text: str) -> str:
        """*text* as an absolute path: `~` is the home directory, the rest is relative to the working directory."""
        return absolute(text, self.environ)


def absolute(text: str, environ: Mapping[str, str]) -> str:
    """*text* with `~` expanded and made absolute; `..` is resolved through links, as the kernel would."""
    if (text == "~" or text.startswith("~/")) and environ.get("HOME"):
        text = environ["HOME"] + text[1:]
    elif text.startswith("~"):
        text = os.path.expanduser(text)
    joined = os.path.join(os.getcwd(), text)
    return os.path.realpath(joined) if ".." in joined.split("/") else os.path.normpath(joined)


def suggest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest of *known*, or nothing."""
    import difflib  # only for people who mistyped: the start of a worker does without it

    plain = {_bare(name): name for name in known}
    near = difflib.get_close_matches(_bare(word), plain, n=1, cutoff=0.7)
    return f"; did you mean {plain[near[0]]!r}?" if near else ""


def shown(text: str) -> str:
    """A value for a sentence: quoted, cut to a readable length."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def listed(names: Iterable[str]) -> str:
    """`a, b or c`."""
    words = list(names)
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]


def _bare(name: str) -> str:
    """Spelling differences that people do not see: case, dashes, underscores."""
    return name.lower().replace("-", "").replace("_", "")
