"""What stands on our own disk of a unit in a container or pod: that it was prepared, and how far its start was ordered.

Written before the act it describes, so that after a kill -9 the absence of a container can be read: never made, or
removed by somebody since.
"""

from __future__ import annotations

import os
from pathlib import Path

from oz_worker.backends import unit_root
from oz_worker.backends.base import Found, Unit
from oz_worker.backends.workspace import remove_tree
from oz_worker.detached import UnitDirectory

_STARTED = "started"


class Traces:
    """The units' directories of one instance. Each is touched by its unit's thread only."""

    def __init__(self, instance_dir: Path, worker_id: str) -> None:
        self._root = instance_dir / "units"
        self._worker_id = worker_id

    def open(self) -> None:
        """Make the directory of units. Raises NotUsable."""
        unit_root.make(self._root)

    def directory(self, unit: Unit) -> UnitDirectory:
        """Where the files of *unit* are."""
        return UnitDirectory(self._root / unit.name)

    def prepared(self, unit: Unit) -> None:
        """It is going to be prepared. Raises OSError."""
        facts = {"version": 1, "task_id": unit.key.task_id, "execution_id": unit.key.execution_id}
        self.directory(unit).create({**facts, "instance": unit.instance, "worker": self._worker_id})

    def starting(self, unit: Unit) -> None:
        """It is going to be started. Raises OSError."""
        self.directory(unit).private(_STARTED)

    def mark(self, unit: Unit, name: str) -> None:
        """Note that a step of its start is done. Raises OSError."""
        self.directory(unit).private(name)

    def was_started(self, unit: Unit) -> bool:
        """Whether its start was ordered at all."""
        return self.has_mark(unit, _STARTED)

    def never_ordered(self, unit: Unit) -> bool:
        """Whether no start was ordered, so that nothing of it can be outside but what it was prepared with.

        Said only of what this process prepared: a mark of an earlier one may have gone with its disk.
        """
        return unit.spec is not None and not self.was_started(unit)

    def has_mark(self, unit: Unit, name: str) -> bool:
        """Whether that step of its start may be done: only a disk that answers can prove that it was not."""
        try:
            os.stat(self.directory(unit).file(name))
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True
        return True

    def list(self) -> list[Found]:
        """The units that have a directory. Raises Unreadable."""
        return unit_root.found(unit_root.directories(self._root))

    def forget(self, unit: Unit) -> str:
        """Remove the directory; one sentence about what is left."""
        return remove_tree(str(self.directory(unit).path))
