"""The engine: what it accepts, refuses, cancels, and which tasks are alive.

An assignment is decided inside the transaction that writes its row: the store's thread runs one decision after the
other, so two assignments of one key, an assignment and a cancel, an end and a redelivery have an order, and what was
decided is durable before it is said.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import logging
import math
import os
import sqlite3
import threading
import time
from typing import Callable

from oz_worker import rows, threads
from oz_worker.backends.base import Unit
from oz_worker.engine import verdict
from oz_worker.engine.cancellation import Cancellation
from oz_worker.engine.follow import Follower
from oz_worker.engine.gate import OF_PLACE, Gate, Limits
from oz_worker.engine.instance import Instance
from oz_worker.engine.notes import Notes
from oz_worker.engine.outbox import Outbox
from oz_worker.engine.output import Output
from oz_worker.engine.past import Past
from oz_worker.engine.registry import Registry
from oz_worker.engine.task import Task
from oz_worker.errors import StoreError
from oz_worker.lifecycle import FINAL, State
from oz_worker.meters import Meters
from oz_worker.model import Cause, Key, Refusal, Report, ReportKind, TaskSpec, unit_name
from oz_worker.rows import OutboxRow, TaskRow
from oz_worker.store import peek
from oz_worker.tracing import NO_TRACER, Tracer

logger = logging.getLogger(__name__)


class Engine:
    """Implements `Intake` for the dialect and the task's `Surroundings`. Safe from any thread where not said."""

    def __init__(
        self,
        primary: Instance,
        *,
        outbox: Outbox,
        meters: Meters,
        output: Output,
        limits: Limits,
        encode: Callable[[Report], str],
        on_change: Callable[[], None],
        on_death: Callable[[str, BaseException], None],
        tracer: Tracer = NO_TRACER,
    ) -> None:
        self.outbox = outbox
        self.meters = meters
        self.tracer = tracer
        self.output = output
        self.follower: Follower | None = None  # set by the daemon under `task_output: log`
        self.on_removal_due: Callable[[], None] = lambda: None  # set by upkeep, which removes
        self.encode = encode
        self.stop_grace = limits.stop_grace
        self.cleanup = limits.cleanup
        self.keep_failed = limits.keep_failed
        self.limits = limits
        self.uid = os.getuid()
        self.primary = primary
        self.instances: list[Instance] = [primary]
        self.past = Past(primary.path.parent)
        self.last_end = time.monotonic()
        self.ended = 0  # tasks whose thread is done
        self._on_change = on_change
        self._on_death = on_death
        self.registry = Registry(meters)
        self.gate = Gate(limits, self.registry, primary)
        self.notes = Notes(primary.store, self._waits, self.troubles, self.gate.full, output.hide)
        self.cancellation = Cancellation(
            self.registry,
            self.past,
            outbox=outbox,
            encode=encode,
            served=lambda: list(self.instances),
            stop_grace=limits.stop_grace,
            on_change=on_change,
            meters=meters,
        )
        # Set by the main thread, read by the store's: all tasks are being ended, also those that arrive late.
        self._ending_grace: float | None = None
        self._hurried = False
        self._arriving = 0  # assignments that are not decided yet; counted under the lock
        self._lock = threading.Lock()  # guards the counter and the two fields below
        self._deadlines: list[tuple[float, int, Task]] = []
        self._unstarted: list[Task] = []  # tasks for which no thread could be had yet
        self._order = itertools.count()

    # -- Intake: called on the main thread, returns at once

    def assign(self, spec: TaskSpec) -> None:
        """Decide in a transaction whether the task is new, a duplicate or refused; then claim and start it."""
        connection = self.outbox.connection
        created: list[Task] = []  # filled by the decision when it makes a new task
        with self._lock:
            self._arriving += 1

        def decide(db: sqlite3.Connection) -> Callable[[], None]:
            return self._decide(db, spec, connection, created)

        def done(act: Callable[[], None] | None, error: StoreError | None) -> None:
            (act or functools.partial(self._undecided, spec.key, created, connection, error))()
            with self._lock:
                self._arriving -= 1
            self._on_change()

        self.primary.store.post(decide, done)

    def _undecided(self, key: Key, created: list[Task], connection: int, error: StoreError | None) -> None:
        """The row could not be written. What is known already is answered all the same; only a new task is refused."""
        logger.error("%s", error)
        for task in created:
            self.gate.accepted -= 1
            self.registry.remove(task)
        if (alive := self._alive(key)) is not None:
            self._repeat_of_active(alive, connection)()
            return
        known = self.registry.newest(key)
        row = known.row if known else peek(self.primary.store.path, functools.partial(rows.latest_attempt, key=key))
        if row is not None and not _may_run_again(row):
            self._repeat_of_ended(row)
        else:
            self._reject(key, Refusal.DISK, connection, str(error))

    def invalid(self, key: Key, sentence: str) -> None:
        """Report an assignment that cannot be run, once for each attempt, durably."""
        outcome = verdict.invalid(key, sentence)
        logger.warning("task %s refused: %s", key, sentence)

        def decide(db: sqlite3.Connection) -> OutboxRow | Task | TaskRow | None:
            if (task := self._alive(key)) is not None:
                return task
            row = self._latest(db, key)
            if row is not None and not _may_run_again(row):
                return row
            row = self._new_row(key, row.attempt + 1 if row else 1)
            row.state, row.ended_at, row.result, row.reason = State.ENDED, time.time(), "failed", "unknown"
            row.frame, row.claim_acked = self.encode(outcome.report), True
            rows.save_task(db, row)
            report = OutboxRow(row.unit, key, ReportKind.FAILED, row.origin, row.frame, False, time.time())
            report.id = rows.add_report(db, report)
            self.meters.count("oz_worker_task_failures_total", phase="assignment", reason=outcome.metric_reason)
            self._trace(key, "", "task.failed", phase="assignment", reason=outcome.metric_reason)
            return report

        def done(found: OutboxRow | Task | TaskRow | None, error: StoreError | None) -> None:
            if isinstance(found, Task):
                found.claim()
            elif isinstance(found, TaskRow):
                self._repeat_of_ended(found)
            elif found is not None:
                self._send_final(found)
            elif error is not None:
                logger.error("%s", error)
                row = self._new_row(key, 1)
                frame = self.encode(outcome.report)
                self.outbox.send(
                    OutboxRow(row.unit, key, ReportKind.FAILED, row.origin, frame, False, time.time()),
                    self.primary.store,
                )

        self.primary.store.post(decide, done)

    def cancel(self, task_id: str, execution_id: str) -> None:
        """Cancel what matches; with an execution id always answered (rule 16)."""
        self.cancellation.cancel(Key(task_id, execution_id))

    # -- stopping

    @property
    def accepted(self) -> int:
        """New tasks of this process."""
        return self.gate.accepted

    def close_intake(self, refusal: Refusal | None) -> None:
        """Refuse every new task from now on, saying *refusal*; None opens the intake again."""
        self.gate.close(refusal)

    def stop_all(self, grace: float) -> None:
        """End every task as a stop of the worker, also those that are accepted or taken up from now on."""
        self._ending_grace = grace
        for task in self.tasks():
            task.end_by(Cause.SHUTDOWN, grace)

    def hurry_all(self) -> None:
        """KILL now what is being ended."""
        self._hurried = True
        for task in self.tasks():
            task.unit.hurry()

    def troubles(self) -> list[str]:
        """What is in the way of new tasks here, a sentence each, without secrets. Looks at disks."""
        return [self.output.hide(why) for why in self.gate.troubles()]

    def tasks(self) -> list[Task]:
        """A copy of the tasks whose threads are at work."""
        return self.registry.tasks()

    def idle(self) -> bool:
        """Whether every task's thread is done, but for those that wait for a process that cannot be killed."""
        with self._lock:
            arriving = self._arriving
        return not arriving and not self.cancellation.commanding() and all(task.awaiting_proof for task in self.tasks())

    def starting(self) -> bool:
        """Whether a task is between two states that can be left alone: not running yet, being cancelled or removed.

        What `preserve` waits for, within its limit.
        """
        passing = [State.ACCEPTED, State.PREPARING, State.CANCELLING, State.ENDING, State.DISPATCHED]
        if self.primary.backend.capabilities.fire_and_forget:
            passing.append(State.RUNNING)
        return any(task.row.state in passing and not task.awaiting_proof for task in self.tasks())

    # -- deadlines: main thread only

    def tick(self, now: float) -> float:
        """End tasks whose deadline has passed; the monotonic time of the next one, inf when there is none."""
        with self._lock:
            due = []
            while self._deadlines and self._deadlines[0][0] <= now:
                due.append(heapq.heappop(self._deadlines)[2])
            upcoming = self._deadlines[0][0] if self._deadlines else math.inf
            unstarted, self._unstarted = self._unstarted, []
        for task in due:
            task.end_by(Cause.DEADLINE, self.stop_grace)
        for task in unstarted:
            self._start_thread(task)
        return min(upcoming, now + 1.0) if unstarted else upcoming

    # -- Surroundings of a task

    def runs(self) -> None:
        """A task has reached its running state."""
        self._on_change()

    def waits_for_proof(self) -> None:
        """A task no longer holds up a stop."""
        self._on_change()

    def slot_freed(self, task: Task) -> None:
        """The task no longer counts against the limit."""
        self.registry.free_slot(task)

    def cancel_dispatched(self, task: Task) -> None:
        """Run the cancel command of a task that was handed over."""
        self.cancellation.cancel_dispatched(task.instance, task.row)

    def removal_due(self) -> None:
        """What was kept of a unit until its report was heard may go."""
        self.on_removal_due()

    def finished(self, task: Task) -> None:
        """The task's thread is done."""
        if task.instance is not self.primary:
            self.past.note_end(task)
        self.registry.remove(task)
        task.span.end()
        task.unit.spec = None  # its secrets are not needed any more, whoever still holds the unit
        self.ended += 1
        self.last_end = time.monotonic()
        self._on_change()

    def take_up(self, task: Task) -> None:
        """Recovery: a task of an earlier process counts against the limit and gets its thread."""
        self.registry.add(task)
        self._start(task)
        self._end_late(task)

    # -- inside a transaction, on the store's thread

    def _decide(
        self, db: sqlite3.Connection, spec: TaskSpec, connection: int, created: list[Task]
    ) -> Callable[[], None]:
        """What to do about an assignment once the transaction is durable."""
        key = spec.key
        if (task := self._alive(key)) is not None:
            return self._repeat_of_active(task, connection)
        row = self._latest(db, key)
        if row is not None and not _may_run_again(row):
            return functools.partial(self._repeat_of_ended, row)
        refusal, why = self.gate.refusal()
        if refusal is not None:
            return functools.partial(self._reject, key, refusal, connection, why, spec.title)
        if row is None and (row := self.past.unserved(key, {instance.id for instance in self.instances})) is not None:
            if row.state not in FINAL:
                why = "its earlier worker died and is about to be served by this one"
                return functools.partial(self._reject, key, Refusal.BACKEND, connection, why, spec.title)
            if not _may_run_again(row):
                return functools.partial(self._repeat_of_ended, row)
        fresh = self._new_row(key, row.attempt + 1 if row else 1)
        rows.save_task(db, fresh)
        task = Task(fresh, self.primary, Unit(fresh.unit, self.primary.id, key, spec), self, found=False)
        self.registry.add(task)
        created.append(task)
        self.gate.accepted += 1
        return functools.partial(self._accepted, task)

    def _alive(self, key: Key) -> Task | None:
        """The task of *key* that is still being worked on and whose report has not left."""
        task = self.registry.newest(key)
        return task if task is not None and not task.released else None

    def _latest(self, db: sqlite3.Connection, key: Key) -> TaskRow | None:
        task = self.registry.newest(key)
        if task is not None:
            return task.row
        return rows.latest_attempt(db, key) or self.past.latest(key)

    def _waits(self) -> list[tuple[TaskRow, str]]:
        """What each task waits for."""
        return [(task.row, task.unit.waits_for()) for task in self.tasks()]

    def _new_row(self, key: Key, attempt: int) -> TaskRow:
        now = time.time()
        return TaskRow(
            key=key,
            attempt=attempt,
            unit=unit_name(key, attempt),
            origin=self.outbox.origin,
            backend=self.limits.backend,
            endpoint=self.limits.endpoint,
            uid=self.uid,
            accepted_at=now,
            deadline_at=now + self.limits.task_timeout if self.limits.task_timeout else None,
        )

    # -- after the commit, on the store's thread

    def _accepted(self, task: Task) -> None:
        self.meters.count("oz_worker_tasks_claimed_total")
        task.span.event("task.claimed")
        task.claim()
        self._start(task)
        self._end_late(task)

    def _end_late(self, task: Task) -> None:
        """A task that comes while all are being ended is ended too.

        The order is set before the tasks are listed, and looked at after this one is registered: one of the two sees
        the other.
        """
        if self._ending_grace is not None:
            task.end_by(Cause.SHUTDOWN, self._ending_grace)
        if self._hurried:
            task.unit.hurry()

    def _start(self, task: Task) -> None:
        if task.row.deadline_at is not None:
            # Wall clock across restarts, monotonic from here on: a stepped clock must not end a task.
            left = min(task.row.deadline_at - time.time(), self.limits.task_timeout or math.inf)
            with self._lock:
                heapq.heappush(self._deadlines, (time.monotonic() + left, next(self._order), task))
        self._start_thread(task)
        self._on_change()

    def _start_thread(self, task: Task) -> None:
        try:
            threads.start(f"task-{task.row.unit}", task.run, self._on_death)
        except RuntimeError as error:  # the limit of threads or of memory; `tick` tries again
            logger.error("task %s waits: no thread could be started (%s)", task.key, error)
            with self._lock:
                self._unstarted.append(task)

    def _repeat_of_active(self, task: Task, connection: int) -> Callable[[], None]:
        if task.row.cause is not Cause.CANCEL:
            return task.claim
        if task.key.execution_id:
            return lambda: logger.info("task %s is being cancelled; its report follows", task.key)
        return functools.partial(self._reject, task.key, Refusal.CANCELLING, connection)

    def _repeat_of_ended(self, row: TaskRow) -> None:
        if row.state is State.DISPATCHED:
            frame = self.encode(Report(ReportKind.CLAIMED, row.key))
            self.outbox.claim(row.key, row.unit, row.origin, frame, lambda: None)
            return
        if not row.frame:  # the disk was full at its end: the report is in memory only, and on its way
            return
        kind = ReportKind.FAILED if row.result == "failed" else ReportKind.COMPLETED
        self._send_final(OutboxRow(row.unit, row.key, kind, row.origin, row.frame, False, time.time()))

    def _send_final(self, report: OutboxRow) -> None:
        """A terminal report of a row in the database; its acknowledgement is written into that row."""
        if not report.id:
            self.outbox.repeat(report)
            return
        self.outbox.send(report, self.primary.store, functools.partial(self._ended_acked, report))

    def _ended_acked(self, report: OutboxRow) -> None:
        def work(db: sqlite3.Connection) -> None:
            row = rows.latest_attempt(db, report.key)
            if row is not None and row.unit == report.unit:
                row.report_acked = True
                rows.save_task(db, row)

        self.primary.store.post(work)

    def _trace(self, key: Key, title: str, event: str, **attributes: str) -> None:
        """The whole span of an assignment that comes to nothing."""
        span = self.tracer.begin(*key, title=title)
        span.event(event, **attributes)
        span.end()

    def _reject(self, key: Key, refusal: Refusal, connection: int, why: str = "", title: str = "") -> None:
        level = logging.WARNING if refusal in OF_PLACE else logging.INFO
        logger.log(level, "task %s rejected: %s%s", key, refusal.wire, f" ({why})" if why else "")
        self.meters.count("oz_worker_tasks_rejected_total", reason=refusal.label)
        self._trace(key, title, "task.rejected", reason=refusal.label)
        self.notes.rejected(key, refusal, why)
        self.outbox.reject(key, self.encode(Report(ReportKind.REJECTED, key, refusal.wire)), connection)


def _may_run_again(row: TaskRow) -> bool:
    """Whether an assignment of an ended key is a new attempt (3.2 and rule 10)."""
    if row.state is State.DISPATCHED:
        return not row.key.execution_id and row.claim_acked
    return row.report_acked and (not row.agent_started or not row.key.execution_id)
