"""Every error this product raises on purpose, and the exit codes they lead to.

OzWorkerError                one sentence for people: the thing, the place, the cure
 +- ConfigurationError       exit 2; carries every mistake found, each with its place
 +- NotUsable                exit 3; a preflight failed, a backend or a state directory cannot be used
 +- RefusedForGood           exit 77; the server said no and exit_on_refusal is set
 +- StoreError               the database could not do what was asked
 |   +- StoreFull            ... because the disk is full or read-only: the caller keeps the fact in memory
 +- TaskFault                this one task cannot go on; carries the facts for its report
 +- Stopped                  a backend call gave way to its unit's stop order
 +- Unanswered               an engine or a cluster did not answer: nothing is known of what was asked
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Sequence

if TYPE_CHECKING:
    from oz_worker.model import ExitFacts


class ExitCode(enum.IntEnum):
    """The process's exit codes (design, section 8); 128 + signal is added by "leave"."""

    STOPPED = 0
    FAULT = 1
    CONFIGURATION = 2
    NOT_USABLE = 3
    PROTOCOL_BROKEN = 4
    REFUSED = 77


class OzWorkerError(Exception):
    """Base of the tree. `str()` is one sentence that names the thing, the place and the cure."""

    exit_code = ExitCode.FAULT


class ConfigurationError(OzWorkerError):
    """All mistakes of a configuration at once; `str()` has one line for each."""

    exit_code = ExitCode.CONFIGURATION

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class NotUsable(OzWorkerError):
    """Something this worker needs at start is missing or forbidden."""

    exit_code = ExitCode.NOT_USABLE


class StoreError(OzWorkerError):
    """The database could not do what was asked."""


class StoreFull(StoreError):
    """The database cannot be written: disk full, quota, read-only."""


class TaskFault(OzWorkerError):
    """A task cannot go on. Raised by backends with facts; policy turns them into a report."""

    def __init__(self, facts: ExitFacts) -> None:
        super().__init__(facts.detail)
        self.facts = facts


class Stopped(OzWorkerError):
    """Raised by `Backend.prepare` or `start` after giving way to the unit's stop order."""


class Unanswered(OzWorkerError):
    """Whoever runs the work (an engine, a cluster) did not answer: nothing is known of what was asked."""
