"""The programs that a backend calls: whether they run at all, and how old they are."""

from __future__ import annotations

import os
import re
from typing import Mapping, NamedTuple, Sequence

from oz_worker import errand
from oz_worker.errors import NotUsable
from oz_worker.process import SpawnError
from oz_worker.timing import format_duration

SECONDS = 10.0
_NOT_RUN = (126, 127)
"""What a shell, or the kernel through one, says of a program that cannot be run."""


class Tried(NamedTuple):
    """How a program answered. `version` is empty when it named none; `late`: it did not answer in time."""

    version: tuple[int, ...] = ()
    late: bool = False


def instance() -> str:
    """The mark of children of this check, so that nobody takes them for a worker's."""
    return f"check-{os.getpid()}"


def ask(argv: Sequence[str], environment: Mapping[str, str]) -> Tried:
    """Run a program that is asked for its version, for ten seconds at most. NotUsable for one that cannot be run."""
    try:
        outcome = errand.run(argv, environment=environment, instance=instance(), timeout=SECONDS)
    except (SpawnError, OSError) as error:
        raise NotUsable(f"{argv[0]} cannot be run: {error}") from error
    if outcome.late:
        return Tried(late=True)
    said = (outcome.output + outcome.errors).decode("utf-8", "replace")
    if outcome.code in _NOT_RUN:
        raise NotUsable(f"{argv[0]} cannot be run (exit code {outcome.code}): {said.strip()[-200:]}")
    found = re.search(r"(\d+)\.(\d+)(?:\.(\d+))?", said)
    return Tried(tuple(int(part) for part in found.groups("0")) if found else ())


def described(program: str, tried: Tried) -> str:
    """The program and its version, or what it did instead of naming one."""
    if tried.late:
        return f"{program} did not say its version within {format_duration(SECONDS)}"
    return f"{program} {'.'.join(map(str, tried.version))}" if tried.version else f"{program}, version unknown"
