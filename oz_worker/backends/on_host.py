"""What the backends share whose units are processes of this host, each with a directory of the instance."""

from __future__ import annotations

from typing import Sequence

from oz_worker.backends.base import Found, Unit
from oz_worker.backends.local import LocalUnits
from oz_worker.backends.output import tail


class OnHost:
    """The part of the contract (`Backend`) that follows from `LocalUnits` alone."""

    _units: LocalUnits

    def close(self) -> None:
        """Stop the watcher; units run on."""
        self._units.close()

    def output_at(self, unit: Unit) -> str:
        """The file that holds the unit's output."""
        return str(self._units.directory(unit).output)

    def tail(self, unit: Unit, limit: int) -> bytes:
        """The end of that file."""
        return tail(self._units.directory(unit).output, limit)

    def collect(self, unit: Unit) -> str:
        """The output is where it belongs."""
        return ""

    def recover(self) -> Sequence[Found]:
        """List the units that have a directory."""
        return self._units.recover()

    def units(self) -> Sequence[Found]:
        """List the units that have a directory, touching nothing."""
        return self._units.units()

    def look_after(self) -> Sequence[Found]:
        """Nothing outlives its unit here, and nothing is without its instance."""
        return ()
