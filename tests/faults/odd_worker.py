"""Run the worker with a fault of its surroundings inside, switched on by the file $HOME/poison.

usage: odd_worker.py vital|helped|threads|upkeep|owners [arguments of oz_worker ...]

vital: an essential thread dies or is stuck. helped: the same, and the watchdog soon ends what leaves for a death.
threads: no new thread can be started.
owners: no fault, but a container is an orphan when its owner is absent for a moment, not 30 s. upkeep: the same for a
second, and what was left behind is looked for every second, not every minute.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from typing import Callable

from oz_worker import vitals
from oz_worker.backends import container_owner
from oz_worker.cli import main
from oz_worker.engine import upkeep
from oz_worker.observe import watchdog

POISON = os.path.join(os.environ["HOME"], "poison")


def poisoned() -> bool:
    """Whether the fault is switched on."""
    return os.path.exists(POISON)


def vital() -> None:
    """The poison has lines like `stick store`: at its next sign of life that thread blocks for ever, with a limit of a
    second from then on. `hold store`: with the lock that every line of the log needs. `die store`: it raises."""
    vitals.WAIT_SECONDS = 0.3
    watchdog.LOOK_SECONDS = 0.5
    original = vitals.stamp
    told: set[str] = set()

    def stamp() -> None:
        original()
        name = threading.current_thread().name.replace("MainThread", "main")
        if not poisoned() or name in told:
            return
        with open(POISON) as file:
            acts = {name: act for act, name in (line.split() for line in file)}
        told.add(name)
        if name not in acts:
            return
        if acts[name] == "die":
            raise RuntimeError("the poison of the test")
        if acts[name] == "hold":
            logging.getLogger().handlers[0].acquire()
        if name != "log":
            vitals.LIMITS[name] = 1.0
        threading.Event().wait()

    vitals.stamp = stamp


def threads() -> None:
    """Starting a thread raises as it does at the limit."""
    original = threading.Thread.start

    def start(self: threading.Thread) -> None:
        if poisoned():
            raise RuntimeError("can't start new thread")
        original(self)

    threading.Thread.start = start  # type: ignore[method-assign]


def helped() -> None:
    """`vital`, and a worker that leaves because a thread died has a second for that."""
    vital()
    watchdog.DEAD_SECONDS = 1.0


def owners() -> None:
    """What has no owner for a moment is an orphan."""
    container_owner.ABSENT_SECONDS = 0.2


def quick() -> None:
    """Upkeep looks every second, and what has no owner for a second is an orphan."""
    container_owner.ABSENT_SECONDS = 1.0
    upkeep.LOOK_SECONDS = 1.05
    upkeep.LATE_WRITES_SECONDS = 0.2


FAULTS: dict[str, Callable[[], None]] = {"vital": vital, "helped": helped, "threads": threads}
FAULTS |= {"upkeep": quick, "owners": owners}

FAULTS[sys.argv[1]]()
raise SystemExit(main(sys.argv[2:]))
