"""Counters, gauges and histograms in memory; nothing here does I/O. Safe from any thread.

`Meters` counts, `Meters.snapshot` is what every exporter reads. What there is to count stands in
`oz_worker.instruments`.
"""

from __future__ import annotations

import bisect
import enum
import threading
from typing import Callable, Iterable, Mapping, NamedTuple, Sequence

Labels = tuple[tuple[str, str], ...]
"""Names and values, sorted by name."""

BUCKETS = (0.0, 5.0, 10.0, 25.0, 50.0, 75.0, 100.0, 250.0, 500.0, 750.0, 1000.0, 2500.0, 5000.0, 7500.0, 10000.0)
"""The upper bounds of a histogram that names none: those of the OpenTelemetry SDKs."""

OTHER = "unknown"
"""A label value that is not in its instrument's closed set."""


class Kind(enum.Enum):
    """What an instrument measures; an exporter maps it to its own words."""

    COUNTER = "counter"
    GAUGE = "gauge"
    UP_DOWN = "up-down counter"
    HISTOGRAM = "histogram"


class Instrument(NamedTuple):
    """One thing that is measured.

    `name` is whole, with `_total` and `_seconds`: no exporter adds a suffix. `unit` is "s" or "" for a number of
    things. `primed` are the label sets that exist with 0 from the start, each in the order of `labels`; an instrument
    without labels that is primed has one empty set. `bounds` are upper bounds of a histogram's buckets, without +Inf.
    `later` are label sets that may come and are not primed. Where any set is named, a label has the values of these
    sets and no other; where none is, it has what it is given.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    primed: tuple[tuple[str, ...], ...] = ()
    unit: str = ""
    bounds: tuple[float, ...] = BUCKETS
    later: tuple[tuple[str, ...], ...] = ()

    def closed(self) -> dict[str, frozenset[str]]:
        """The values that each label may have; empty where they are not limited."""
        columns = zip(*self.primed, *self.later, strict=True)
        return dict(zip(self.labels, map(frozenset, columns), strict=False))


class Point(NamedTuple):
    """One value of a counter or gauge."""

    labels: Labels
    value: float


class Distribution(NamedTuple):
    """One label set of a histogram. `buckets` are counts per bucket, not cumulative; the last one is +Inf.

    `total` is the sum of what was observed, `number` how many times.
    """

    labels: Labels
    buckets: tuple[int, ...]
    total: float
    number: int


class Family(NamedTuple):
    """An instrument and all that is known of it, sorted by labels; exactly one of the two tuples may be filled."""

    instrument: Instrument
    points: tuple[Point, ...] = ()
    distributions: tuple[Distribution, ...] = ()


class Histogram:
    """Bucket counts, sum and count of one label set. Guarded by its Meters' lock."""

    __slots__ = ("bounds", "buckets", "count", "total")

    def __init__(self, bounds: Sequence[float] = BUCKETS) -> None:
        self.bounds = bounds
        self.buckets = [0] * (len(bounds) + 1)
        self.total = 0.0
        self.count = 0

    def add(self, value: float) -> None:
        """Requires holding the Meters' lock."""
        self.buckets[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value
        self.count += 1


class Meters:
    """The worker's own registry, the one source of truth for every exporter. Its lock guards the three maps.

    What is not in *instruments* is counted all the same but exported by nobody: an error here must not hurt a task.
    For the same reason a label value that its instrument does not allow is counted, as `unknown`.
    """

    def __init__(self, instruments: Iterable[Instrument] = ()) -> None:
        self._lock = threading.Lock()
        self._instruments = {each.name: each for each in sorted(instruments)}
        self._closed = {each.name: each.closed() for each in self._instruments.values()}
        self._values: dict[tuple[str, Labels], float] = {}
        self._histograms: dict[tuple[str, Labels], Histogram] = {}
        self._computed: dict[tuple[str, Labels], Callable[[], float | None]] = {}
        self.on_observe: Callable[[str, float, Labels], None] | None = None
        """Told each value of a histogram, on the thread that measured it: returns at once, raises nothing."""
        for each in self._instruments.values():
            for values in each.primed:
                self.count(each.name, 0, **dict(zip(each.labels, values, strict=True)))

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add *amount* to a counter or an up-down gauge."""
        key = (name, self._allowed(name, labels))
        with self._lock:
            self._values[key] = self._values.get(key, 0) + amount

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        key = (name, self._allowed(name, labels))
        with self._lock:
            self._values[key] = value

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Record *value* in a histogram."""
        key = (name, self._allowed(name, labels))
        with self._lock:
            histogram = self._histograms.get(key)
            if histogram is None:
                known = self._instruments.get(name)
                histogram = self._histograms[key] = Histogram(known.bounds if known else BUCKETS)
            histogram.add(value)
        if (told := self.on_observe) is not None:
            told(name, value, key[1])

    def compute(self, name: str, reading: Callable[[], float | None], **labels: str) -> None:
        """A gauge or a counter that is read when somebody looks; None means that there is nothing to say just now.

        *reading* is called from any thread, must return at once and hold no lock that is held for long. If it raises,
        the value is absent.
        """
        key = (name, self._allowed(name, labels))
        with self._lock:
            self._computed[key] = reading

    def value(self, name: str, **labels: str) -> float:
        """The present value of a counter or gauge; 0 when it was never touched."""
        with self._lock:
            return self._values.get((name, tuple(sorted(labels.items()))), 0)

    def values(self) -> Mapping[tuple[str, Labels], float]:
        """A copy of all counters and gauges, without the computed ones."""
        with self._lock:
            return dict(self._values)

    def snapshot(self) -> tuple[Family, ...]:
        """All instruments by name with what is known of them, those without a value included. Raises nothing."""
        with self._lock:
            values = dict(self._values)
            computed = list(self._computed.items())
            distributions = [
                (name, Distribution(labels, tuple(each.buckets), each.total, each.count))
                for (name, labels), each in self._histograms.items()
            ]
        for key, reading in computed:  # without the lock: a reading may take another one
            value = _read(reading)
            if value is None:
                values.pop(key, None)
            else:
                values[key] = value
        points_of: dict[str, list[Point]] = {}
        for (name, labels), value in values.items():
            points_of.setdefault(name, []).append(Point(labels, value))
        distributions_of: dict[str, list[Distribution]] = {}
        for name, distribution in distributions:
            distributions_of.setdefault(name, []).append(distribution)
        return tuple(
            Family(each, tuple(sorted(points_of.get(name, ()))), tuple(sorted(distributions_of.get(name, ()))))
            for name, each in self._instruments.items()
        )

    def _allowed(self, name: str, labels: Mapping[str, str]) -> Labels:
        closed = self._closed.get(name, {})
        known = {label: value if value in closed.get(label, (value,)) else OTHER for label, value in labels.items()}
        return tuple(sorted(known.items()))


def _read(reading: Callable[[], float | None]) -> float | None:
    try:
        return reading()
    except Exception:  # foreign code from here: what is broken in observation hurts nothing else
        return None
