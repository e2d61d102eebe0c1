"""Taking up what an earlier process left: rows, reports, and units that exist outside.

The rule for each combination of row and unit:

| row                     | unit outside | what follows                                                    |
|-------------------------|--------------|-----------------------------------------------------------------|
| none                    | yes          | adopted from its labels and watched, never stopped (rule 1)     |
| accepted .. cancelling  | yes          | attached: watched, or reported from the status it left          |
| accepted, preparing     | no           | never started: "run it again"                                   |
| running                 | no           | its end is lost                                                 |
| ending                  | either       | teardown, release and removal again, the outcome stays          |
| ended, dispatched       | yes          | removed, unless kept                                            |
"""

from __future__ import annotations

import functools
import logging
import time
from typing import Sequence

from oz_worker import rows
from oz_worker.backends.base import Found, Unit
from oz_worker.engine.admission import Engine
from oz_worker.engine.instance import Instance
from oz_worker.engine.task import Task
from oz_worker.lifecycle import FINAL, State
from oz_worker.model import Cause, ReportKind, unit_name
from oz_worker.rows import OutboxRow, TaskRow

logger = logging.getLogger(__name__)

MOST_ATTEMPTS = 64


def recover(engine: Engine, instance: Instance, listed: Sequence[Found] | None = None) -> int:
    """Take up everything of *instance*; how many tasks are being worked on again. Blocks in the store and the backend.

    *listed*: what the backend's `recover` has said already. Raises StoreError when the database cannot be read.
    """
    units = {found.name: found for found in (instance.backend.recover() if listed is None else listed)}
    unfinished = instance.store.do(rows.open_tasks)
    settled = {row.unit: row for row in instance.store.do(rows.settled_with_rest)}
    waiting = instance.store.do(rows.reports)
    if instance is not engine.primary:
        engine.past.note(instance, instance.store.do(rows.closed_tasks))

    tasks = [_task_of(engine, instance, row, units.pop(row.unit, None)) for row in unfinished]
    for found in units.values():
        row = instance.store.do(functools.partial(rows.of_unit, unit=found.name))
        if row is None:
            tasks.append(_adopt(engine, instance, found))
        else:
            _remove_left_over(instance, row)

    by_unit = {task.row.unit: task for task in tasks}
    _send_waiting(engine, instance, waiting, by_unit, settled)
    _say_what_was_lost(engine, instance, waiting, settled)
    for task in tasks:
        if not task.released and not task.row.claim_acked and task.row.unit not in {w.unit for w in waiting}:
            task.claim()
        engine.take_up(task)
    return len(tasks)


def take_over(engine: Engine, instance: Instance, found: Sequence[Found]) -> None:
    """Units whose own worker is gone for good and which *instance* has just won (rule 3). Raises StoreError.

    One that was assigned to us too is taken up by its own start, or, when that has failed meanwhile, removed.
    """
    alive = {task.row.unit for task in engine.tasks()}
    for unit in found:
        if unit.name in alive:
            continue
        row = instance.store.do(functools.partial(rows.of_unit, unit=unit.name))
        if row is not None:
            _remove_left_over(instance, row)
            continue
        task = _adopt(engine, instance, unit)
        task.claim()
        engine.take_up(task)


def _task_of(engine: Engine, instance: Instance, row: TaskRow, found: Found | None) -> Task:
    if row.state is State.ENDING:
        result = "ending"
    elif found is not None:
        result = "attached"
    else:
        result = "lost" if row.started_at else "never_started"
    engine.meters.count("oz_worker_tasks_reattached_total", result=result)
    unit = Unit(row.unit, instance.id, row.key)
    logger.info("task %s: taken up again (%s)", row.key, row.state.value)
    return Task(row, instance, unit, engine, found=found is not None)


