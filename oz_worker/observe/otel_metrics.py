"""Our registry as instruments of the SDK. Imported on the thread `otel-metrics` only."""

from __future__ import annotations

from typing import Callable, Iterable

from opentelemetry.metrics import CallbackOptions, Histogram, Meter, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

from oz_worker.instruments import SCOPE
from oz_worker.meters import Instrument, Kind, Meters
from oz_worker.observe import console, otel_exporters
from oz_worker.observe.exporters import Source
from oz_worker.observe.otlp import Observed

CLOSE_MILLISECONDS = 10_000
"""Nobody waits that long: whoever stops the worker leaves this thread behind before."""


class SdkMetrics:
    """A provider with observable instruments, which read the registry whenever something is exported."""

    def __init__(self, source: Source) -> None:
        meters = source.meters
        self._exporter, self._outage = otel_exporters.otlp("metrics", source)
        # Time limit, temporality and the histograms' form: the SDK reads those variables by itself.
        reader = PeriodicExportingMetricReader(self._exporter, console.interval(source.environ) * 1000)
        self._provider = MeterProvider(
            [reader], resource=otel_exporters.resource_of(source.resource, source.instance), shutdown_on_exit=False
        )
        meter = self._provider.get_meter(SCOPE)
        self._histograms: dict[str, Histogram] = {}
        for family in meters.snapshot():
            each = family.instrument
            if each.kind is Kind.HISTOGRAM:
                self._histograms[each.name] = meter.create_histogram(
                    each.name, each.unit, each.help, explicit_bucket_boundaries_advisory=each.bounds
                )
            else:
                _observable(meter, each, _reading(meters, each))

    def take(self, item: Observed) -> None:
        """Record one value of a histogram."""
        if (histogram := self._histograms.get(item.name)) is not None:
            histogram.record(item.value, dict(item.labels))

    def look(self) -> None:
        """See whether the collector is late."""
        self._outage.look()

    def close(self) -> None:
        """Export once more, and end; at once when nobody takes it."""
        self._outage.leave(self._exporter.shutdown)
        self._provider.shutdown(CLOSE_MILLISECONDS)

    def silence(self) -> None:
        """Say nothing of what is lost now."""
        self._outage.say_nothing_more()


Reading = Callable[[CallbackOptions], Iterable[Observation]]


def _observable(meter: Meter, each: Instrument, reading: Reading) -> None:
    create = {
        Kind.COUNTER: meter.create_observable_counter,
        Kind.GAUGE: meter.create_observable_gauge,
        Kind.UP_DOWN: meter.create_observable_up_down_counter,
    }[each.kind]
    create(each.name, [reading], each.unit, each.help)


def _reading(meters: Meters, each: Instrument) -> Reading:
    """Whole numbers where things are counted, as the existing worker sends them."""
    number = float if each.unit else int

    def read(_options: CallbackOptions) -> Iterable[Observation]:
        points = next(family.points for family in meters.snapshot() if family.instrument is each)
        return [Observation(number(point.value), dict(point.labels)) for point in points]

    return read
