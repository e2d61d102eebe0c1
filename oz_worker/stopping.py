"""When the worker ends and how: signals, drain, exit_after, one_shot, dead threads. A state machine without I/O.

Each call of `Stopping.decide` looks at what came in and at the engine, gives the engine its orders and answers with
what the link is to do. Main thread only.

| on_shutdown | 1st TERM/INT                                   | 2nd          | 3rd   |
|-------------|------------------------------------------------|--------------|-------|
| cancel      | TERM to all tasks, KILL after stop_grace       | KILL now     | leave |
| drain       | finish what runs (at most drain_timeout)       | TERM + grace | leave |
| preserve    | at most 20 s for what is starting or ending    | leave        |       |

With nothing left to kill any further signal means leave: exit 128 + signal, everything left for the next start.
"""

from __future__ import annotations

import enum
import logging
import math
import signal
import time
from dataclasses import dataclass
from typing import Protocol

from oz_worker.errors import ExitCode
from oz_worker.link.traffic import Directive, Phase
from oz_worker.model import Refusal
from oz_worker.settings import Settings
from oz_worker.timing import format_duration

logger = logging.getLogger(__name__)

PRESERVE_SECONDS = 20.0
LONG_FLUSH = 60.0
BLIND_FLUSH = 8.0
"""Without pongs a frame counts as read 5 s after it was written (rule 15): a flush must last longer than that."""


class Work(Protocol):
    """What the decision needs of the engine."""

    ended: int
    last_end: float

    @property
    def accepted(self) -> int:
        """New tasks of this process."""

    def close_intake(self, refusal: Refusal | None) -> None:
        """Refuse new tasks."""

    def stop_all(self, grace: float) -> None:
        """TERM to all tasks, KILL after *grace* seconds."""

    def hurry_all(self) -> None:
        """KILL now."""

    def idle(self) -> bool:
        """Nothing is being worked on."""

    def starting(self) -> bool:
        """Something accepted does not run yet."""


@dataclass(frozen=True)
class StopOptions:
    """The keys of the configuration with these names; seconds."""

    on_shutdown: str
    stop_grace: float
    drain_timeout: float
    flush_timeout: float
    exit_tasks: int = 0
    exit_idle: float = 0.0
    exit_uptime: float = 0.0
    one_shot: bool = False

    @classmethod
    def of(cls, settings: Settings, *, short_lived: bool) -> StopOptions:
        """Those of *settings*; reports get more time where the next start will not find what is left."""
        flush = settings.flush_timeout
        if settings.link.acknowledgement == "write":
            flush = max(flush, BLIND_FLUSH)
        return cls(
            on_shutdown=settings.on_shutdown,
            stop_grace=settings.stop_grace,
            drain_timeout=settings.drain_timeout,
            flush_timeout=max(flush, LONG_FLUSH) if short_lived else flush,
            exit_tasks=settings.exit_after.tasks,
            exit_idle=settings.exit_after.idle,
            exit_uptime=settings.exit_after.uptime,
            one_shot=settings.one_shot,
        )


class Step(enum.Enum):
    """How far the stop has come."""

    RUNNING = "running"
    DRAINING = "draining"  # intake closed, tasks go on
    ENDING = "ending"  # tasks have their TERM
    KILLING = "killing"  # and their KILL
    SETTLING = "settling"  # preserve: what is starting gets its time
    FLUSHING = "flushing"  # nothing is being worked on; reports leave
    LEAVING = "leaving"


