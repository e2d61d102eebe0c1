"""From facts and lifecycle to what the server and people are told: the one place where reasons are chosen.

Pure functions: a backend says what it saw, the row says who ended it, the text names the cure.
"""

from __future__ import annotations

from typing import NamedTuple

from oz_worker.model import Cause, ExitFacts, Key, Reason, Report, ReportKind

COMPLETED = "Task completed successfully"
CANCELLED = "Task cancelled by user request."
SHUT_DOWN = (
    "The worker was stopped while this task ran, so the task was ended. Run it again; to let tasks finish or survive a"
    " stop of the worker, set on_shutdown to drain or preserve."
)
TIMED_OUT = (
    "The task ran longer than the worker's task_timeout and was ended. Give it less to do, or raise task_timeout."
)
NEVER_STARTED = "The task was accepted but never started, because the worker stopped before. Run it again."
LOST = (
    "The end of this task was not recorded: the agent was killed or the host restarted. Look at what it had pushed,"
    " then run it again."
)
MESSAGE_BYTES = 4096

STARTUP_SECONDS = 300.0
_ENDED_BY_WORKER = frozenset(
    reason.value for reason in (Reason.TASK_TIMEOUT, Reason.TASK_CANCELLED, Reason.GRACEFUL_SHUTDOWN, Reason.UNKNOWN)
)
_OF_THE_SANDBOX = frozenset(
    reason.value
    for reason in (
        Reason.CONTAINER_WAIT,
        Reason.JOB_WATCH,
        Reason.POD_WATCH,
        Reason.JOB_FAILED,
        Reason.EVICTED,
        Reason.UNSCHEDULABLE,
        Reason.VOLUME_MOUNT,
    )
)


class Outcome(NamedTuple):
    """The report of an end, and how the metrics count it."""

    report: Report
    result: str  # succeeded | failed | cancelled
    metric_reason: str = ""
    phase: str = "backend"


def judge(key: Key, facts: ExitFacts, cause: Cause | None, tail: str = "") -> Outcome:
    """What is reported of *facts* when *cause* (the first one committed, or None) ended the task."""
    if cause is Cause.CANCEL:
        report = Report(ReportKind.COMPLETED, key, _with_remains(CANCELLED, facts), cancelled=True)
        return Outcome(report, "cancelled")
    if cause is Cause.SHUTDOWN:
        return _failed(key, Reason.GRACEFUL_SHUTDOWN, facts.code, _with_remains(SHUT_DOWN, facts))
    if cause is Cause.DEADLINE:
        return _failed(key, Reason.TASK_TIMEOUT, facts.code, _with_tail(_with_remains(TIMED_OUT, facts), tail))
    if facts.reason is None and facts.code == 0:
        return Outcome(Report(ReportKind.COMPLETED, key, COMPLETED), "succeeded")
    reason = facts.reason or Reason.UNKNOWN
    text = facts.detail or (NEVER_STARTED if not facts.agent_started else LOST)
    metric = "agent_oom" if facts.oom and reason is Reason.AGENT_INVOCATION else ""
    return _failed(key, reason, facts.code, _with_tail(_with_remains(text, facts), tail), metric)


def never_started() -> ExitFacts:
    """Facts of a task of which a restarted worker finds nothing outside."""
    return ExitFacts(reason=Reason.UNKNOWN, detail=NEVER_STARTED, agent_started=False)


def lost() -> ExitFacts:
    """Facts of a task that had been started and of which a restarted worker finds nothing at all."""
    return ExitFacts(reason=Reason.AGENT_INVOCATION, detail=LOST)


def invalid(key: Key, sentence: str) -> Outcome:
    """The report of an assignment that cannot be run as it stands."""
    report = Report(ReportKind.FAILED, key, _cut(sentence), Reason.UNKNOWN)
    return Outcome(report, "failed", Reason.UNKNOWN.value, phase="assignment")


def failed_to_start(reason: str, *, agent_started: bool, seconds: float) -> bool:
    """Whether a failed task is the fault of what was to carry its agent, not of the agent (oz.md 23, #112).

    So where it is proven that the agent never ran; and, because nobody sees an agent work, where within five minutes of
    the acceptance the sandbox ended by itself. *reason* is a metric label.
    """
    if not agent_started:
        return reason not in _ENDED_BY_WORKER
    return reason in _OF_THE_SANDBOX and seconds <= STARTUP_SECONDS


def _failed(key: Key, reason: Reason, code: int | None, text: str, metric_reason: str = "") -> Outcome:
    report = Report(ReportKind.FAILED, key, _cut(text), reason, code or None)
    return Outcome(report, "failed", metric_reason or reason.value)


def _with_remains(text: str, facts: ExitFacts) -> str:
    if not facts.remains:
        return text
    return f"{text} Not confirmed gone: {facts.remains}; look there and end it by hand."


def _with_tail(text: str, tail: str) -> str:
    return f"{text}\nLast output:\n{tail}" if tail else text


def _cut(text: str) -> str:
    raw = text.encode("utf-8", "replace")
    if len(raw) <= MESSAGE_BYTES:
        return text
    return raw[: MESSAGE_BYTES - 4].decode("utf-8", "ignore") + " …"
