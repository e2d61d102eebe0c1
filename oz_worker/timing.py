"""Deadlines on the monotonic clock, delays between attempts, durations as people write them."""

from __future__ import annotations

import random
import re
import time
from typing import Iterator

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*(ms|s|m|h|d)\s*")


class Deadline:
    """A point on the monotonic clock, passed through the steps of one operation."""

    __slots__ = ("at",)

    def __init__(self, seconds: float) -> None:
        self.at = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds left, never below zero."""
        return max(0.0, self.at - time.monotonic())

    def passed(self) -> bool:
        """Whether the moment is behind us."""
        return time.monotonic() >= self.at


def backoff(first: float, longest: float, rng: random.Random) -> Iterator[float]:
    """Delays in seconds for ever: doubling from *first* to *longest*, each drawn from its upper half.

    The jitter on every one keeps a fleet that lost its server together from returning together.
    """
    ceiling = first
    while True:
        yield rng.uniform(ceiling / 2, ceiling)
        ceiling = min(ceiling * 2, longest)


def parse_duration(text: str) -> float:
    """Seconds of `45m`, `1h30m`, `1h 30m`, `90s`, `500ms`, `1.5h` or a bare `0`; ValueError otherwise."""
    stripped = text.strip()
    if stripped == "0":
        return 0.0
    total, position = 0.0, 0
    while position < len(stripped):
        part = _PART.match(stripped, position)
        if part is None:
            break
        total += float(part[1]) * _UNITS[part[2]]
        position = part.end()
    if not stripped or position != len(stripped):
        raise ValueError(f"{text!r} is not a duration; write it like 90s, 45m, 1h30m or 500ms")
    return total


def format_duration(seconds: float) -> str:
    """A duration for people: `0s`, `1.5s`, `4m10s`, `2h`."""
    if seconds < 60:
        return f"{seconds:.3g}s"
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, last = divmod(rest, 60)
    parts = [f"{hours}h" if hours else "", f"{minutes}m" if minutes else "", f"{last}s" if last else ""]
    return "".join(parts)
