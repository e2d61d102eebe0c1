"""`console`: the metrics as one line of JSON on stdout at each interval, for people and for log collectors."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from typing import Mapping

from oz_worker import threads
from oz_worker.instruments import SCOPE
from oz_worker.meters import Family, Meters
from oz_worker.observe.otel_settings import INTERVAL, whole

logger = logging.getLogger(__name__)

DEFAULT_MILLISECONDS = 60_000
STDOUT = 1


def interval(environ: Mapping[str, str]) -> float:
    """Seconds between two exports, from OTEL_METRIC_EXPORT_INTERVAL as `otel_settings` has corrected it."""
    return (whole(environ.get(INTERVAL, "")) or DEFAULT_MILLISECONDS) / 1000


def document(families: tuple[Family, ...], resource: Mapping[str, str], now: float) -> dict[str, object]:
    """What a line says: `resource`, `scope`, and of each metric its kind, unit and points."""
    return {
        "time": now,
        "resource": dict(resource),
        "scope": SCOPE,
        "metrics": [_metric(family) for family in families if family.points or family.distributions],
    }


def _metric(family: Family) -> dict[str, object]:
    instrument = family.instrument
    points: list[dict[str, object]] = [
        {"labels": dict(point.labels), "value": point.value if math.isfinite(point.value) else None}
        for point in family.points
    ]
    points += [
        {
            "labels": dict(each.labels),
            "bounds": instrument.bounds,
            "buckets": each.buckets,
            "sum": each.total,
            "count": each.number,
        }
        for each in family.distributions
    ]
    return {"name": instrument.name, "kind": instrument.kind.value, "unit": instrument.unit, "points": points}


class ConsoleExporter:
    """Writes on a thread `console-metrics`, which a reader of stdout that stops may block for ever; an Exporter.

    The thread waits for its stop event and in `write`. Its end, a closed stdout for instance, costs one line.
    """

    def __init__(self, meters: Meters, resource: Mapping[str, str], seconds: float) -> None:
        self._meters = meters
        self._resource = resource
        self._seconds = seconds
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Write at each interval."""
        self._thread = threads.start("console-metrics", self._run, lambda _name, _error: None)

    def stop(self, seconds: float) -> None:
        """Write once more and end."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(seconds)

    def _run(self) -> None:
        try:
            while not self._stop.wait(self._seconds):
                self._write()
            self._write()
        except OSError as error:
            logger.warning("metrics are not written to stdout any more (%s); the worker runs on", error.strerror)

    def _write(self) -> None:
        line = json.dumps(document(self._meters.snapshot(), self._resource, time.time())) + "\n"
        raw = line.encode()
        while raw:
            try:
                raw = raw[os.write(STDOUT, raw) :]
            except BlockingIOError:  # somebody made our stdout non-blocking
                time.sleep(0.05)
