"""What is known of attempts outside the worker's own database: those of instances that were left behind."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Iterable, NamedTuple

from oz_worker import rows, slots
from oz_worker.engine.instance import Instance
from oz_worker.model import Key
from oz_worker.rows import TaskRow
from oz_worker.store import peek

if TYPE_CHECKING:
    from oz_worker.engine.task import Task


class Known(NamedTuple):
    """A row and the instance it belongs to."""

    row: TaskRow
    instance: Instance


class Past:
    """Final rows of served left-behind instances, and a look into those that are not served yet.

    Written by the upkeep and the task threads, read on the store's thread; single dictionary operations only.
    """

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._rows: dict[Key, Known] = {}

    def note(self, instance: Instance, found: Iterable[TaskRow]) -> None:
        """Rows of *instance* that are in a final state, oldest first."""
        for row in found:
            self._rows[row.key] = Known(row, instance)

    def note_end(self, task: Task) -> None:
        """A task of a left-behind instance has reached its end."""
        self._rows[task.key] = Known(task.row, task.instance)

    def forget(self, instance: Instance) -> None:
        """The rows of *instance* are in our own database now."""
        for key in [key for key, known in list(self._rows.items()) if known.instance is instance]:
            self._rows.pop(key, None)

    def latest(self, key: Key) -> TaskRow | None:
        """The final row of *key* in a served instance."""
        known = self._rows.get(key)
        return known.row if known else None

    def of_task(self, task_id: str) -> list[Known]:
        """The final rows of every execution of *task_id*."""
        return [known for known in list(self._rows.values()) if known.row.key.task_id == task_id]

    def unserved(self, key: Key, served: set[str]) -> TaskRow | None:
        """The row of *key* in an instance whose worker is dead and which nobody serves yet.

        A server that gives a dead worker's task to its sibling must not make it run beside its own survivor.
        """
        for path in slots.instances(self._state_dir):
            if path.name in served or not slots.unlocked(path):
                continue
            row = peek(path / "state.db", functools.partial(rows.latest_attempt, key=key))
            if row is not None:
                return row
        return None
