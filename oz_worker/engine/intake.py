"""What a dialect may ask of the engine. Every method returns without blocking on I/O (the main thread calls)."""

from __future__ import annotations

from typing import Protocol

from oz_worker.model import Key, TaskSpec


class Intake(Protocol):
    """Commands of a control plane, freed of their wire format."""

    def assign(self, spec: TaskSpec) -> None:
        """Take a task, or answer why not: claim, rejection, or the report of an execution that already ended."""

    def invalid(self, key: Key, sentence: str) -> None:
        """An assignment whose id is readable and whose rest is not: reported as failed, reason `unknown`."""

    def cancel(self, task_id: str, execution_id: str) -> None:
        """End that execution, or all of the task's when *execution_id* is empty."""
