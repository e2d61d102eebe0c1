"""One task from its durable row to its end: what runs on the task's own thread.

Who decides between an end, a cancel, a deadline and a stop of the worker: the transaction that comes first on the
store's thread. `cause` is written there before the first TERM, the outcome is computed there from facts and cause.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from typing import Callable, Protocol

from oz_worker import about, rows
from oz_worker.backends.base import PROOF_SECONDS, Unit
from oz_worker.engine import verdict
from oz_worker.engine.account import Account
from oz_worker.engine.follow import Follower, Source
from oz_worker.engine.instance import Instance
from oz_worker.engine.outbox import Outbox
from oz_worker.engine.output import Output
from oz_worker.errors import Stopped, StoreError, TaskFault
from oz_worker.lifecycle import STARTABLE, Event, State, step
from oz_worker.meters import Meters
from oz_worker.model import Cause, ExitFacts, Key, Reason, Report, ReportKind
from oz_worker.rows import UNTIL_HEARD, OutboxRow, TaskRow
from oz_worker.tracing import Tracer

logger = logging.getLogger(__name__)


class Surroundings(Protocol):
    """What a task needs of the engine. Everything is safe from any thread and does not block."""

    outbox: Outbox
    meters: Meters
    tracer: Tracer
    output: Output
    follower: Follower | None
    encode: Callable[[Report], str]
    stop_grace: float
    cleanup: bool
    keep_failed: float

    def runs(self) -> None:
        """A task has reached its running state: a stop under `preserve` may be waiting for that."""

    def waits_for_proof(self) -> None:
        """Nothing is left to do for a task but to see it gone: a stop need not wait for it."""

    def slot_freed(self, task: Task) -> None:
        """The task no longer counts against the limit. Called once."""

    def cancel_dispatched(self, task: Task) -> None:
        """Cancel a task that was handed over."""

    def removal_due(self) -> None:
        """What was kept of a unit until its report was heard may go."""

    def finished(self, task: Task) -> None:
        """The task's thread is done with it; in a final state unless the worker is leaving."""


