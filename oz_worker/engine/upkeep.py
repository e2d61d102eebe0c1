"""What has to be done now and then: late writes, expiry, instances that were left behind."""

from __future__ import annotations

import functools
import logging
import sqlite3
import threading
import time
from pathlib import Path
from typing import Callable

from oz_worker import rows, slots, threads, vitals
from oz_worker.backends.base import Unit
from oz_worker.engine import recovery
from oz_worker.engine.admission import Engine
from oz_worker.engine.instance import Instance
from oz_worker.errors import OzWorkerError
from oz_worker.slots import Slot

logger = logging.getLogger(__name__)

LATE_WRITES_SECONDS = 5.0
LOOK_SECONDS = 60.0
ROWS_KEPT_SECONDS = 7 * 24 * 3600.0


class Upkeep:
    """Thread `upkeep`: owned by the daemon, blocks in `Event.wait` (woken by `stop` and `removal_due`) and in bounded
    work on files and units.
    """

    def __init__(
        self, engine: Engine, open_instance: Callable[[Slot], Instance], misfit: Callable[[Path], str]
    ) -> None:
        self._engine = engine
        self._open_instance = open_instance
        self._misfit = misfit
        self._stop = threading.Event()
        self._wake = threading.Event()  # something is due: a removal, or the stop
        self._thread: threading.Thread | None = None
        self._unlocked_since: dict[str, float] = {}  # left-behind instances seen, by id

    def start(self, on_death: Callable[[str, BaseException], None]) -> None:
        """Start the thread; the first look at left-behind instances is now, so that they can be taken in a minute."""
        self._engine.on_removal_due = self._wake.set
        self._thread = threads.start("upkeep", self._run, on_death)

    def stop(self, timeout: float) -> None:
        """End the thread, waiting at most *timeout* seconds for what it is doing and for removals that are due."""
        self._stop.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout)

    @vitals.essential("upkeep")
    def _run(self) -> None:
        next_look = time.monotonic()
        while True:
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + LOOK_SECONDS
                self._look()
            self._engine.notes.look()
            if self._wake.wait(vitals.wait(LATE_WRITES_SECONDS)):
                self._wake.clear()
                self._remove_heard()
            if self._stop.is_set():
                self._engine.notes.look()
                return
            self._late_writes()

    def _remove_heard(self) -> None:
        """Units of which a success was reported and heard just now."""
        for instance in list(self._engine.instances):
            if instance.backend.capabilities.outlives_disk:
                self._guarded(instance.id, functools.partial(self._remove_due, instance))

    def _late_writes(self) -> None:
        self._engine.outbox.store_late()
        for instance in list(self._engine.instances):
            instance.save_unsaved()

    def _look(self) -> None:
        for instance in list(self._engine.instances):
            self._guarded(instance.id, functools.partial(self._look_after, instance))
        if self._engine.gate.open:
            self._guarded("left-behind instances", self._take_left_behind)

    def _look_after(self, instance: Instance) -> None:
        self._expire(instance)
        if instance is self._engine.primary:
            recovery.take_over(self._engine, instance, instance.backend.look_after())
        else:
            self._leave_if_empty(instance)

    def _guarded(self, what: str, act: Callable[[], None]) -> None:
        """A database that is locked or a disk that is full is no reason to end: the next look tries again."""
        vitals.stamp()
        try:
            act()
        except (OzWorkerError, OSError, sqlite3.Error) as error:
            logger.warning("upkeep of %s: %s", what, error)

    def _expire(self, instance: Instance) -> None:
        self._engine.output.expire(instance.path)
        self._remove_due(instance)
        instance.store.do(lambda db: rows.forget_ended(db, time.time() - ROWS_KEPT_SECONDS))

    def _remove_due(self, instance: Instance) -> None:
        for row in instance.store.do(lambda db: rows.kept_past(db, time.time())):
            vitals.stamp()
            trouble = instance.backend.clean_up(Unit(row.unit, instance.id, row.key), keep=False)
            if trouble:  # was said at the task's end; the next look tries again
                logger.debug("task %s: clean-up: %s", row.key, trouble)
                continue
            logger.info("task %s: removed what had been kept of it", row.key)
            instance.change(row, lambda row: setattr(row, "keep_until", None))

    def _take_left_behind(self) -> None:
        """Rule 2: serve an instance in place once it has been unlocked for 60 s."""
        ours = {instance.id for instance in self._engine.instances}
        unlocked: dict[str, float] = {}
        for path in slots.instances(self._engine.primary.path.parent):
            if path.name in ours or not slots.unlocked(path):
                continue
            since = self._unlocked_since.get(path.name, time.monotonic())
            unlocked[path.name] = since
            if time.monotonic() - since >= LOOK_SECONDS - 1 and (slot := slots.hold(path)) is not None:
                self._serve(slot)
        self._unlocked_since = unlocked

    def _serve(self, slot: Slot) -> None:
        why = self._misfit(slot.path)
        if why:
            logger.debug("the instance %s was left behind and is not ours to serve: %s", slot.id, why)
            slot.release()
            return
        try:
            instance = self._open_instance(slot)
        except (OzWorkerError, OSError) as error:
            logger.warning("the instance %s that was left behind cannot be served: %s", slot.id, error)
            slot.release()
            return
        try:
            count = recovery.recover(self._engine, instance)
        except (OzWorkerError, OSError):
            self._close(instance)
            raise
        self._engine.instances.append(instance)
        logger.warning("serving the instance %s that was left behind: %d tasks taken up", slot.id, count)

    def _leave_if_empty(self, instance: Instance) -> None:
        """Everything of a left-behind instance is done: its final rows move to ours, its directory goes."""
        if any(task.instance is instance for task in self._engine.tasks()):
            return
        if instance.store in self._engine.outbox.stores_in_use() or instance.backend.units():
            return
        finished = instance.store.do(rows.closed_tasks)

        def move(db: sqlite3.Connection) -> None:
            for row in finished:
                rows.add_missing(db, row)

        self._engine.primary.store.do(move)
        self._move_logs(instance)
        self._engine.past.forget(instance)
        self._engine.instances.remove(instance)
        instance.backend.close()
        instance.store.close(5.0)
        instance.slot.remove()
        logger.info("the instance %s is empty and removed", instance.id)

    def _move_logs(self, instance: Instance) -> None:
        """Kept output outlives its instance: `task_log_retention` was promised."""
        kept = instance.path / "logs"
        if kept.is_dir():
            ours = self._engine.primary.path / "logs"
            ours.mkdir(mode=0o700, exist_ok=True)
            for copy in kept.iterdir():
                copy.replace(ours / copy.name)

    def _close(self, instance: Instance) -> None:
        instance.backend.close()
        instance.store.close(5.0)
        instance.slot.release()
