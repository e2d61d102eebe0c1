"""What is measured of the running worker from outside its parts, and who gets the measurements.

The parts count what happens in them; here stands what is true all the time, and what is asked when somebody looks.
"""

from __future__ import annotations

import os
import time
from typing import Callable, Mapping, NamedTuple

from oz_worker import __version__
from oz_worker.engine.admission import Engine
from oz_worker.link.acks import Origin
from oz_worker.meters import Meters
from oz_worker.observe import exporters, otel_settings, resource, traces
from oz_worker.observe.exporters import Exporters, Source
from oz_worker.observe.logs import Logs
from oz_worker.observe.traces import Traces
from oz_worker.settings import Settings
from oz_worker.timing import Deadline
from oz_worker.tracing import NO_TRACER, Tracer

STOP_SECONDS = 2.0
"""For all exporters together at the end of the worker."""


class Observers(NamedTuple):
    """The ways out for metrics and traces. Main thread only."""

    exporters: Exporters
    traces: Traces | None

    @property
    def tracer(self) -> Tracer:
        """For the engine."""
        return self.traces or NO_TRACER

    def stop(self) -> None:
        """Send what is still to be sent, all at once; at most two seconds."""
        deadline = Deadline(STOP_SECONDS)
        if self.traces is not None:
            self.traces.finish()
        self.exporters.stop(deadline.left())
        if self.traces is not None:
            self.traces.join(deadline.left())


def choose(settings: Settings, instance: str, meters: Meters, environ: Mapping[str, str]) -> Observers:
    """What *environ* asks for, before there is anything to measure: an exporter misses nothing. Raises nothing."""
    attributes, warnings = resource.attributes(
        environ, version=__version__, worker_id=settings.worker_id, backend=settings.backend
    )
    settled = otel_settings.judge(environ)
    if any(exporters.named(environ, name) != [] for name in (exporters.VARIABLE, traces.VARIABLE)):
        os.environ.update(settled.corrected)  # where the SDK reads it, some of it when it is imported
    source = Source(
        meters,
        attributes,
        {**environ, **settled.corrected},
        instance,
        settings.ca_file,
        {**settled.warnings, "resource": warnings},
        exporters.once(),
    )
    return Observers(exporters.make(source), traces.make(source))


def begin(observers: Observers, settings: Settings, engine: Engine, server: Origin, logs: Logs) -> None:
    """Measure what is there, and start the exporters. Raises nothing, waits for nothing."""
    meters = engine.meters
    _constants(meters, settings)
    _readings(meters, engine, server, logs)
    observers.exporters.start()
    if observers.traces is not None:
        observers.traces.start()


def _constants(meters: Meters, settings: Settings) -> None:
    meters.set("oz_worker_info", 1, version=__version__, backend=settings.backend, worker_id=settings.worker_id)
    meters.set("oz_worker_tasks_max_concurrent", max(0, settings.max_concurrent_tasks))


def _readings(meters: Meters, engine: Engine, server: Origin, logs: Logs) -> None:
    backend = engine.primary.backend
    meters.compute("oz_worker_outbox_rows", engine.outbox.undelivered)
    meters.compute("oz_worker_outbox_oldest_seconds", engine.outbox.age)
    meters.compute("oz_worker_last_frame_age_seconds", _since(lambda: server.heard_at))
    meters.compute("oz_worker_last_pong_age_seconds", _since(lambda: server.answered_at))
    meters.compute("oz_worker_backend_up", lambda: 0.0 if backend.unavailable() else 1.0)
    meters.compute("oz_worker_log_lines_dropped_total", lambda: logs.dropped_total)
    if engine.limits.max_concurrent_tasks > 0:
        meters.compute("oz_worker_slots_free", lambda: max(0, engine.gate.most - engine.registry.counts()[0]))


def _since(moment: Callable[[], float | None]) -> Callable[[], float | None]:
    def age() -> float | None:
        at = moment()
        return None if at is None else time.monotonic() - at

    return age
