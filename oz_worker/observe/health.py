"""`health_listen`: `/healthz`, `/readyz` and `/status`, answered without the main thread.

| path       | 200                                                  | 503                                         |
|------------|------------------------------------------------------|---------------------------------------------|
| `/healthz` | every essential thread lives and works               | which one died or is late, a line for each  |
| `/readyz`  | tasks are taken, if only when a slot is free         | why not, a line for each reason             |
| `/status`  | what `status --json` prints of the instances served  | the database or a disk does not answer      |

`/healthz` reads memory and nothing else. The other two look at disks and at the database, which may hang: they do that
on a thread of their own, for which whoever asks waits `PATIENCE` seconds, less than probes do; meanwhile the listener
serves others.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import re
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Mapping, MutableMapping

from oz_worker import threads, vitals
from oz_worker.engine import gate
from oz_worker.errors import NotUsable
from oz_worker.meters import Meters
from oz_worker.observe.http import Listener, Reply
from oz_worker.observe.logs import Logs
from oz_worker.observe.notify import Notify
from oz_worker.observe.watchdog import Watchdog

if TYPE_CHECKING:
    from oz_worker.engine.admission import Engine

logger = logging.getLogger(__name__)

PATIENCE = 0.8
QUICK_SECONDS = 0.02
"""The listener itself waits so long for a page that is made: with an idle disk it is there."""
FRESH_SECONDS = 0.5
"""An answer so young is given again: whoever asks a thousand times a second must not look as often."""
_JSON = "application/json"
_CLOSE_SECONDS = 1.0
_TRIPS_FILE = "trips"


class Health:
    """Whether the worker lives and is ready, and who hears of it: those who ask, and the service manager.

    The pages belong to the listener's thread, everything else to the main thread. Takes the manager's variables out of
    *environ*.
    """

    def __init__(self, environ: MutableMapping[str, str], meters: Meters) -> None:
        self._notify = Notify(environ)
        self._meters = meters
        self._engine: Engine | None = None
        self._link: Mapping[str, str] = {"state": "connecting"}
        self._starting = ""  # what the start waits for; written by the thread that waits
        self._step = "running"
        self._told = ""
        self._listener: Listener | None = None
        self._tripped = threading.Lock()  # taken by whoever counts the end of this process, and never given back

    def watch(self, logs: Logs, on_death: threads.OnDeath) -> None:
        """Start the watchdog. What holds even that up, the manager ends by ABRT: then all stacks go to stderr."""
        faulthandler.enable()
        Watchdog(
            logs,
            on_trip=self.tripped,
            on_look=self._notify.looked,
            pause=self._notify.watched_seconds / 2,
        ).start(on_death)

    def listen(self, address: str) -> None:
        """Serve on *address* (host:port; no host means every interface), "" for nowhere. Raises NotUsable."""
        if not address:
            return
        host, port = place_of(address)
        ready, status = _Slow("readyz", self._ready), _Slow("status", self._status)
        pages = {"/healthz": _healthz, "/readyz": ready.reply, "/status": status.reply}
        self._listener = Listener("http-health", host, port, pages)
        try:
            bound = self._listener.open()
        except (OSError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise NotUsable(
                f"health_listen: nothing can be served on {address} ({why}); choose an address of this machine and a"
                " port that is free, or leave the key out"
            ) from None
        self._listener.start(lambda _name, _error: None)  # whoever asks notices
        logger.info("serving /healthz, /readyz and /status on %s port %d", *bound)

    def close(self) -> None:
        """Serve no more."""
        if self._listener is not None:
            self._listener.stop(_CLOSE_SECONDS)

    def attend(self, engine: Engine) -> None:
        """The state and the backend are open and the first dial follows: from now on their facts count.

        A service is ready now: a server that cannot be reached must not make its start fail.
        """
        self._engine = engine
        with contextlib.suppress(OSError, ValueError):  # there is none, or nobody's number
            self._meters.count("oz_worker_watchdog_trips_total", trips_of(engine.primary.path / _TRIPS_FILE))
        self._told = self._standing()
        self._notify.ready(self._told)

    def starts(self, why: str) -> None:
        """The start waits, and for what. Any thread."""
        self._starting = why
        self._notify.status(gate.starting(why))

    def tripped(self) -> None:
        """A thread died or is stuck, and the worker leaves for that: counted once, also for the next start.

        Whoever scrapes would hardly ever see it otherwise, because the process that counts it is about to end. One that
        leaves because a thread died, and is helped because another one is stuck meanwhile, leaves once. Any thread; may
        hang with the disk.
        """
        if not self._tripped.acquire(blocking=False):
            return
        self._meters.count("oz_worker_watchdog_trips_total")
        if self._engine is not None:
            with contextlib.suppress(OSError):
                (self._engine.primary.path / _TRIPS_FILE).write_text(
                    f"{self._meters.value('oz_worker_watchdog_trips_total'):.0f}\n"
                )

    def noted(self, name: str, fact: Mapping[str, str]) -> None:
        """The daemon wrote down a fact for `status`."""
        if name == "link":
            self._link = fact
        elif name == "stop":
            self._step = fact["step"]
        if self._step != "running" and name == "stop":
            self._notify.stopping(self._standing())
        elif self._engine is not None and (standing := self._standing()) != self._told:
            self._told = standing
            self._notify.status(standing)

    def _standing(self) -> str:
        """One line for `systemctl status`."""
        link = self._link
        where = f": {why}" if (why := link.get("why") or link.get("origin")) else ""
        stop = "" if self._step == "running" else f"stopping ({self._step}), "
        return f"{stop}{link['state']}{where}"

    def why_not_ready(self) -> list[str]:
        """Why no task is taken, a sentence each. May look at disks."""
        engine = self._engine
        if engine is None:
            return [gate.starting(self._starting)]
        return gate.why_not_ready(self._step, self._link, engine.troubles())

    def _ready(self) -> Reply:
        found = self.why_not_ready()
        return Reply(503 if found else 200, _lines(found or ["ready"]))

    def _status(self) -> Reply:
        from oz_worker.observe.status import account_of  # late: it costs the start time

        served = list(self._engine.instances) if self._engine is not None else []
        text = json.dumps([account_of(instance.path) for instance in served], indent=2)
        return Reply(200, (text + "\n").encode(), _JSON)


def trips_of(path: Path) -> int:
    """How many times the workers before this one left for a thread. OSError, ValueError when nobody wrote it down."""
    text = path.read_text(encoding="ascii").strip()
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValueError(f"{path} holds no number")
    return int(text)


def place_of(address: str) -> tuple[str, int]:
    """Where to listen for `health_listen`, which the configuration has proven to be host:port."""
    host, _, port = address.rpartition(":")
    return host.strip("[]") or ("::" if socket.has_dualstack_ipv6() else "0.0.0.0"), int(port)


def _healthz() -> Reply:
    found = vitals.troubles()
    return Reply(503 if found else 200, _lines(found or ["healthy"]))


def _lines(sentences: list[str]) -> bytes:
    return "".join(f"{' '.join(sentence.split())}\n" for sentence in sentences).encode("utf-8", "replace")


class _Slow:
    """A page that may hang: at most one thread is at it, its answer is used when it comes. The listener's thread only,
    but for `_look`, which writes `_answer` and `_made` before it says so."""

    def __init__(self, name: str, make: Callable[[], Reply]) -> None:
        self._name = name
        self._make = make
        self._done = threading.Event()
        self._done.set()
        self._answer: Reply | None = None
        self._asked = self._made = 0.0  # monotonic

    def reply(self) -> Reply | None:
        """A page of the last half second; None while it may still come, then 503 until it does.

        One that took so long that nobody waited for it any more tells of a time that is gone: another one is made.
        """
        since = self._made if self._made - self._asked <= PATIENCE else self._asked
        if self._done.is_set() and (self._answer is None or time.monotonic() - since > FRESH_SECONDS):
            self._answer, self._asked = None, time.monotonic()
            self._done.clear()
            try:
                threads.start(f"health-{self._name}", self._look, lambda _name, _error: None)
            except RuntimeError:  # no thread is to be had
                self._done.set()
                return self._nothing()
            self._done.wait(QUICK_SECONDS)
        if self._done.is_set():
            return self._answer
        return None if time.monotonic() - self._asked < PATIENCE else self._nothing()

    def _nothing(self) -> Reply:
        return Reply(503, _lines([f"/{self._name} is not to be had: a disk or the database does not answer"]))

    def _look(self) -> None:
        try:
            self._answer = self._make()
        except Exception as error:  # an observer's fault: whoever asked is told
            self._answer = Reply(503, _lines([f"/{self._name} is not to be had: {error}"]))
        finally:
            self._made = time.monotonic()
            self._done.set()
