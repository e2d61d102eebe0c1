"""Names of what was removed lately: what bears one of them all the same was made late, by a request of a program that
had been given up for dead, and is removed once more."""

from __future__ import annotations

import threading

from oz_worker.backends.base import Unit

_REMEMBERED = 1000


class Removed:
    """The latest thousand. Safe from any thread: the lock guards the names."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._units: dict[str, Unit] = {}

    def note(self, name: str, unit: Unit) -> None:
        """What *unit* had made by that name is gone."""
        with self._lock:
            self._units[name] = Unit(unit.name, unit.instance, unit.key)
            for old in list(self._units)[:-_REMEMBERED]:
                del self._units[old]

    def unit(self, name: str) -> Unit | None:
        """Whose it was."""
        with self._lock:
            return self._units.get(name)

    def forget(self, name: str) -> None:
        """It is about to be made anew, with good reason."""
        with self._lock:
            self._units.pop(name, None)
