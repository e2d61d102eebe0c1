"""The watchdog: a worker whose threads are dead or stuck ends itself, so that its supervisor starts a new one.

It leaves as a kill -9 would, but with an account first: running tasks live on, and the next start takes them up. How
late each thread may be stands in `oz_worker.vitals`. Time counts only while this process ran: each look counts at most
for the pause that was meant, so that a stopped process, a suspended laptop, a clock that is set or a machine on which
everything is late is no reason; a thread has to be late while the watchdog itself is not. What holds the interpreter's
lock for ever holds the watchdog too; that is seen from outside (`WatchdogSec=`, a liveness probe).
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import threading
import time
from typing import Callable

from oz_worker import threads, vitals
from oz_worker.errors import ExitCode
from oz_worker.observe.logs import Logs

logger = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
DEAD_SECONDS = 120.0
"""The main thread is told of a death and leaves by itself, delivering reports; after so long it is helped."""
ACCOUNT_SECONDS = 5.0
"""For each step of the account: counting it, writing it to the log, writing it to stderr if the log cannot be."""


class Watchdog:
    """Thread `watchdog`: owned by the daemon, blocks in a wait that nobody cuts short; ends with the process.

    *on_look(sound)* is called at each look on that thread, *on_trip()* before it leaves; neither may block for long.
    *pause*: look at least every so many seconds, 0 for as rarely as is enough.
    """

    def __init__(
        self,
        logs: Logs,
        *,
        on_trip: Callable[[], None],
        on_look: Callable[[bool], None],
        pause: float = 0.0,
    ) -> None:
        self._logs = logs
        self._on_trip = on_trip
        self._on_look = on_look
        self._pause = min(LOOK_SECONDS, pause or LOOK_SECONDS)

    def start(self, on_death: threads.OnDeath) -> None:
        """Start the thread."""
        threads.start("watchdog", self._run, on_death)

    @vitals.essential("watchdog")
    def _run(self) -> None:
        last = time.monotonic()
        while True:
            time.sleep(vitals.wait(self._pause))
            now = time.monotonic()
            before = vitals.troubles()
            _look(min(now - last, 1.5 * self._pause))
            last = now
            found = vitals.troubles()
            self._on_look(not found)
            if before and found and _late():  # red for one look first: /healthz tells of it, and it may pass
                self._trip(found)

    def _trip(self, found: list[str]) -> None:
        """Write the account and leave. Every step may hang on what is stuck, so each has a thread and a limit."""
        written = threading.Event()
        sentence = f"watchdog: {'; '.join(found)}. Leaving with exit 1, tasks are left running for the next start"

        def account() -> None:
            logger.critical("%s", sentence)
            self._logs.stacks()
            if self._logs.finish():
                written.set()

        def directly() -> None:  # no lock, no queue, no source file is needed for this
            os.write(2, f"{sentence}\n".encode("utf-8", "backslashreplace"))
            faulthandler.dump_traceback(2, all_threads=True)
            written.set()

        for act in (self._on_trip, account, directly):
            if not written.is_set():
                with contextlib.suppress(RuntimeError):  # no thread is left to be had
                    threads.start("watchdog-account", act, lambda _name, _error: None).join(ACCOUNT_SECONDS)
        os._exit(ExitCode.FAULT)


def _late() -> bool:
    limits = {sign: DEAD_SECONDS if sign.dead else vitals.LIMITS[sign.name] for sign in vitals.signs()}
    return any(sign.late > limit for sign, limit in limits.items())


def _look(seconds: float) -> None:
    """*seconds* more have passed for each thread that has not stamped since the last look."""
    for sign in vitals.signs():
        at = sign.at
        sign.late = 0.0 if at != sign.seen else sign.late + seconds
        sign.seen = at
