"""`otlp` for metrics: pushed to a collector at each interval by the SDK of OpenTelemetry (the extra `otel`)."""

from __future__ import annotations

import logging
from typing import NamedTuple

from oz_worker.meters import Labels
from oz_worker.observe.exporters import Source
from oz_worker.observe.otel_thread import OtelThread, Sdk, installed
from oz_worker.observe.otlp_target import Unusable

logger = logging.getLogger(__name__)


class Observed(NamedTuple):
    """One value of a histogram: the SDK cannot read these from elsewhere, it has to be told each."""

    name: str
    value: float
    labels: Labels


class OtlpExporter:
    """An `Exporter`. What is observed before `start` waits for it."""

    def __init__(self, source: Source, *, asked: bool) -> None:
        self._source = source
        self._asked = asked
        self._thread: OtelThread[Observed] = OtelThread("otel-metrics", self._build, source.warn)
        source.meters.on_observe = self._observed

    def start(self) -> None:
        """Begin. Returns at once."""
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """Export once more; at most *seconds*, then it is left behind."""
        self._thread.finish()
        self._thread.join(seconds)

    def _observed(self, name: str, value: float, labels: Labels) -> None:
        self._thread.post(Observed(name, value, labels))

    def _build(self) -> Sdk[Observed] | None:
        if not installed():
            if self._asked:
                raise Unusable(
                    "OTEL_METRICS_EXPORTER asks for otlp, which needs OpenTelemetry: install the extra otel"
                    " (pip install 'oz-worker[otel]'), or set OTEL_METRICS_EXPORTER to prometheus, console or none"
                )
            logger.debug("metrics are not exported: OTEL_METRICS_EXPORTER is unset and the extra otel is not installed")
            return None
        self._source.warn_of("resource", "interval", "metrics")
        from oz_worker.observe import otel_metrics

        return otel_metrics.SdkMetrics(self._source)