def _adopt(engine: Engine, instance: Instance, found: Found) -> Task:
    """A unit without a row: the database is fresh, copied or rolled back, so its labels are believed."""
    key = found.key
    attempt = next((n for n in range(1, MOST_ATTEMPTS) if unit_name(key, n) == found.name), 1)
    now = time.time()
    row = TaskRow(
        key=key,
        attempt=attempt,
        unit=found.name,
        origin=engine.outbox.origin,
        backend=engine.limits.backend,
        endpoint=engine.limits.endpoint,
        uid=engine.uid,
        accepted_at=now,
        started_at=now,
        state=State.RUNNING,
    )
    instance.change(row, lambda _row: None)
    engine.meters.count("oz_worker_tasks_reattached_total", result="adopted")
    logger.warning("task %s: adopted from its labels, the database does not know it", key)
    return Task(row, instance, Unit(found.name, instance.id, key), engine, found=True)


def _send_waiting(
    engine: Engine,
    instance: Instance,
    waiting: list[OutboxRow],
    tasks: dict[str, Task],
    settled: dict[str, TaskRow],
) -> None:
    """Undelivered reports in their order, each behind the claim of its task if that was not acknowledged."""
    fixed = {report.unit for report in waiting if report.kind is not ReportKind.CLOSED}
    for task in tasks.values():
        if task.row.state is State.ENDING and task.row.unit not in fixed and task.row.report_acked:
            task.released = True
    claimed: set[str] = set()
    for report in waiting:
        owner = tasks.get(report.unit)
        if owner is None and report.unit in settled:
            owner = _finished_task(engine, instance, settled[report.unit])
        if owner is None or report.kind is ReportKind.CLOSED:
            _let_go(instance, report)
            engine.outbox.send(report, instance.store)
            continue
        if owner.row.report_acked:  # it was read; only its deletion was not written
            instance.store.post(functools.partial(rows.delete_reports, report_ids=[report.id]))
            continue
        if not owner.row.claim_acked and report.unit not in claimed:
            claimed.add(report.unit)
            owner.claim()
        owner.outcome_fixed(report)
        if report.held and owner.row.state not in FINAL:
            continue  # its thread releases it after the teardown
        _let_go(instance, report)
        owner.released = True
        engine.outbox.send(report, instance.store, owner.acknowledged)


def _let_go(instance: Instance, report: OutboxRow) -> None:
    """A held report of which no thread is left to release it."""
    if report.held:
        report.held = False
        instance.store.post(functools.partial(rows.release_report, report_id=report.id))


def _say_what_was_lost(
    engine: Engine, instance: Instance, waiting: list[OutboxRow], settled: dict[str, TaskRow]
) -> None:
    """Final rows with something to say that stands in no outbox: a full disk kept it in memory, which is gone."""
    fixed = {report.unit for report in waiting if report.kind is not ReportKind.CLOSED}
    for row in settled.values():
        task = _finished_task(engine, instance, row)
        if row.state is State.ENDED and not row.report_acked and row.unit not in fixed and row.frame:
            if not row.claim_acked:
                task.claim()
            kind = ReportKind.FAILED if row.result == "failed" else ReportKind.COMPLETED
            report = OutboxRow(row.unit, row.key, kind, row.origin, row.frame, False, row.ended_at or time.time())
            engine.outbox.send(report, instance.store, task.acknowledged)
        elif row.state is State.DISPATCHED:
            if not row.claim_acked:
                task.claim()
            if row.cause is Cause.CANCEL and not row.closed:
                engine.cancellation.cancel_dispatched(instance, row)


def _finished_task(engine: Engine, instance: Instance, row: TaskRow) -> Task:
    """A task object for a row in a final state: only what claims and acknowledgements need."""
    return Task(row, instance, Unit(row.unit, instance.id, row.key), engine, found=False)


def _remove_left_over(instance: Instance, row: TaskRow) -> None:
    if row.keep_until is not None or row.state not in FINAL:
        return
    trouble = instance.backend.clean_up(Unit(row.unit, instance.id, row.key), keep=False)
    if trouble:
        logger.warning("task %s: clean-up: %s", row.key, trouble)
