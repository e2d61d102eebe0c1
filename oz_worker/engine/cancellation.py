"""What a cancel of the server leads to, whatever state its target is in (design 3.7 and 12, rule 16)."""

from __future__ import annotations

import functools
import logging
import threading
import time
from typing import Callable

from oz_worker import rows, threads
from oz_worker.backends.base import Unit
from oz_worker.engine.instance import Instance
from oz_worker.engine.outbox import Outbox
from oz_worker.engine.past import Known, Past
from oz_worker.engine.registry import Registry
from oz_worker.errors import OzWorkerError, StoreError
from oz_worker.lifecycle import State
from oz_worker.meters import Meters
from oz_worker.model import Cause, Key, Report, ReportKind
from oz_worker.rows import OutboxRow, TaskRow

logger = logging.getLogger(__name__)


class Cancellation:
    """Answers cancels. `cancel` may be called from any thread and returns at once.

    Commands and listings run on errand threads of their own, each bounded by the backend. The lock guards the set of
    units whose `cancel_command` runs (there is never more than one for a unit, and a wish is durable before it starts),
    and the number of cancels that are not decided, or whose answer is not in the outbox yet.
    """

    def __init__(
        self,
        registry: Registry,
        past: Past,
        *,
        outbox: Outbox,
        encode: Callable[[Report], str],
        served: Callable[[], list[Instance]],
        stop_grace: float,
        on_change: Callable[[], None],
        meters: Meters,
    ) -> None:
        self._registry = registry
        self._past = past
        self._outbox = outbox
        self._encode = encode
        self._served = served
        self._stop_grace = stop_grace
        self._on_change = on_change
        self._meters = meters
        self._lock = threading.Lock()
        self._running: set[str] = set()
        self._open = 0

    def commanding(self) -> bool:
        """Whether a `cancel_command` runs. `on_change` is called when that ends."""
        with self._lock:
            return bool(self._running)

    def answering(self) -> bool:
        """Whether an answer is still to come. A stop gives it the time of the flush, no more: a listing may hang.

        `on_change` is called when that ends.
        """
        with self._lock:
            return self._open > 0

    def cancel(self, wanted: Key) -> None:
        """Cancel what matches; without an execution id all executions of the task."""
        primary = self._served()[0]
        self._begun()

        def done(found: list[TaskRow] | None, _error: StoreError | None) -> None:
            try:
                known = [Known(row, primary) for row in found or []]
                self._cancel_found(wanted, [*known, *self._past.of_task(wanted.task_id)])
            finally:
                self._over()

        primary.store.post(functools.partial(rows.tasks_of, task_id=wanted.task_id), done)

    def cancel_dispatched(self, instance: Instance, row: TaskRow) -> None:
        """Cancel work that was handed over: nothing is sent, its `cancel_command` runs once, also over a restart."""
        self._cancel_dispatched(Known(row, instance))

    def _cancel_found(self, wanted: Key, known: list[Known]) -> None:
        alive = [
            task
            for task in self._registry.tasks()
            if _matches(wanted, task.key) and task.row.state is not State.DISPATCHED
        ]
        for task in alive:
            logger.info("task %s: cancelled by the server", task.key)
            task.end_by(Cause.CANCEL, self._stop_grace)
            if wanted.execution_id:
                self._begun()
                task.ask_closed(self._over)
        units = {task.row.unit for task in alive}
        # A task that was just handed over may still have its thread: its row is the one in memory.
        rows_alive = {task.row.unit: task.row for task in self._registry.tasks()}
        late = [
            Known(rows_alive.get(entry.row.unit, entry.row), entry.instance)
            for entry in known
            if entry.row.unit not in units and _matches(wanted, entry.row.key)
        ]
        dispatched = [entry for entry in late if entry.row.state is State.DISPATCHED]
        for entry in dispatched:
            self._cancel_dispatched(entry)
        if alive or dispatched:
            return
        if not wanted.execution_id:
            logger.warning("cancel of task %s, which is not known here: nothing to do", wanted)
        elif late:
            self._close(wanted, late[-1].row.origin)
        else:
            self._begun()
            self._errand("cancel-unknown", functools.partial(self._close_unknown, wanted), self._over)

    def _cancel_dispatched(self, entry: Known) -> None:
        row, instance = entry
        with self._lock:
            if row.unit in self._running:
                return
            self._running.add(row.unit)

        def wish(row: TaskRow) -> None:
            row.cause, row.closed = Cause.CANCEL, False

        def run(_saved: bool) -> None:
            self._errand(f"cancel-{row.unit}", functools.partial(self._run_command, entry), lambda: self._ran(row))

        instance.change(row, wish, run)

    def _run_command(self, entry: Known) -> None:
        row, instance = entry
        trouble = instance.backend.cancel_dispatched(Unit(row.unit, instance.id, row.key))
        if trouble:
            self._meters.count("oz_worker_task_failures_total", phase="cleanup", reason="cancel_command")
        level = logging.WARNING if trouble else logging.INFO
        logger.log(level, "task %s: cancel_command run%s", row.key, f": {trouble}" if trouble else "")
        instance.change(row, lambda row: setattr(row, "closed", True))

    def _ran(self, row: TaskRow) -> None:
        with self._lock:
            self._running.discard(row.unit)
        self._on_change()

    def _begun(self) -> None:
        with self._lock:
            self._open += 1

    def _over(self) -> None:
        with self._lock:
            self._open -= 1
        self._on_change()

    def _close(self, key: Key, origin: str) -> None:
        frame = self._encode(Report(ReportKind.CLOSED, key))
        report = OutboxRow("", key, ReportKind.CLOSED, origin, frame, False, time.time())
        self._begun()
        self._outbox.send_durably(report, self._served()[0].store, self._over)

    def _close_unknown(self, key: Key) -> None:
        """`execution_closed` for an execution nobody knows, once a listing proves that no unit of it exists."""
        if any(found.key == key for instance in self._served() for found in instance.backend.units()):
            logger.warning("cancel of task %s: a unit of it exists outside, but it is not ours yet", key)
            return
        logger.info("cancel of task %s, which is not known here: nothing of it runs", key)
        self._close(key, self._outbox.origin)

    def _errand(self, name: str, body: Callable[[], None], over: Callable[[], None]) -> None:
        """Run *body* on a thread, and *over* in any case; an error in it is its own, never the worker's."""

        def guarded() -> None:
            try:
                body()
            except OzWorkerError as error:  # the server asks again
                logger.error("%s could not be done now: %s", name, error)
            except Exception:  # foreign code: the backend's command or listing
                logger.exception("%s", name)
            finally:
                over()

        try:
            threads.start(name, guarded, lambda _name, _error: None)
        except RuntimeError as error:  # the limit of threads: the server asks again
            logger.error("%s could not be done now: %s", name, error)
            over()


def _matches(wanted: Key, key: Key) -> bool:
    return key.task_id == wanted.task_id and wanted.execution_id in ("", key.execution_id)
