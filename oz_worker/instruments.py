"""Everything that is measured: the one list from which every exporter, dashboard and alert takes its names.

The first ten are the existing worker's, with its names, labels, units and priming, so that its dashboards go on
working; the others are this worker's own. A label value is always one of a small closed set, which stands here, and
`Meters` counts any other one as `unknown`; those of `oz_worker_info` alone are free.
"""

from __future__ import annotations

from oz_worker.meters import Instrument, Kind
from oz_worker.model import Reason, Refusal

SCOPE = "github.com/warpdotdev/oz-agent-worker"
"""The instrumentation scope: part of what dashboards may select by."""

PHASES = ("assignment", "backend", "cleanup")
RESULTS = ("succeeded", "failed", "cancelled", "dispatched")
AGENT_OOM = "agent_oom"
"""A label, not a reason on the wire: the agent was killed for memory on the host."""
REASONS = (*(reason.value for reason in Reason), AGENT_OOM)
REATTACHED = ("attached", "adopted", "never_started", "lost", "ending")
"""What a restarted worker found of a task: its unit; a unit without a row; nothing, before or after its start; its end
already fixed."""
PULLED = ("succeeded", "failed")
FRAMES_REFUSED = ("not_json", "too_deep", "not_object", "no_type", "unknown_type", "no_task_id", "bad_execution_id")

ONE = ((),)
"""Primed without labels."""

_SHORT = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_PULL = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0, 3600.0)


def _singles(values: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    return tuple((value,) for value in values)


EXISTING = (
    Instrument("oz_worker_connected", Kind.GAUGE, "1 while connected to the control plane, otherwise 0.", (), ONE),
    Instrument("oz_worker_tasks_active", Kind.UP_DOWN, "Tasks that take a slot of this worker just now.", (), ONE),
    Instrument(
        "oz_worker_tasks_max_concurrent", Kind.GAUGE, "Most tasks at a time that are allowed; 0 is unlimited.", (), ONE
    ),
    Instrument("oz_worker_tasks_claimed_total", Kind.COUNTER, "Tasks accepted since the worker's start.", (), ONE),
    Instrument(
        "oz_worker_tasks_rejected_total",
        Kind.COUNTER,
        "Tasks refused since the worker's start, by reason; the control plane queues them again.",
        ("reason",),
        _singles(tuple(refusal.label for refusal in Refusal)),
    ),
    Instrument(
        "oz_worker_tasks_completed_total",
        Kind.COUNTER,
        "Tasks over since the worker's start, by result.",
        ("result",),
        _singles(RESULTS),
    ),
    Instrument(
        "oz_worker_task_duration_seconds",
        Kind.HISTOGRAM,
        "Time from the acceptance of a task to its end, by result.",
        ("result",),
        unit="s",
        later=_singles(RESULTS),
    ),
    Instrument(
        "oz_worker_task_failures_total",
        Kind.COUNTER,
        "Failures of tasks since the worker's start, by phase and reason.",
        ("phase", "reason"),
        tuple((phase, reason) for phase in PHASES for reason in REASONS),
    ),
    Instrument(
        "oz_worker_websocket_reconnects_total",
        Kind.COUNTER,
        "Connections that failed or ended and are tried again, by reason.",
        ("reason",),
        _singles(("dial_failed", "remote_close")),
    ),
    Instrument(
        "oz_worker_info", Kind.GAUGE, "Always 1; its labels say what runs.", ("version", "backend", "worker_id")
    ),
)

OWN = (
    Instrument("oz_worker_outbox_rows", Kind.GAUGE, "Reports the control plane has not acknowledged.", (), ONE),
    Instrument(
        "oz_worker_outbox_oldest_seconds",
        Kind.GAUGE,
        "Age of the oldest report the control plane has not acknowledged; 0 when there is none.",
        (),
        ONE,
        unit="s",
    ),
    Instrument(
        "oz_worker_last_frame_age_seconds",
        Kind.GAUGE,
        "Time since a frame came from the control plane; absent before the first one.",
        unit="s",
    ),
    Instrument(
        "oz_worker_last_pong_age_seconds",
        Kind.GAUGE,
        "Time since the control plane last acknowledged by a pong; absent before the first one.",
        unit="s",
    ),
    Instrument("oz_worker_slots_free", Kind.GAUGE, "Slots that are free; absent when there is no limit."),
    Instrument("oz_worker_backend_up", Kind.GAUGE, "1 while the backend can take tasks, otherwise 0."),
    Instrument(
        "oz_worker_dispatch_seconds",
        Kind.HISTOGRAM,
        "Time from the acceptance of a task until the backend has started it.",
        unit="s",
        bounds=_SHORT,
    ),
    Instrument(
        "oz_worker_image_pull_seconds",
        Kind.HISTOGRAM,
        "Time that pulls of images took, by result.",
        ("result",),
        unit="s",
        bounds=_PULL,
        later=_singles(PULLED),
    ),
    Instrument(
        "oz_worker_tasks_reattached_total",
        Kind.COUNTER,
        "Tasks of an earlier process taken up again, by what was found of them.",
        ("result",),
        _singles(REATTACHED),
    ),
    Instrument(
        "oz_worker_task_sandbox_startup_failures_total",
        Kind.COUNTER,
        "Tasks that failed before their agent could work, by reason.",
        ("reason",),
        _singles(REASONS),
    ),
    Instrument(
        "oz_worker_frames_refused_total",
        Kind.COUNTER,
        "Messages of the control plane that nothing could be done about, by kind.",
        ("kind",),
        _singles(FRAMES_REFUSED),
    ),
    Instrument("oz_worker_log_lines_dropped_total", Kind.COUNTER, "Lines of the worker's log that were lost.", (), ONE),
    Instrument(
        "oz_worker_watchdog_trips_total",
        Kind.COUNTER,
        "Times that the watchdog found an essential thread stuck or dead.",
        (),
        ONE,
    ),
)

CATALOGUE = (*EXISTING, *OWN)
