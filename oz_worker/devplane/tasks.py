"""A task as the control plane sees it: what was sent, what the worker and the agent said."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import NamedTuple

from oz_worker.devplane.rules import ENDED, GONE, OPEN, REFUSED, Attempt, Ledger
from oz_worker.devplane.wire import COMPLETED, Frame, Key

OUTPUT_KEPT = 1024 * 1024

QUEUED, SENT, CLAIMED, REJECTED, SUCCEEDED, FAILED, CANCELLED = (
    "queued",
    "sent",
    "claimed",
    "rejected",
    "completed",
    "failed",
    "cancelled",
)


class Received(NamedTuple):
    """A frame of a worker, the connection it came on, and when (monotonic)."""

    frame: Frame
    connection: int
    at: float


@dataclass(eq=False)
class Task:
    """One key. Read it only inside `ControlPlane.wait_for`, under its lock, or when nothing changes any more.

    `text` is its assignment as sent; `secret` the bearer its agent uses; `output` what the agent sent (the first
    1 MiB of it, `output_size` all), `agent_code` the exit code that the sample agent told; `cancelled_at` is when the
    first cancel went out. Times are monotonic.
    """

    key: Key
    run_id: str
    text: str
    secret: str
    script: str
    ledger: Ledger
    requeue: bool = True
    submitted_at: float = field(default_factory=time.monotonic)
    sent_at: float | None = None
    ended_at: float | None = None
    deliveries: int = 0
    waiting: bool = True
    history: list[Received] = field(default_factory=list)
    output: bytearray = field(default_factory=bytearray)
    output_size: int = 0
    agent_code: int | None = None
    cancelled_at: float | None = None

    @property
    def task_id(self) -> str:
        """Its task id."""
        return self.key.task_id

    @property
    def execution_id(self) -> str:
        """Its execution id, maybe empty."""
        return self.key.execution_id

    @property
    def attempt(self) -> Attempt:
        """The current attempt."""
        return self.ledger.attempt

    @property
    def terminal(self) -> Frame | None:
        """The report that ended the current attempt."""
        return self.attempt.terminal

    @property
    def claimed(self) -> bool:
        """Whether the current attempt was claimed."""
        return self.attempt.claim is not None

    @property
    def closed(self) -> bool:
        """Whether `execution_closed` came for the current attempt."""
        return self.attempt.closed is not None

    @property
    def acknowledged(self) -> bool:
        """Whether the worker was told that its terminal report has been read."""
        return self.attempt.acknowledged

    @property
    def ended(self) -> bool:
        """Whether the current attempt has its terminal report."""
        return self.terminal is not None

    @property
    def state(self) -> str:
        """queued, sent, claimed, rejected, completed, failed or cancelled."""
        state = self.ledger.state
        if state == ENDED and self.terminal is not None:
            if self.terminal.cancelled:
                return CANCELLED
            return SUCCEEDED if self.terminal.kind == COMPLETED else FAILED
        if self.waiting and state in ("", REFUSED, GONE):
            return REJECTED if state == REFUSED else QUEUED
        return {OPEN: SENT, REFUSED: REJECTED, GONE: CANCELLED}.get(state, CLAIMED)

    def append(self, data: bytes) -> None:
        """Keep a piece of what the agent printed."""
        self.output += data[: max(0, OUTPUT_KEPT - len(self.output))]
        self.output_size += len(data)

    def frames(self, kind: str) -> list[Frame]:
        """Every frame of that type received for this key, repeats included."""
        return [entry.frame for entry in self.history if entry.frame.kind == kind]
