"""Traces: one span for each assignment, when `OTEL_TRACES_EXPORTER` asks.

| value        | what follows                                                         |
|--------------|----------------------------------------------------------------------|
| unset, empty | nothing; nothing is imported                                         |
| `otlp`       | pushed to a collector; one clear line when the extra is missing      |
| `console`    | JSON on stdout, every few seconds; needs the extra too               |
| `none`       | nothing, whatever else is in the list                                |
| a,b          | each of them                                                         |

`OTEL_SDK_DISABLED=true` is the same as `none`. A span costs a task a few appends to a list; it is handed to the SDK as
a whole when it ends, on a thread of its own.
"""

from __future__ import annotations

import logging
import time
from typing import Mapping

from oz_worker.observe import exporters
from oz_worker.observe.exporters import Source
from oz_worker.observe.otel_thread import OtelThread, Sdk, installed
from oz_worker.observe.otlp_target import Unusable
from oz_worker.tracing import Span, Tracer

logger = logging.getLogger(__name__)

VARIABLE = "OTEL_TRACES_EXPORTER"
KNOWN = ("otlp", "console", "none")
MOST_EVENTS = 128
"""In one span; a server that repeats itself for ever must not fill the memory."""


class RecordedSpan(Span):
    """What happened to one assignment. Events are appended by several threads; nobody reads before `end`."""

    __slots__ = ("_thread", "attributes", "ended", "events", "started")

    def __init__(self, thread: OtelThread[RecordedSpan], attributes: dict[str, str | bool], started: int) -> None:
        self._thread = thread
        self.attributes = attributes
        self.started = started  # nanoseconds since the epoch, as are all times here
        self.ended = 0
        self.events: list[tuple[int, str, Mapping[str, str | int]]] = [(started, "task.assigned", {})]

    def event(self, name: str, **attributes: str | int) -> None:
        """Note it with the time."""
        if len(self.events) < MOST_EVENTS and not self.ended:
            self.events.append((time.time_ns(), name, attributes))

    def end(self) -> None:
        """Hand it over."""
        if not self.ended:
            self.ended = time.time_ns()
            self._thread.post(self)


class Traces(Tracer):
    """Records spans and has them exported. A `Tracer` that is started and stopped."""

    def __init__(self, thread: OtelThread[RecordedSpan]) -> None:
        self._thread = thread

    def start(self) -> None:
        """Begin. Returns at once."""
        self._thread.start()

    def finish(self) -> None:
        """Send what is still to be sent. Returns at once."""
        self._thread.finish()

    def join(self, seconds: float) -> None:
        """Wait until it is sent, at most *seconds*."""
        self._thread.join(seconds)

    def begin(
        self,
        task_id: str,
        execution_id: str = "",
        *,
        title: str = "",
        accepted_at: float = 0.0,
        reattached: bool = False,
    ) -> Span:
        """A span that is recorded."""
        attributes: dict[str, str | bool] = {"task.id": task_id}
        if title:
            attributes["task.title"] = title
        if execution_id:
            attributes["task.execution_id"] = execution_id
        if reattached:
            attributes["task.reattached"] = True
        return RecordedSpan(self._thread, attributes, int(accepted_at * 1e9) or time.time_ns())


def make(source: Source) -> Traces | None:
    """What the environment asks for, None for nothing. Warns of what cannot be had; raises nothing."""
    names, _asked, warnings = exporters.chosen(source.environ, VARIABLE, KNOWN, default="")
    for warning in warnings:
        source.warn(warning)
    if not names:
        return None

    def build() -> Sdk[RecordedSpan] | None:
        if not installed():
            raise Unusable(
                f"{VARIABLE} asks for {' and '.join(names)}, which needs OpenTelemetry: install the extra otel"
                f" (pip install 'oz-worker[otel]'), or set {VARIABLE} to none"
            )
        source.warn_of("resource", "traces")
        from oz_worker.observe import otel_traces

        return otel_traces.make(names, source)

    return Traces(OtelThread("otel-traces", build, source.warn))
