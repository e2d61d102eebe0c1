"""Counters, gauges and histograms in memory; nothing here does I/O. Safe from any thread."""

from __future__ import annotations

import threading
from typing import Mapping

Labels = tuple[tuple[str, str], ...]

BUCKETS = (0.0, 5.0, 10.0, 25.0, 50.0, 75.0, 100.0, 250.0, 500.0, 750.0, 1000.0, 2500.0, 5000.0, 7500.0, 10000.0)


class Histogram:
    """Bucket counts, sum and count of one label set. Guarded by its Meters' lock."""

    __slots__ = ("buckets", "count", "total")

    def __init__(self) -> None:
        self.buckets = [0] * (len(BUCKETS) + 1)
        self.total = 0.0
        self.count = 0

    def add(self, value: float) -> None:
        """Requires holding the Meters' lock."""
        index = next((i for i, bound in enumerate(BUCKETS) if value <= bound), len(BUCKETS))
        self.buckets[index] += 1
        self.total += value
        self.count += 1


class Meters:
    """The worker's own registry, the one source of truth for every exporter. Its lock guards both maps."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[tuple[str, Labels], float] = {}
        self._histograms: dict[tuple[str, Labels], Histogram] = {}

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add *amount* to a counter or an up-down gauge."""
        key = (name, tuple(sorted(labels.items())))
        with self._lock:
            self._values[key] = self._values.get(key, 0) + amount

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        with self._lock:
            self._values[(name, tuple(sorted(labels.items())))] = value

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Record *value* in a histogram."""
        key = (name, tuple(sorted(labels.items())))
        with self._lock:
            self._histograms.setdefault(key, Histogram()).add(value)

    def value(self, name: str, **labels: str) -> float:
        """The present value of a counter or gauge; 0 when it was never touched."""
        with self._lock:
            return self._values.get((name, tuple(sorted(labels.items()))), 0)

    def values(self) -> Mapping[tuple[str, Labels], float]:
        """A copy of all counters and gauges."""
        with self._lock:
            return dict(self._values)
