"""Every secret value that the worker knows at a moment: its own, and those of the tasks that it runs."""

from __future__ import annotations

import re
import threading
import urllib.parse
import weakref
from typing import Iterable, Iterator, Mapping

from oz_worker.redact import Redactor

_DIGEST = re.compile(r"@[\w+.-]+:[0-9a-f]{32}")
_SPECIAL = ("ALL_PROXY", "FTP_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


class Known:
    """Safe from any thread; the lock guards the collections.

    The log masks all of them everywhere. The output of a task masks the worker's own and the task's: another task's
    values are not in it, and may be words of its own.
    """

    def __init__(self, own: Iterable[str] = ()) -> None:
        self._lock = threading.Lock()
        self._own = tuple(dict.fromkeys(own))
        self._of_units: dict[str, tuple[str, ...]] = {}
        self._redactors: weakref.WeakKeyDictionary[object, tuple[tuple[str, ...], Redactor]]
        self._redactors = weakref.WeakKeyDictionary()  # until the unit is gone
        self.everywhere = Redactor(self._own)

    def learn(self, value: str) -> None:
        """The worker has one more of its own, which it never forgets: what a key file holds now."""
        with self._lock:
            if value in self._own:
                return
            self._own += (value,)
        self.everywhere.add((value,))

    def learn_of(self, unit: str, values: Iterable[str], *, shown: Iterable[str] = ()) -> None:
        """What a unit's task holds now, in the place of what it held; not the values in *shown*: the task's ids."""
        fresh = _without(values, shown)
        with self._lock:
            old = self._of_units.get(unit, ())
            if old == fresh:
                return
            self._of_units[unit] = fresh
            if not fresh:
                del self._of_units[unit]
        self.everywhere.add(fresh)
        self.everywhere.remove(old)

    def redactor_of(self, unit: object, values: Iterable[str], *, shown: Iterable[str] = ()) -> Redactor:
        """One for the worker's own and *values* but those in *shown*; built once for *unit* until either changes."""
        with self._lock:
            wanted = (*self._own, *_without(values, shown))
            held = self._redactors.get(unit)
        if held is None or held[0] != wanted:
            held = wanted, Redactor(wanted)  # beside the lock: it takes milliseconds
            with self._lock:
                self._redactors[unit] = held
        return held[1]


def _without(values: Iterable[str], shown: Iterable[str]) -> tuple[str, ...]:
    left_out = set(shown)
    return tuple(dict.fromkeys(value for value in values if value not in left_out))


def in_environment(environment: Mapping[str, str]) -> Iterator[str]:
    """What of the worker's own environment lets somebody in: users of proxies, headers for OpenTelemetry, the key."""
    for name, value in environment.items():
        if name == "WARP_API_KEY":
            yield value.strip()
        elif name.upper() in _SPECIAL:
            yield from in_address(value)
        elif name.startswith("OTEL_EXPORTER_OTLP_") and name.endswith("HEADERS"):
            for header in value.split(","):
                given = header.partition("=")[2] or header  # one that does not parse has its secret too
                text = urllib.parse.unquote(given)
                yield from (given.strip(), text.strip(), *text.split()[-1:])
        elif name.startswith("OTEL_EXPORTER_OTLP_") and name.endswith("ENDPOINT"):
            yield from in_address(value)


def in_address(text: str) -> Iterator[str]:
    """User and password, and the password alone, of a URL or of an image's name: `user:password@host/...`."""
    if _DIGEST.search(text):
        text = text.rpartition("@")[0]
    place = text.partition("://")[2] or text
    user_info = place.partition("/")[0].rpartition("@")[0] or place.rpartition("@")[0]
    name, colon, password = user_info.partition(":")
    if "://" in text or (colon and "/" not in user_info):
        for part in (user_info, password or name):
            yield from dict.fromkeys((part, urllib.parse.unquote(part)))
