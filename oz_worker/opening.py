"""The slow parts of a start, on a thread of their own so that a signal ends them: state, backend, what runs already."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import random
import select
import signal
import time
from typing import Callable, Mapping, Sequence, TypeVar

from oz_worker import backends, threads, vitals
from oz_worker.backends.base import Found
from oz_worker.engine.instance import Instance
from oz_worker.errors import Unanswered
from oz_worker.meters import Meters
from oz_worker.process import identify
from oz_worker.settings import Settings
from oz_worker.slots import Slot
from oz_worker.store import Store
from oz_worker.threads import Waker
from oz_worker.timing import backoff

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 5.0
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""The signals that end a worker, one way or the other."""
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0
T = TypeVar("T")


def this_process() -> dict[str, str]:
    """By what a fact is known to be of this process and of none before it (`Holder` has the same)."""
    me = identify(os.getpid())
    return {"pid": str(os.getpid()), "start_ticks": str(me.ticks) if me else ""}


def open_instance(
    settings: Settings, slot: Slot, environ: Mapping[str, str], on_death: threads.OnDeath, meters: Meters
) -> Instance:
    """The database and the backend of a held directory. Raises NotUsable with nothing left open.

    *environ* is what tasks, hooks and programs get: as it was given to the worker, whatever an SDK needs to see there.
    """
    store = Store(slot.path / "state.db")
    store.start(on_death)
    try:
        backend = backends.make_backend(
            settings,
            instance=slot.id,
            instance_dir=slot.path,
            host_environ=environ,
            on_death=on_death,
            meters=meters,
        )
        backend.open()
    except BaseException:
        store.close(CLOSE_SECONDS)
        raise
    return Instance(slot, store, backend)


def found_outside(instance: Instance, say: Callable[[str], None]) -> Sequence[Found]:
    """The units of *instance*. Waits for ever for an engine or a cluster that does not answer, and *say*s so.

    It answered a moment ago, when the backend was opened: then leaving for a supervisor to try again mends nothing.
    Raises OzWorkerError for anything but silence.
    """
    for pause in backoff(_FIRST_PAUSE, _LONGEST_PAUSE, random.Random()):
        try:
            return instance.backend.recover()
        except Unanswered as error:
            why = f"what runs already cannot be found out: {error}"
            logger.warning("%s. Next try in %.1f s", why, pause)
            say(why)
        time.sleep(pause)
    raise AssertionError("unreachable")


def interruptible(
    act: Callable[[], T],
    waker: Waker,
    inbox: queue.SimpleQueue[signal.Signals],
    on_other: Callable[[signal.Signals], None],
) -> T | None:
    """What *act* returns on a thread of its own, None when a signal ended it. Raises as *act* does.

    *on_other* gets the signals that do not end the worker, on the thread of the caller.
    """
    answer: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def body() -> None:
        try:
            answer.put((act(), None))
        except BaseException as error:  # raised again by the main thread
            answer.put((None, error))
        waker.wake()

    threads.start("opening", body, lambda _name, _error: None)
    poll = select.poll()
    poll.register(waker.fileno(), select.POLLIN)
    while True:
        poll.poll(vitals.wait() * 1000)
        waker.drain()
        for number in drained(inbox):
            if number in ENDING:
                return None
            on_other(number)
        with contextlib.suppress(queue.Empty):
            result, error = answer.get_nowait()
            if error is not None:
                raise error
            return result


def drained(source: queue.SimpleQueue[T]) -> list[T]:
    """Everything that is in *source* now."""
    items: list[T] = []
    while True:
        try:
            items.append(source.get_nowait())
        except queue.Empty:
            return items