class Task:
    """One attempt. `row` is changed on the store's thread only; `run` is the body of the task's thread.

    The thread blocks in `Unit.wait_for_end_or_stop` (woken by the end and by `end_by`), in the backend's calls (each
    bounded, and woken by the unit's stop order) and in `Store.do` (woken by the store).
    """

    def __init__(self, row: TaskRow, instance: Instance, unit: Unit, around: Surroundings, *, found: bool) -> None:
        self.row = row
        self.instance = instance
        self.unit = unit
        self.key: Key = row.key
        self._around = around
        self._made_at = time.monotonic()
        self._found = found  # taken up after a restart: the unit may exist already
        self._earlier_cause = row.cause  # stored by an earlier process: its TERM may be sent at once
        self._stopped = False  # the facts came from `Backend.stop`, which looked for everything of the unit
        self.released = False  # the report has left our hands; written on the store's thread
        self.awaiting_proof = False  # only a process that cannot be killed is left of it
        self._closing = threading.Lock()  # guards the two fields below
        self._closing_asked = False  # a cancel with an execution id came in: it is answered by execution_closed
        self._gone = False  # proven: nothing of the unit is left
        self._report: OutboxRow | None = None
        self.span = around.tracer.begin(
            *row.key,
            title=unit.spec.title if unit.spec else "",
            accepted_at=row.accepted_at,
            reattached=unit.spec is None,
        )
        self._account = Account(row, around.meters, self.span)

    # -- orders, from any thread

    def end_by(self, cause: Cause, grace: float) -> None:
        """End the task for *cause* unless it has ended or another cause came first. Returns at once."""
        if cause is Cause.CANCEL:
            self.span.event("task.cancellation_requested")

        def decide(row: TaskRow) -> None:
            if row.cause is None and row.state in STARTABLE:
                row.cause = cause
                if cause is Cause.CANCEL:
                    row.state = step(row.state, Event.CANCEL)

        def act(_saved: bool) -> None:
            if self.row.cause is not None:
                self.unit.order_stop(self.row.cause, grace)
            elif cause is Cause.CANCEL and self.row.state is State.DISPATCHED:
                self._around.cancel_dispatched(self)  # it was handed over just before

        self.instance.change(self.row, decide, act)

    def claim(self) -> None:
        """Say (again) that this task is ours."""

        def acked() -> None:
            if not self.row.claim_acked:
                self.instance.change(self.row, lambda row: setattr(row, "claim_acked", True))

        frame = self._around.encode(Report(ReportKind.CLAIMED, self.key))
        self._around.outbox.claim(self.key, self.row.unit, self.row.origin, frame, acked)

    def source(self) -> Source:
        """Where its output stands."""
        return Source(self.key, self.unit, self.instance.path / "units" / self.row.unit / "output.log")

    # -- the task's thread

    def run(self) -> None:
        """Live through the task. Never raises: a fault of the worker becomes the task's report."""
        about.TASK.set(self.key)
        self._around.output.learn(self.unit)
        try:
            if self.row.state is not State.ENDING:
                self._end(self._live())
            self._finish()
        finally:
            self._around.output.forget(self.unit)
            self._around.finished(self)

    def _live(self) -> ExitFacts:
        """From here to the facts of the end."""
        try:
            if self._found:
                self.instance.backend.attach(self.unit)
                self._around.output.learn(self.unit)
                if self.unit.facts is None or self.unit.facts.agent_started:
                    self.instance.change(self.row, _taken_up)
            elif self.unit.spec is None:  # of an earlier process, and nothing of it exists outside
                return verdict.lost() if self.row.started_at else verdict.never_started()
            else:
                self._start()
            if self._earlier_cause is not None:
                self.unit.order_stop(self._earlier_cause, self._around.stop_grace)
            self.unit.wait_for_end_or_stop()
            facts = self.unit.facts
            if self.unit.cause is not None or facts is None:
                with self.unit.waiting(lambda: "the end of everything that belongs to it: TERM, stop_grace, KILL"):
                    facts = self.instance.backend.stop(self.unit)
                self._stopped = True
            return facts
        except Stopped:
            return self.unit.facts or ExitFacts(agent_started=False)
        except TaskFault as fault:
            return fault.facts
        except Exception as error:  # foreign code below: whatever it is, the task gets its report
            logger.exception("task %s: internal error", self.key)
            return self._after_fault(error)

    def _start(self) -> None:
        if self.row.cause is not None:
            raise Stopped
        self._account.edge("preparing")
        self.span.event("task.started")
        self.instance.change(self.row, lambda row: _step(row, Event.PREPARE))
        began = time.monotonic()
        self.instance.backend.prepare(self.unit)
        self._around.output.learn(self.unit)
        logger.debug("task %s: prepared as unit %s in %.3f s", self.key, self.unit.name, time.monotonic() - began)
        if self.row.cause is not None or self.unit.cause is not None:
            raise Stopped
        self.instance.backend.start(self.unit)
        self.span.event("backend.started", backend=self.row.backend)
        self._around.meters.observe("oz_worker_dispatch_seconds", time.monotonic() - self._made_at)
        self.instance.change(self.row, _started, lambda _saved: self._around.runs())
        self._account.edge(f"running, output: {self.instance.backend.output_at(self.unit)}")

    def _after_fault(self, error: Exception) -> ExitFacts:
        """The unit may be running: it must not outlive its report."""
        detail = f"The worker hit an internal error ({type(error).__name__}: {error}); its log has the details."
        try:
            self.unit.order_stop(Cause.SHUTDOWN, self._around.stop_grace)
            remains = self.instance.backend.stop(self.unit).remains
            self._stopped = True
        except Exception:  # the backend again, which has just failed: the report must not be lost with it
            logger.exception("task %s: stopping after an internal error", self.key)
            remains = f"unit {self.row.unit}"
        return ExitFacts(reason=Reason.UNKNOWN, detail=detail, remains=remains)

    def _end(self, facts: ExitFacts) -> None:
        """Transaction 1: the outcome is fixed and its report is held."""
        self._around.output.learn(self.unit)  # a preparation that failed may have read some
        facts = self._around.output.without_secrets(self.unit, facts)
        logger.debug("task %s: the backend says of its end: %s", self.key, facts)
        if facts.dispatched and self._hand_over(facts):
            return
        if facts.dispatched:  # another cause was committed first; `stop`, which cancels by itself, was not called
            self._account.trouble("cancel_command", self.instance.backend.cancel_dispatched(self.unit))
        self._account.trouble("cancel_command", facts.uncancelled)
        well = facts.code == 0 and facts.reason is None and self.unit.cause is None  # then nobody reads the tail
        tail = "" if well else self._account.guarded(lambda: self._around.output.tail(self.instance.backend, self.unit))
        report_of: list[OutboxRow] = []

        def fix(db: sqlite3.Connection | None) -> None:
            row = self.row
            outcome = verdict.judge(self.key, facts, row.cause, tail)
            row.state = step(row.state, Event.END)
            row.ended_at = time.time()
            row.agent_started = facts.agent_started
            row.remains = facts.remains
            row.result = outcome.result
            row.reason = outcome.metric_reason
            row.exit_code = outcome.report.exit_code
            row.frame = self._around.encode(outcome.report)
            if row.result == "failed" and self._around.keep_failed:
                row.keep_until = row.ended_at + self._around.keep_failed
            if not self._around.cleanup:
                row.keep_until = 0.0  # for ever
            report = OutboxRow(row.unit, self.key, outcome.report.kind, row.origin, row.frame, True, row.ended_at)
            report_of.append(report)
            if db is not None:
                report.id = rows.add_report(db, report)

        self._settle(fix, report_of)
        self._account.ended(facts, tail)

    def _settle(self, work: Callable[[sqlite3.Connection | None], None], report_of: list[OutboxRow]) -> None:
        """Run *work*, which fixes one report, and wait until it is durable, or known not to be."""
        answered = threading.Event()

        def then(saved: bool) -> None:
            if not saved:
                report_of[0].id = 0  # rolled back: it lives in memory
            answered.set()

        self.instance.transact(self.row, work, then)
        answered.wait()
        self._report = report_of[0]
        if not self._report.id and self.instance.store.use_reserve():
            self._write_again(self._report)

    def _write_again(self, report: OutboxRow) -> None:
        """An outcome that stands in memory only would be contradicted after a kill -9."""

        def write(db: sqlite3.Connection) -> int:
            rows.save_task(db, self.row)
            return rows.add_report(db, report)

        try:
            report.id = self.instance.store.do(write)
        except StoreError as error:
            logger.error("%s", error)

    def _hand_over(self, facts: ExitFacts) -> bool:
        """The command backend's end: nothing is reported, the slot is free. False if a cancel came first."""
        answered = threading.Event()

        def hand_over(row: TaskRow) -> None:
            if row.cause is None:
                _step(row, Event.HANDED_OVER)
                row.ended_at = time.time()
                row.result = "dispatched"
                row.agent_started = True

        self.instance.change(self.row, hand_over, lambda _saved: answered.set())
        answered.wait()
        if self.row.state is not State.DISPATCHED:
            return False
        self.released = True
        self._account.counted()
        self._around.slot_freed(self)
        self._account.edge("dispatched")
        return True

    def _finish(self) -> None:
        """Teardown, transaction 2 (release), removal. Repeated as a whole after a crash."""
        backend, unit = self.instance.backend, self.unit
        if self.row.state is State.ENDING and not self.released:
            if not self._stopped and not self.row.remains:
                self.row.remains = self._account.guarded(lambda: backend.stragglers(unit))
            with unit.waiting(lambda: "teardown_command"):
                self._account.trouble("teardown", self._account.guarded(lambda: backend.teardown(unit)))
            self._release()
            logger.debug("task %s: nothing is left to do before its report, which may leave now", self.key)
        if self.row.state is State.ENDING:
            self._await_proof()
            with self._closing:
                self._gone = True
                asked = self._closing_asked or (self.row.cause is Cause.CANCEL and not self.row.closed)
            if asked:
                self._send_closed().wait()  # a stop that finds this thread done must find the report in the outbox
            if self._around.output.copies(unit) or self._around.follower is not None:
                self._account.trouble("output", self._account.guarded(lambda: backend.collect(unit)))
            if self._around.follower is not None:
                self._around.follower.finish(self.source())
            self._around.output.keep_copy(self.instance.path, self.unit, self.row)
        if self._stays_until_heard():
            self.instance.change(self.row, _left_until_heard, lambda _saved: self._say_if_due())
            return
        keep = self.row.keep_until is not None
        trouble = self._account.guarded(lambda: backend.clean_up(unit, keep=keep))
        self._account.trouble("clean-up", trouble)
        logger.debug("task %s: %s", self.key, "what is left of it is kept" if keep else "its traces are removed")

        def removed(row: TaskRow) -> None:
            _step(row, Event.REMOVED)
            if trouble and not keep:
                row.keep_until = time.time()  # upkeep tries again

        self.instance.change(self.row, removed)

    def _release(self) -> None:
        """Transaction 2: the report may leave. The slot is free before it does, unless a proof is outstanding."""
        report = self._report or self._report_of_earlier_process()
        released = threading.Event()

        def release(db: sqlite3.Connection | None) -> None:
            self.released = True  # not after the commit: what is decided behind this in its batch must see it
            if db is not None and report.id:
                rows.release_report(db, report.id)

        def then(saved: bool) -> None:
            if not saved and report.id:
                self.instance.release_later(report.id)
            report.held = False
            if not self.row.remains:
                self._around.slot_freed(self)  # here, so that no assignment decided after this finds it taken
            released.set()

        self.instance.transact(self.row, release, then)
        released.wait()
        self._account.counted()
        self._around.outbox.send(report, self.instance.store, self.acknowledged)

    def _report_of_earlier_process(self) -> OutboxRow:
        kind = ReportKind.FAILED if self.row.result == "failed" else ReportKind.COMPLETED
        return OutboxRow(self.row.unit, self.key, kind, self.row.origin, self.row.frame, True, time.time())

    def outcome_fixed(self, report: OutboxRow) -> None:
        """Recovery: an earlier process fixed this report; whatever the row says, there is no other outcome."""
        self._report = report
        row = self.row
        if row.state not in (State.ENDING, State.ENDED):
            row.state, row.ended_at, row.frame, row.agent_started = State.ENDING, time.time(), report.frame, True
            row.result = "failed" if report.kind is ReportKind.FAILED else "succeeded"
            row.reason = Reason.UNKNOWN.value if row.result == "failed" else ""  # it stands in the frame alone

    def _stays_until_heard(self) -> bool:
        """Whether the unit is the only thing by which a worker whose disk is gone could still learn of this success."""
        row = self.row
        well = row.result == "succeeded" and row.keep_until is None
        return well and not row.report_acked and self.instance.backend.capabilities.outlives_disk

    def _say_if_due(self) -> None:
        if self.row.report_acked and self.row.keep_until:
            self._around.removal_due()

    def acknowledged(self) -> None:
        """The terminal report was read by the server."""
        logger.debug("task %s: the server has read its report", self.key)
        self.instance.change(self.row, _heard, lambda _saved: self._say_if_due())
        self._around.outbox.withdraw_claims(self.row.unit)

    def _await_proof(self) -> None:
        """Until everything of the unit is proven gone; only then the slot and `execution_closed` (rule 11)."""
        if not self.row.remains:
            return
        logger.warning("task %s: %s is still there; its slot stays taken", self.key, self.row.remains)
        self.awaiting_proof = True
        self._around.waits_for_proof()
        self.unit.order_stop(Cause.SHUTDOWN, 0)
        with self.unit.waiting(lambda: f"the proof that {self.row.remains} is gone; its slot stays taken until then"):
            while self.row.remains:
                self.row.remains = self._account.guarded(lambda: self.instance.backend.stop(self.unit).remains)
                if self.row.remains:
                    self.unit.wait(PROOF_SECONDS)
        self.awaiting_proof = False
        logger.info("task %s: everything is gone now", self.key)
        self._around.slot_freed(self)

    def ask_closed(self, then: Callable[[], None]) -> None:
        """Answer a cancel by `execution_closed`: now if the unit is proven gone, else once it is. From any thread.

        *then* is called once the answer is on its way, or this task's thread has it to give.
        """
        with self._closing:
            gone = self._gone
            self._closing_asked = True
        if gone:
            self._send_closed(then)
        else:
            then()

    def _send_closed(self, finally_: Callable[[], None] = lambda: None) -> threading.Event:
        """Tell the server that this execution is proven gone, if it has an id. Set once that is on its way."""
        sent = threading.Event()
        if not self.key.execution_id:
            sent.set()
            finally_()
            return sent
        frame = self._around.encode(Report(ReportKind.CLOSED, self.key))
        report = OutboxRow(self.row.unit, self.key, ReportKind.CLOSED, self.row.origin, frame, False, time.time())

        def close(db: sqlite3.Connection | None) -> None:
            self.row.closed = True
            if db is not None:
                report.id = rows.add_report(db, report)

        def then(saved: bool) -> None:
            report.id = report.id if saved else 0
            self._around.outbox.send(report, self.instance.store)
            sent.set()
            finally_()

        self.instance.transact(self.row, close, then)
        return sent


def _step(row: TaskRow, event: Event) -> None:
    row.state = step(row.state, event)


def _taken_up(row: TaskRow) -> None:
    """It runs outside: a kill may have come before the rows that say so. Later states absorb both events."""
    _step(row, Event.PREPARE)
    _step(row, Event.STARTED)
    row.started_at = row.started_at or time.time()


def _left_until_heard(row: TaskRow) -> None:
    _step(row, Event.REMOVED)
    row.keep_until = time.time() if row.report_acked else UNTIL_HEARD


def _heard(row: TaskRow) -> None:
    row.report_acked = True
    if row.keep_until == UNTIL_HEARD:
        row.keep_until = time.time()


def _started(row: TaskRow) -> None:
    _step(row, Event.STARTED)
    row.started_at = time.time()
