"""Spans by the SDK. Imported on the thread `otel-traces` only."""

from __future__ import annotations

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter
from opentelemetry.trace import Status, StatusCode

from oz_worker.instruments import SCOPE
from oz_worker.observe import otel_exporters
from oz_worker.observe.exporters import Source
from oz_worker.observe.otlp_target import Unusable
from oz_worker.observe.outage import Outage
from oz_worker.observe.traces import RecordedSpan

SPAN = "oz_worker.task"


class SdkTraces:
    """A provider with a batching processor, whose queue is bounded (OTEL_BSP_MAX_QUEUE_SIZE), for each exporter."""

    def __init__(self, exporters: list[tuple[SpanExporter, Outage | None]], resource: Resource) -> None:
        self._exporters = exporters
        # Sampler and limits from OTEL_TRACES_SAMPLER and its like: the SDK reads those by itself.
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        for exporter, _outage in exporters:
            self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer(SCOPE)

    def take(self, item: RecordedSpan) -> None:
        """Export a span that has ended. It has no parent, and nothing of it is passed to the task."""
        span = self._tracer.start_span(
            SPAN, context=Context(), start_time=item.started, attributes=dict(item.attributes)
        )
        for at, name, attributes in list(item.events):
            span.add_event(name, dict(attributes), timestamp=at)
            if name == "task.failed":
                span.set_status(Status(StatusCode.ERROR, str(attributes["reason"])))
        span.end(item.ended)

    def look(self) -> None:
        """See whether a collector is late."""
        for _exporter, outage in self._exporters:
            if outage is not None:
                outage.look()

    def close(self) -> None:
        """Deliver what is left, but nothing to where nobody takes it."""
        for exporter, outage in self._exporters:
            if outage is not None:
                outage.leave(exporter.shutdown)
        self._provider.shutdown()

    def silence(self) -> None:
        """Say nothing of what is lost now."""
        for _exporter, outage in self._exporters:
            if outage is not None:
                outage.say_nothing_more()


def make(names: tuple[str, ...], source: Source) -> SdkTraces:
    """The exporters of *names*, each alone: one that cannot be had takes no other with it. Raises Unusable."""
    exporters: list[tuple[SpanExporter, Outage | None]] = []
    for name in names:
        if name == "console":
            exporters.append((ConsoleSpanExporter(), None))
            continue
        try:
            exporters.append(otel_exporters.otlp("traces", source))
        except Unusable as error:
            if len(names) == 1:
                raise
            source.warn(f"{error}; the worker runs without this exporter")
    return SdkTraces(exporters, otel_exporters.resource_of(source.resource, source.instance))
