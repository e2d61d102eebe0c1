"""Which tasks are alive and which slots are taken."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from oz_worker.meters import Meters
from oz_worker.model import Key

if TYPE_CHECKING:
    from oz_worker.engine.task import Task


Name = tuple[str, str]
"""Instance and unit: a unit's name follows from its task alone, so two instances may have one of the same name."""


def _name(task: Task) -> Name:
    return (task.instance.id, task.row.unit)


class Registry:
    """The tasks whose threads are at work, by unit and by key. One lock guards all fields; nothing blocks under it."""

    def __init__(self, meters: Meters) -> None:
        self._meters = meters
        self._lock = threading.Lock()
        self._active: dict[Name, Task] = {}
        self._by_key: dict[Key, Task] = {}  # the newest attempt of each key
        self._slots: set[Name] = set()

    def add(self, task: Task) -> None:
        """The task is alive, and takes a slot unless its report has left already."""
        with self._lock:
            self._active[_name(task)] = task
            self._by_key[task.key] = task
            if not task.released or task.row.remains:
                self._slots.add(_name(task))
                self._meters.count("oz_worker_tasks_active", 1)

    def remove(self, task: Task) -> None:
        """The task's thread is done, or the task never came to be."""
        self.free_slot(task)
        with self._lock:
            self._active.pop(_name(task), None)
            if self._by_key.get(task.key) is task:
                del self._by_key[task.key]

    def free_slot(self, task: Task) -> None:
        """The task no longer counts against the limit. Repeats change nothing."""
        with self._lock:
            if _name(task) in self._slots:
                self._slots.remove(_name(task))
                self._meters.count("oz_worker_tasks_active", -1)

    def newest(self, key: Key) -> Task | None:
        """The task of *key* whose thread is at work."""
        with self._lock:
            return self._by_key.get(key)

    def tasks(self) -> list[Task]:
        """A copy of all tasks whose threads are at work."""
        with self._lock:
            return list(self._active.values())

    def counts(self) -> tuple[int, int]:
        """How many slots are taken and how many tasks are alive."""
        with self._lock:
            return len(self._slots), len(self._active)
