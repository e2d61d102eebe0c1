"""What people are told of one task: its lines in the log, the counts of the metrics, the events of its span."""

from __future__ import annotations

import logging
from typing import Callable

from oz_worker.engine import verdict
from oz_worker.meters import Meters
from oz_worker.model import ExitFacts
from oz_worker.rows import TaskRow
from oz_worker.tracing import Span

logger = logging.getLogger(__name__)

_REASONS = {"teardown": "teardown_command", "cancel_command": "cancel_command"}
"""By what was tried after an end: the reason that its failure is counted with; `cleanup` for all else."""


class Account:
    """That of the task of *row*, which is only read. Safe from any thread; nothing here blocks or raises."""

    def __init__(self, row: TaskRow, meters: Meters, span: Span) -> None:
        self._row = row
        self._meters = meters
        self._span = span

    def edge(self, what: str) -> None:
        """It has come to another state."""
        logger.info("task %s %s", self._row.key, what)

    def ended(self, facts: ExitFacts, tail: str) -> None:
        """Its outcome is fixed; *tail* is the end of its output, masked."""
        row = self._row
        if row.result == "failed":
            code = f", exit code {row.exit_code}" if row.exit_code else ""
            detail = f". {facts.detail}" if facts.detail else ""
            logger.warning("task %s failed: %s%s%s", row.key, row.reason, code, detail)
            if tail:
                logger.warning("task %s last output:\n%s", row.key, tail)
        else:
            logger.info("task %s %s", row.key, row.result)

    def counted(self) -> None:
        """Its report may leave. Called once."""
        row = self._row
        seconds = max(0.0, (row.ended_at or 0) - row.accepted_at)
        self._meters.count("oz_worker_tasks_completed_total", result=row.result)
        self._meters.observe("oz_worker_task_duration_seconds", seconds, result=row.result)
        if row.result == "failed":
            self._meters.count("oz_worker_task_failures_total", phase="backend", reason=row.reason)
            if verdict.failed_to_start(row.reason, agent_started=row.agent_started, seconds=seconds):
                self._meters.count("oz_worker_task_sandbox_startup_failures_total", reason=row.reason)
            code = {} if row.exit_code is None else {"exit_code": row.exit_code}
            self._span.event("task.failed", phase="backend", reason=row.reason, **code)
        else:
            self._span.event("task.completed" if row.result == "succeeded" else f"task.{row.result}")

    def trouble(self, what: str, sentence: str) -> None:
        """Something that belongs to its end has failed, if there is a *sentence*: its report goes out all the same."""
        if sentence:
            reason = _REASONS.get(what, "cleanup")
            self._meters.count("oz_worker_task_failures_total", phase="cleanup", reason=reason)
            failed = "cancel.failed" if what == "cancel_command" else "cleanup.failed"
            self._span.event(failed, phase="cleanup", reason=reason)
            logger.warning("task %s: %s: %s", self._row.key, what, sentence)

    def guarded(self, call: Callable[[], str]) -> str:
        """What a backend's *call* after the end says; its failure becomes a sentence."""
        try:
            return call()
        except Exception as error:  # foreign code below
            logger.exception("task %s: internal error after its end", self._row.key)
            return f"internal error ({type(error).__name__}: {error})"
