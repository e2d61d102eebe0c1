"""How often the watchdog ended this worker, over restarts: what only a dead process knew, nobody would scrape."""

from __future__ import annotations

import contextlib
from pathlib import Path

from oz_worker import threads
from oz_worker.meters import Meters

METRIC = "oz_worker_watchdog_trips_total"
FILE = "watchdog-trips"
"""In the instance's directory; not in the database, whose thread may be the one that is stuck."""
WRITE_SECONDS = 1.0


class Trips:
    """The counter and its file. `remember` by the main thread before anything counts in earnest, `count` by any."""

    def __init__(self, meters: Meters) -> None:
        self._meters = meters
        self._file: Path | None = None

    def remember(self, instance: Path) -> None:
        """Go on from the number of the processes before this one, as far as it can be read."""
        self._file = instance / FILE
        with contextlib.suppress(OSError, ValueError):
            self._meters.count(METRIC, max(0, int(self._file.read_text(encoding="ascii"))))

    def count(self) -> None:
        """One more. The process leaves after this, so the number is written down, for which a bad disk has a second."""
        self._meters.count(METRIC)
        if self._file is not None:
            with contextlib.suppress(RuntimeError):  # no thread is left to be had
                threads.start("trips", self._write, lambda _name, _error: None).join(WRITE_SECONDS)

    def _write(self) -> None:
        assert self._file is not None
        with contextlib.suppress(OSError):
            self._file.write_text(f"{self._meters.value(METRIC):.0f}", encoding="ascii")
