"""The composition root: starts the parts in order, stops them in reverse.

Threads (each has one owner, one stop, a named waker for every call it can block in):

| thread      | owner    | owns                           | may block in               | woken by            |
|-------------|----------|--------------------------------|----------------------------|---------------------|
| main        | the OS   | the WebSocket, signals, timers | `poll` on socket and waker | `Waker`             |
| resolver    | the link | one look-up, key and CA files  | DNS, disk                  | nothing: left behind|
| store       | Store    | the database                   | its queue, SQLite          | its queue           |
| task-<unit> | Engine   | one task while it lives        | its unit, backend, store   | end, stop, store    |
| watcher     | backend  | ends of children               | `poll` on pidfds           | a child, its waker  |
| containers  | backend  | the engine's event stream      | `poll`, the engine's CLI   | the stream, waker   |
| jobs        | backend  | the watches of Jobs and pods   | `poll`, `kubectl`          | the streams, wakers |
| opening     | main     | state and backend at the start | files, the engine's CLI    | nothing: left behind|
| dispatch-.. | backend  | one handed-over dispatcher     | `Event.wait`, its child    | its end, stop order |
| lost-<unit> | backend  | what is left of a lost agent   | the stop of its tree       | its own limits      |
| cancel-..   | Engine   | one late cancel, one listing   | the backend's calls        | their own limits    |
| image       | units    | what is known of an image      | the engine's CLI           | its last waiter     |
| sidecar     | units    | a volume that is filled        | the engine's CLI           | its last waiter     |
| upkeep      | Daemon   | late writes, expiry, adoption  | `Event.wait`, files        | stop, due removals  |
| output      | Daemon   | output shown in the log        | `Event.wait`, files        | its stop event      |
| http-metrics| exporter | the listener for scrapes       | `poll`, a name look-up     | `Waker`             |
| console-... | exporter | metrics on stdout              | `Event.wait`, `write`      | its stop event      |
| otel-*      | Daemon   | the SDK of OpenTelemetry       | imports, its queue, files  | its queue           |
| Otel*       | the SDK  | one exporter                   | the network                | its shutdown        |
| log         | Logs     | stderr or the log file         | its queue, `write`         | its queue           |
| watchdog    | Health   | the judgement over the others  | its pause                  | nothing             |
| http-health | Health   | sockets of those who ask       | `poll`                     | a socket, its waker |
| health-<..> | Health   | one look at disks, database    | files, SQLite              | nothing: left behind|
| watchdog-.. | Watchdog | its account before it leaves   | files, locks, `write`      | nothing: left behind|

All are daemon threads: one that cannot be woken (a write to a blocked terminal, a name server that never answers) does
not hold the exit, which is `os._exit` after the log has been written. A thread that dies puts itself on `deaths`; one
that neither dies nor moves is found by the watchdog (`oz_worker.vitals` has the limits).
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import queue
import signal
import threading
import time
from pathlib import Path
from typing import Any, Sequence

from oz_worker import (
    __version__,
    about,
    backends,
    instruments,
    measuring,
    opening,
    portions,
    rows,
    slots,
    threads,
    vitals,
)
from oz_worker.dialects.oz import reports
from oz_worker.dialects.oz.session import OzSession
from oz_worker.engine import recovery
from oz_worker.engine.admission import Engine
from oz_worker.engine.follow import Follower
from oz_worker.engine.instance import Instance, misfit
from oz_worker.engine.outbox import Outbox
from oz_worker.engine.output import Output
from oz_worker.engine.upkeep import Upkeep
from oz_worker.errors import ExitCode, NotUsable, OzWorkerError
from oz_worker.known import Known
from oz_worker.link.key import KeySource
from oz_worker.link.loop import Link
from oz_worker.link.traffic import Directive
from oz_worker.meters import Meters
from oz_worker.observe.health import Health
from oz_worker.observe.logs import Logs
from oz_worker.opening import CLOSE_SECONDS
from oz_worker.own_secrets import own_secrets
from oz_worker.redact import Redactor, Secret
from oz_worker.settings import Settings
from oz_worker.signals import captured
from oz_worker.slots import Slot
from oz_worker.stopping import Stopping
from oz_worker.threads import Deaths, Waker

logger = logging.getLogger(__name__)


def run(settings: Settings, warnings: Sequence[str], key_origin: str = "") -> int:
    """Run the worker until it is told to stop; the exit code. Main thread only.

    What makes it not usable is said in the log; where that is a file, it is raised as well, to be said on stderr.

    *key_origin*: the flag or variable that the key came from, where it was no file.
    """
    threading.stack_size(threads.STACK_BYTES)
    meters, waker = Meters(instruments.CATALOGUE), Waker()
    health, deaths = Health(os.environ, meters), Deaths(waker)
    known = Known(own_secrets(settings, os.environ))
    key = KeySource(
        Secret("") if settings.api_key_file else settings.api_key, settings.api_key_file, known.learn, key_origin
    )
    logs = Logs(
        level=settings.log_level,
        form=settings.log_format,
        file=settings.log_file,
        redact=known.everywhere,
        on_death=deaths,
    )
    with vitals.essential("main"), logs, captured(waker) as inbox:
        health.watch(logs, deaths)
        for warning in warnings:
            logger.warning("%s", warning)
        try:
            with contextlib.ExitStack() as parts:
                return _run(settings, key, known, logs, waker, inbox, parts, meters, health, deaths)
        except OzWorkerError as error:
            logger.critical("%s", error)
            if not settings.log_file:
                return int(error.exit_code)
            error.args = (known.everywhere(str(error)),)  # it is said on stderr too, past the log
            raise
        except Exception:  # this thread's top: the same account as of any other
            logger.exception("thread main died: leaving with exit 1, tasks are left running")
            health.tripped()
            logs.stacks()
            return ExitCode.FAULT


def _run(
    settings: Settings,
    key: KeySource,
    known: Known,
    logs: Logs,
    waker: Waker,
    inbox: queue.SimpleQueue[signal.Signals],
    parts: contextlib.ExitStack,
    meters: Meters,
    health: Health,
    deaths: Deaths,
) -> int:
    if settings.control_plane != "oz":
        raise NotUsable(f"control_plane {settings.control_plane} is not in this version; use oz")
    state_dir = Path(settings.state_dir)
    here, kind = backends.endpoint(settings, os.environ), settings.backend
    fits = functools.partial(misfit, worker_id=settings.worker_id, backend=kind, uid=os.getuid(), endpoint=here)
    # Never released: the kernel does that when the last thread is gone, and not a moment before.
    slot = slots.take(state_dir, settings.instance_id, fits)
    logger.info("oz_worker %s, worker %s, instance %s in %s", __version__, settings.worker_id, slot.id, state_dir)

    given = dict(os.environ)  # before the exporters correct there what the SDK reads: tasks get what was set
    observers = measuring.choose(settings, slot.id, meters, given)

    def open_instance(left: Slot) -> Instance:
        return opening.open_instance(settings, left, given, deaths, meters)

    def open_primary() -> Instance:
        health.listen(settings.health_listen)  # here, because a name may take its time
        return open_instance(slot)

    for_log = functools.partial(_tell_log, logs)
    parts.callback(health.close)
    if (primary := opening.interruptible(open_primary, waker, inbox, for_log)) is None:
        logger.info("stopped before the start was complete")
        return ExitCode.STOPPED
    parts.callback(primary.store.close, CLOSE_SECONDS)
    parts.callback(primary.backend.close)

    backends.refuse_shutdown(settings, primary.backend.capabilities)
    say = functools.partial(_say_what_the_start_waits_for, primary, health, known.everywhere)
    found = opening.interruptible(lambda: opening.found_outside(primary, say), waker, inbox, for_log)
    if found is None:
        logger.info("stopped before the start was complete: what runs is left for the next one")
        return ExitCode.STOPPED
    outbox = Outbox(portions.origin(settings.web_socket_url), waker.wake)
    engine = Engine(
        primary,
        outbox=outbox,
        meters=meters,
        output=Output(
            known=known,
            longest_copy=settings.task_log_max,
            retention=settings.task_log_retention,
        ),
        limits=portions.limits(settings, slot.path, here),
        encode=functools.partial(reports.encode, worker_id=settings.worker_id),
        on_change=waker.wake,
        on_death=deaths,
        tracer=observers.tracer,
    )
    session = portions.session(settings, engine)
    if settings.task_output == "log":
        engine.follower = Follower(lambda: [task.source() for task in engine.tasks()], known)
        engine.follower.start(deaths)
        parts.callback(engine.follower.stop)
    count = recovery.recover(engine, primary, found)
    if count:
        logger.info("%d tasks of the worker before this one are taken up", count)
    parts.callback(_close_others, engine)
    engine.notes.ask("log", logs.lost)
    upkeep = Upkeep(engine, open_instance, fits)
    upkeep.start(deaths)
    parts.callback(upkeep.stop, CLOSE_SECONDS)

    stopping = Stopping(portions.stop_options(settings, state_dir), engine)
    daemon = Daemon(
        settings,
        engine,
        session,
        stopping,
        logs=logs,
        health=health,
        inbox=inbox,
        deaths=deaths,
        hide=known.everywhere,
    )
    daemon.note_start()
    link = Link(
        url=settings.web_socket_url,
        worker_id=settings.worker_id,
        key=key,
        of_key=key.account(),
        options=settings.link,
        ca_file=settings.ca_file,
        waker=waker,
        traffic=daemon,
    )
    health.attend(engine)  # before anybody scrapes: a counter that rises from 0 to what it was looks like a new trip
    measuring.begin(observers, settings, engine, link.origin, logs)
    parts.callback(observers.stop)
    link.run()
    return daemon.farewell()


class Daemon:
    """What the link talks to (`Traffic`): signals, timers, frames. Every method runs on the main thread."""

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        session: OzSession,
        stopping: Stopping,
        *,
        logs: Logs,
        health: Health,
        inbox: queue.SimpleQueue[signal.Signals],
        deaths: Deaths,
        hide: Redactor,
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._outbox = engine.outbox
        self._session = session
        self._stopping = stopping
        self._logs = logs
        self._health = health
        self._inbox = inbox
        self._deaths = deaths
        self._hide = hide
        self._announced = ""
        self._link: dict[str, Any] = {}  # the fact of that name as it was noted last

    def on_wake(self) -> Directive:
        """Handle signals, deaths and timers; say what the link is to do."""
        for number in opening.drained(self._inbox):
            self._signalled(number)
        while (name := self._deaths.taken()) is not None:
            self._health.tripped()
            self._stopping.part_died(name)
            self._logs.stacks()
        next_deadline = self._engine.tick(time.monotonic())
        directive = self._stopping.decide()
        if self._stopping.step.value != self._announced:
            self._announced = self._stopping.step.value
            self._note("stop", {"step": self._announced})
        return directive._replace(call_again=min(directive.call_again, next_deadline))

    def opened(self, connection: str, origin: str) -> None:
        """Connected."""
        about.CONNECTION.set(connection)
        logger.info("connected to %s (connection %s). Listening for tasks", origin, connection)
        self._engine.meters.set("oz_worker_connected", 1)
        self._note("link", {"state": "connected", "origin": origin, "connection": connection})
        self._outbox.opened()

    def take(self, limit: int) -> Sequence[str]:
        """The next frames."""
        return self._outbox.take(limit)

    def acknowledged(self, count: int) -> None:
        """The server has read the first *count* frames of this connection."""
        self._outbox.acknowledged(count)

    def unfinished(self) -> bool:
        """Whether anything is undelivered, or the answer to a cancel that came in during the stop is still to come."""
        return self._outbox.unfinished() or self._engine.cancellation.answering()

    def received(self, text: str) -> bool:
        """A message came in."""
        return self._session.received(text)

    def closed(self, why: str) -> None:
        """Disconnected; tasks go on."""
        self._outbox.closed()
        self._engine.meters.set("oz_worker_connected", 0)
        self._note("link", {"state": "disconnected", "why": why})
        if self._stopping.stopping:
            logger.info("disconnected: %s", why)
        else:
            self._engine.meters.count("oz_worker_websocket_reconnects_total", reason="remote_close")
            logger.warning("disconnected: %s. Running tasks go on, their reports wait", why)
        about.CONNECTION.set("")

    def dial_failed(self, sentence: str, refused: bool, delay: float) -> None:
        """No connection; the link tries again."""
        self._engine.meters.count("oz_worker_websocket_reconnects_total", reason="dial_failed")
        now, state = time.time(), "refused" if refused else "disconnected"
        fact = {"state": state, "why": sentence, "tried_at": str(now)}
        if leaves := refused and self._settings.exit_on_refusal and not self._stopping.stopping:
            self._stopping.refused(sentence)  # says it
        if self._stopping.stopping and self._engine.idle():
            logger.log(logging.DEBUG if leaves else logging.WARNING, "%s", sentence)
        else:
            full = sentence if sentence.endswith(("?", ".")) else f"{sentence}."
            logger.warning("%s Next try in %.1f s", full, delay)
            fact["again_at"] = str(now + delay)
        self._note("link", fact)

    def note_start(self) -> None:
        """Facts for `status` that do not change."""
        settings = self._settings
        about = {"worker_id": settings.worker_id, "backend": settings.backend, "version": __version__}
        about |= opening.this_process() | {"url": self._outbox.origin, "limit": str(settings.max_concurrent_tasks)}
        limits = self._engine.limits  # so that `status` can look at the disks itself, where nothing can be written
        about |= {"min_free_disk": str(limits.min_free_disk), "min_free_inodes": str(limits.min_free_inodes)}
        self._note("worker", {**about, "disks": [str(path) for path in limits.disk_paths]})
        self._note("link", {"state": "connecting"})

    def farewell(self) -> int:
        """The exit code, with a last line about what is left."""
        left = self._outbox.undelivered()
        running = len(self._engine.tasks())
        self._note("stop", {"step": "stopped"})
        if running:
            logger.info("%d tasks are left running for the next start", running)
        if left:
            logger.warning("%d reports could not be delivered; they are kept and sent at the next start", left)
            if self._stopping.exit_code == ExitCode.STOPPED:
                self._stopping.exit_code = ExitCode.FAULT
        logger.info("stopped, exit code %d", self._stopping.exit_code)
        return int(self._stopping.exit_code)

    def _signalled(self, number: signal.Signals) -> None:
        if number in opening.ENDING:
            self._stopping.signalled(number)
        else:
            _tell_log(self._logs, number)

    def _note(self, name: str, fact: dict[str, Any]) -> None:
        """For `status`, the database and HTTP: a server may have repeated the key in its answer.

        A link that stays in its state stays so since the same moment, however often it was tried.
        """
        fact = {key: self._hide(text) if key == "why" else text for key, text in fact.items()}
        self._health.noted(name, fact)
        fact["at"] = time.time()
        if name == "link":
            if fact["state"] == self._link.get("state"):
                fact["at"] = self._link["at"]
            self._link = fact
        self._engine.notes.note(name, fact)


def _tell_log(logs: Logs, number: signal.Signals) -> None:
    """What the signals that do not end the worker are for."""
    if number is signal.SIGHUP:
        logs.reopen()
        logger.info("HUP: the log file is opened anew; the key file is read at the next dial")
    else:
        logs.stacks()


def _say_what_the_start_waits_for(primary: Instance, health: Health, hide: Redactor, why: str) -> None:
    health.starts(hide(why))
    text = json.dumps({**opening.this_process(), "why": hide(why)})
    primary.store.post(lambda db: rows.put_fact(db, "start", text))


def _close_others(engine: Engine) -> None:
    """Close the instances that were served besides our own."""
    for instance in engine.instances[1:]:
        vitals.stamp()
        instance.backend.close()
        instance.store.close(CLOSE_SECONDS)
