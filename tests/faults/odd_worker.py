"""Run the worker with a fault of its surroundings inside, switched on by the file $HOME/poison.

usage: odd_worker.py store|watcher|threads|upkeep|owners [arguments of oz_worker ...]

store, watcher: what that thread calls raises an error that nobody expects. threads: no new thread can be started.
owners: no fault, but a container is an orphan when its owner is absent for a moment, not 30 s. upkeep: the same for a
second, and what was left behind is looked for every second, not every minute.
"""

from __future__ import annotations

import os
import select
import sqlite3
import sys
import threading
from typing import Any, Callable

from oz_worker.backends import container_owner
from oz_worker.cli import main
from oz_worker.engine import upkeep

POISON = os.path.join(os.environ["HOME"], "poison")


def poisoned() -> bool:
    """Whether the fault is switched on."""
    return os.path.exists(POISON)


def store() -> None:
    """Beginning a transaction raises."""

    class Odd(sqlite3.Connection):
        def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
            if sql == "BEGIN IMMEDIATE" and poisoned():
                raise RuntimeError("the poison of the test")
            return super().execute(sql, parameters)

    original = sqlite3.connect

    def connect(*arguments: Any, **options: Any) -> sqlite3.Connection:
        return original(*arguments, factory=Odd, **options)

    sqlite3.connect = connect  # type: ignore[assignment]


def watcher() -> None:
    """Waiting for the ends of children raises."""
    original = select.epoll

    class Odd:
        def __init__(self) -> None:
            self._epoll = original()

        def poll(self, timeout: float | None = None) -> list[tuple[int, int]]:
            found = self._epoll.poll(timeout)
            if poisoned():
                raise RuntimeError("the poison of the test")
            return found

        def __getattr__(self, name: str) -> Any:
            return getattr(self._epoll, name)

    select.epoll = Odd  # type: ignore[assignment,misc]


def threads() -> None:
    """Starting a thread raises as it does at the limit."""
    original = threading.Thread.start

    def start(self: threading.Thread) -> None:
        if poisoned():
            raise RuntimeError("can't start new thread")
        original(self)

    threading.Thread.start = start  # type: ignore[method-assign]


def owners() -> None:
    """What has no owner for a moment is an orphan."""
    container_owner.ABSENT_SECONDS = 0.2


def quick() -> None:
    """Upkeep looks every second, and what has no owner for a second is an orphan."""
    container_owner.ABSENT_SECONDS = 1.0
    upkeep.LOOK_SECONDS = 1.05
    upkeep.LATE_WRITES_SECONDS = 0.2


FAULTS: dict[str, Callable[[], None]] = {"store": store, "watcher": watcher, "threads": threads}
FAULTS |= {"upkeep": quick, "owners": owners}

FAULTS[sys.argv[1]]()
raise SystemExit(main(sys.argv[2:]))
