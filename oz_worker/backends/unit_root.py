"""The directory of an instance in which each unit has one of its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Iterable

from oz_worker import vitals
from oz_worker.backends.base import Found
from oz_worker.detached import UnitDirectory
from oz_worker.errors import NotUsable
from oz_worker.model import Key
from oz_worker.unreadable import patiently, unreadable


def make(root: Path) -> None:
    """Make it. Raises NotUsable."""
    try:
        os.makedirs(root, mode=0o700, exist_ok=True)
    except OSError as error:
        raise NotUsable(f"{root} cannot be made: {error.strerror}; choose another state_dir or free space") from error


def directories(root: Path) -> set[Path]:
    """What is in it. Raises Unreadable."""
    return patiently(lambda: _list(root))


def _list(root: Path) -> set[Path]:
    try:
        return set(root.iterdir())
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise unreadable(str(root), error) from error


def found(paths: Iterable[Path]) -> list[Found]:
    """The units that these are the directories of. Raises Unreadable rather than leave one out."""
    units = []
    for path in sorted(paths):
        vitals.stamp()  # there may be thousands, on a slow disk
        facts = patiently(UnitDirectory(path).facts)
        if facts is not None and isinstance(facts.get("task_id"), str):
            units.append(Found(path.name, Key(facts["task_id"], str(facts.get("execution_id", "")))))
    return units
