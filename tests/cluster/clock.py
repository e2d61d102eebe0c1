"""Times as objects carry them."""

from __future__ import annotations

import datetime
import re

_FRACTION = re.compile(r"\.\d+")


def now() -> str:
    """This moment, to the second, as most fields have it."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def stamp(seconds: float) -> str:
    """A time since 1970 as a field."""
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def seconds(text: str) -> float:
    """The time that a field means, in seconds since 1970."""
    whole = _FRACTION.sub("", text).replace("Z", "+00:00")
    fraction = _FRACTION.search(text)
    return datetime.datetime.fromisoformat(whole).timestamp() + (float(fraction[0]) if fraction else 0.0)
