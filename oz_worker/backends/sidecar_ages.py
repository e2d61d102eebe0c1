"""When each sidecar volume was last used, and since when nothing holds it: what decides about its removal."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import threading
import time
from pathlib import Path
from typing import Collection

logger = logging.getLogger(__name__)


class Ages:
    """Counts in seconds of the wall clock, because they must go on across restarts; kept in *file*, 0600.

    Safe from any thread: `_lock` guards both tables and is never held for long, `_writing` the file. A file that is
    lost or damaged makes every count begin anew, which removes things later, never earlier.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._used, self._bare = self._load()

    def touch(self, name: str) -> None:
        """It is used now."""
        with self._lock:
            self._used[name] = time.time()

    def was_used(self, name: str) -> bool:
        """Whether it was ever used by this instance, or seen in use."""
        with self._lock:
            return name in self._used

    def idle(self, name: str) -> float:
        """For how long it has not been used; the count of an unknown one begins now."""
        with self._lock:
            return _since(self._used, name)

    def bare(self, name: str) -> float:
        """For how long nothing has held it, as far as looks at it know."""
        with self._lock:
            return _since(self._bare, name)

    def held(self, name: str) -> None:
        """Something holds it."""
        with self._lock:
            self._bare.pop(name, None)

    def keep(self, names: Collection[str]) -> None:
        """Forget all others, and write the file. Never raises: losing it is harmless."""
        with self._lock:
            for table in (self._used, self._bare):
                for name in table.keys() - names:
                    del table[name]
        self.save()

    def save(self) -> None:
        """Write the file. Never raises."""
        with self._lock:
            text = json.dumps({"used": self._used, "bare": self._bare})
        temporary = self._file.with_suffix(".new")
        with self._writing:
            try:
                descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
                with open(descriptor, "w", encoding="utf-8") as file:
                    file.write(text)
                temporary.replace(self._file)
            except OSError as error:
                logger.debug("%s was not written: %s", self._file, error.strerror)
                with contextlib.suppress(OSError):
                    temporary.unlink()

    def _load(self) -> tuple[dict[str, float], dict[str, float]]:
        try:
            about = json.loads(self._file.read_text(encoding="utf-8"))
            return _times(about["used"]), _times(about["bare"])
        except FileNotFoundError:
            return {}, {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            logger.info("%s cannot be read (%s); sidecar volumes are counted as used now", self._file, error)
            return {}, {}


def _since(table: dict[str, float], name: str) -> float:
    now = time.time()
    table[name] = min(table.get(name, now), now)  # a time to come is one of a clock that was wrong
    return now - table[name]


def _times(about: dict[str, object]) -> dict[str, float]:
    times = {name: float(str(value)) for name, value in about.items()}
    return {name: value for name, value in times.items() if math.isfinite(value)}