class Stopping:
    """Decides; see the module's docstring. `exit_code` is the process's answer once the link has returned."""

    def __init__(self, options: StopOptions, work: Work) -> None:
        self._options = options
        self._work = work
        self._started = time.monotonic()
        self._limit = math.inf  # when the present step gives way to the next
        self.step = Step.RUNNING
        self.exit_code: int = ExitCode.STOPPED

    @property
    def stopping(self) -> bool:
        """Whether the intake is closed."""
        return self.step is not Step.RUNNING

    def signalled(self, number: signal.Signals) -> None:
        """TERM, INT or USR1 came in."""
        if number is signal.SIGUSR1:
            if self.step is Step.RUNNING:
                self._drain("USR1")
            return
        escalation = {
            (Step.RUNNING, "cancel"): self._end_tasks,
            (Step.RUNNING, "drain"): self._drain,
            (Step.RUNNING, "preserve"): self._settle,
            (Step.DRAINING, "cancel"): self._end_tasks,
            (Step.DRAINING, "drain"): self._end_tasks,
            (Step.DRAINING, "preserve"): self._settle,
            (Step.ENDING, "cancel"): self._kill_tasks,
        }
        act = escalation.get((self.step, self._options.on_shutdown))
        if act is None or (self.step is not Step.RUNNING and self._work.idle()):
            self._leave(number)
        else:
            act(number.name)

    def part_died(self, name: str) -> None:
        """An essential thread died: leave with exit 1; tasks are left as after a kill -9, for the next start."""
        logger.critical(
            "thread %s died, so this worker would be alive but useless: leaving, tasks are left running", name
        )
        self._work.close_intake(Refusal.DRAINING)
        self.exit_code = ExitCode.FAULT
        self._flush()

    def refused(self, sentence: str) -> None:
        """The server said no, and the configuration says to leave then."""
        if self.step is Step.RUNNING:
            logger.error("leaving, because exit_on_refusal is set: %s", sentence)
            self.exit_code = ExitCode.REFUSED
            self._drain("refusal")

    def decide(self) -> Directive:
        """What the link is to do now, and when to ask again at the latest."""
        if self.step is Step.RUNNING:
            self._look_at_limits()
        if self.step is Step.DRAINING and time.monotonic() >= self._limit:
            logger.warning("drain_timeout is over")
            self._end_tasks("drain_timeout")
        if self.step is Step.SETTLING and (time.monotonic() >= self._limit or not self._work.starting()):
            self._flush()
        if self.step in (Step.DRAINING, Step.ENDING, Step.KILLING) and self._work.idle():
            self._flush()
        if self.step is Step.LEAVING:
            return Directive(Phase.LEAVE)
        if self.step is Step.FLUSHING:
            return Directive(Phase.FLUSH, until=self._limit)
        return Directive(Phase.RUN, call_again=min(self._limit, self._next_limit()))

    # -- steps

    def _drain(self, why: str) -> None:
        limit = self._options.drain_timeout
        within = f" (at most {format_duration(limit)})" if limit else ""
        logger.info("%s: taking no new tasks, finishing what runs%s; TERM once more to end the tasks", why, within)
        self._enter(Step.DRAINING, limit or math.inf)

    def _end_tasks(self, why: str) -> None:
        grace = self._options.stop_grace
        following = "kill them now" if self._options.on_shutdown == "cancel" else "leave at once"
        logger.info("%s: ending all tasks, grace %s; TERM once more to %s", why, format_duration(grace), following)
        self._enter(Step.ENDING, math.inf)
        self._work.stop_all(grace)

    def _kill_tasks(self, why: str) -> None:
        logger.warning("%s: killing all tasks; TERM once more to leave at once", why)
        self._enter(Step.KILLING, math.inf)
        self._work.hurry_all()

    def _settle(self, why: str) -> None:
        logger.info("%s: taking no new tasks, leaving the running ones for the next start; once more to leave now", why)
        self._enter(Step.SETTLING, PRESERVE_SECONDS)

    def _flush(self) -> None:
        self._enter(Step.FLUSHING, self._options.flush_timeout)

    def _leave(self, number: signal.Signals) -> None:
        logger.warning("%s: leaving at once, everything is left for the next start", number.name)
        self.exit_code = 128 + number
        self._enter(Step.LEAVING, math.inf)

    def _enter(self, step: Step, seconds: float) -> None:
        self._work.close_intake(
            Refusal.ONE_SHOT if self._options.one_shot and self._work.accepted else Refusal.DRAINING
        )
        self.step = step
        self._limit = time.monotonic() + seconds

    # -- exit_after and one_shot

    def _look_at_limits(self) -> None:
        options, work, now = self._options, self._work, time.monotonic()
        if options.one_shot and work.accepted:
            self._drain("one_shot: the task is here") if not work.idle() else self._flush()
        elif options.exit_tasks and work.accepted >= options.exit_tasks:
            self._drain(f"exit_after.tasks: {work.accepted} accepted")
        elif options.exit_uptime and now - self._started >= options.exit_uptime:
            self._drain("exit_after.uptime")
        elif options.exit_idle and work.idle() and now - work.last_end >= options.exit_idle:
            self._drain("exit_after.idle")

    def _next_limit(self) -> float:
        if self.step is not Step.RUNNING:
            return math.inf
        limits = [math.inf]
        if self._options.exit_uptime:
            limits.append(self._started + self._options.exit_uptime)
        if self._options.exit_idle and self._work.idle():
            limits.append(self._work.last_end + self._options.exit_idle)
        return min(limits)
