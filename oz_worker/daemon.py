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
| pull, fill  | units    | one image or volume            | the engine's CLI           | its last waiter     |
| upkeep      | Daemon   | late writes, expiry, adoption  | `Event.wait`, files        | stop, due removals  |
| output      | Daemon   | output shown in the log        | `Event.wait`, files        | its stop event      |
| log         | Logs     | stderr or the log file         | its queue, `write`         | its queue           |

All are daemon threads: one that cannot be woken (a write to a blocked terminal, a name server that never answers) does
not hold the exit, which is `os._exit` after the log has been written. A thread that dies puts itself on `deaths`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import queue
import select
import signal
import threading
import time
from pathlib import Path
from typing import Callable, Sequence, TypeVar
from urllib.parse import urlsplit

from oz_worker import __version__, about, backends, rows, slots, threads
from oz_worker.dialects.oz import reports
from oz_worker.dialects.oz.session import OzSession
from oz_worker.engine import recovery
from oz_worker.engine.admission import Engine, Limits
from oz_worker.engine.follow import Follower
from oz_worker.engine.instance import Instance, misfit
from oz_worker.engine.outbox import Outbox
from oz_worker.engine.output import Output
from oz_worker.engine.upkeep import Upkeep
from oz_worker.errors import ExitCode, NotUsable
from oz_worker.known import Known
from oz_worker.link.key import KeySource
from oz_worker.link.loop import Link
from oz_worker.link.traffic import Directive
from oz_worker.meters import Meters
from oz_worker.observe.logs import Logs
from oz_worker.own_secrets import own_secrets
from oz_worker.redact import Secret
from oz_worker.settings import DirectOptions, Settings
from oz_worker.signals import captured
from oz_worker.slots import Slot
from oz_worker.stopping import BLIND_FLUSH, LONG_FLUSH, StopOptions, Stopping
from oz_worker.store import Store
from oz_worker.threads import Waker

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 5.0
T = TypeVar("T")


def run(settings: Settings, warnings: Sequence[str]) -> int:
    """Run the worker until it is told to stop; the exit code. Main thread only. Raises NotUsable before it connects."""
    threading.stack_size(threads.STACK_BYTES)
    known = Known(own_secrets(settings, os.environ))
    logs = Logs(level=settings.log_level, form=settings.log_format, file=settings.log_file, redact=known.everywhere)
    waker = Waker()
    with logs, captured(waker) as inbox:
        for warning in warnings:
            logger.warning("%s", warning)
        with contextlib.ExitStack() as parts:
            return _run(settings, known, logs, waker, inbox, parts)


def _run(
    settings: Settings,
    known: Known,
    logs: Logs,
    waker: Waker,
    inbox: queue.SimpleQueue[signal.Signals],
    parts: contextlib.ExitStack,
) -> int:
    deaths: queue.SimpleQueue[str] = queue.SimpleQueue()

    def on_death(name: str, _error: BaseException) -> None:
        deaths.put(name)
        waker.wake()

    if settings.control_plane != "oz":
        raise NotUsable(f"control_plane {settings.control_plane} is not in this version; use oz")
    if settings.health_listen:
        raise NotUsable("health_listen: the health endpoint is not in this version; leave the key out")
    state_dir = Path(settings.state_dir)
    here, kind = backends.endpoint(settings, os.environ), settings.backend
    fits = functools.partial(misfit, worker_id=settings.worker_id, backend=kind, uid=os.getuid(), endpoint=here)
    # Never released: the kernel does that when the last thread is gone, and not a moment before.
    slot = slots.take(state_dir, settings.instance_id, fits)
    logger.info("oz_worker %s, worker %s, instance %s in %s", __version__, settings.worker_id, slot.id, state_dir)

    def open_instance(left: Slot) -> Instance:
        return _open_instance(settings, left, on_death)

    primary = _interruptible(lambda: _open_instance(settings, slot, on_death), waker, inbox)
    if primary is None:
        logger.info("stopped before the start was complete")
        return ExitCode.STOPPED
    parts.callback(primary.store.close, CLOSE_SECONDS)
    parts.callback(primary.backend.close)

    if settings.on_shutdown == "preserve" and not primary.backend.capabilities.survives_worker:
        raise NotUsable(
            "on_shutdown: preserve cannot work for the direct backend in a container, whose tasks die with it; set"
            " on_shutdown to drain or cancel"
        )
    meters = Meters()
    outbox = Outbox(origin_of(settings.web_socket_url), waker.wake)
    engine = Engine(
        primary,
        outbox=outbox,
        meters=meters,
        output=Output(
            known=known,
            longest_copy=settings.task_log_max,
            retention=settings.task_log_retention,
        ),
        limits=_limits(settings, slot.path, here),
        encode=functools.partial(reports.encode, worker_id=settings.worker_id),
        on_change=waker.wake,
        on_death=on_death,
    )
    session = _session(settings, engine)
    if settings.task_output == "log":
        engine.follower = Follower(lambda: [task.source() for task in engine.tasks()], known)
        engine.follower.start(on_death)
        parts.callback(engine.follower.stop)
    count = recovery.recover(engine, primary)
    if count:
        logger.info("%d tasks of the worker before this one are taken up", count)
    parts.callback(_close_others, engine)
    upkeep = Upkeep(engine, open_instance, fits)
    upkeep.start(on_death)
    parts.callback(upkeep.stop, CLOSE_SECONDS)

    stopping = Stopping(_stop_options(settings, state_dir), engine)
    daemon = Daemon(settings, engine, session, stopping, logs=logs, waker=waker, inbox=inbox, deaths=deaths)
    daemon.note_start()
    link = Link(
        url=settings.web_socket_url,
        worker_id=settings.worker_id,
        key=KeySource(Secret("") if settings.api_key_file else settings.api_key, settings.api_key_file, known.learn),
        options=settings.link,
        ca_file=settings.ca_file,
        waker=waker,
        traffic=daemon,
    )
    link.run()
    return daemon.farewell()


def origin_of(url: str) -> str:
    """scheme://host:port of a URL: what decides whether a report is meant for this server."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "wss" else 80)
    return f"{parts.scheme}://{(parts.hostname or '').lower()}:{port}"


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
        waker: Waker,
        inbox: queue.SimpleQueue[signal.Signals],
        deaths: queue.SimpleQueue[str],
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._outbox = engine.outbox
        self._session = session
        self._stopping = stopping
        self._logs = logs
        self._waker = waker
        self._inbox = inbox
        self._deaths = deaths
        self._announced = ""

    def on_wake(self) -> Directive:
        """Handle signals, deaths and timers; say what the link is to do."""
        for number in _drained(self._inbox):
            self._signalled(number)
        for name in _drained(self._deaths):
            self._stopping.part_died(name)
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
        """Whether anything is undelivered."""
        return self._outbox.unfinished()

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
        logger.warning("%s Next try in %.1f s", sentence, delay)
        self._note("link", {"state": "refused" if refused else "disconnected", "why": sentence})
        if refused and (self._settings.exit_on_refusal or self._settings.one_shot):
            self._stopping.refused(sentence)

    def note_start(self) -> None:
        """Facts for `status` that do not change."""
        settings = self._settings
        about = {"worker_id": settings.worker_id, "backend": settings.backend, "version": __version__}
        about |= {"pid": str(os.getpid()), "url": self._outbox.origin, "limit": str(settings.max_concurrent_tasks)}
        self._note("worker", about)
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
        if number in (signal.SIGQUIT, signal.SIGUSR2):
            self._logs.stacks()
        elif number is signal.SIGHUP:
            self._logs.reopen()
            logger.info("HUP: the log file is opened anew; the key file is read at the next dial")
        else:
            self._stopping.signalled(number)

    def _note(self, name: str, fact: dict[str, str]) -> None:
        text = json.dumps({**fact, "at": time.time()})
        self._engine.primary.store.post(lambda db: rows.put_fact(db, name, text), lambda _result, _error: None)


def _drained(source: queue.SimpleQueue[T]) -> list[T]:
    items: list[T] = []
    while True:
        try:
            items.append(source.get_nowait())
        except queue.Empty:
            return items


def _open_instance(settings: Settings, slot: Slot, on_death: threads.OnDeath) -> Instance:
    """The database and the backend of a held directory. Raises NotUsable with nothing left open."""
    store = Store(slot.path / "state.db")
    store.start(on_death)
    try:
        backend = backends.make_backend(settings, instance=slot.id, instance_dir=slot.path, on_death=on_death)
        backend.open()
    except BaseException:
        store.close(CLOSE_SECONDS)
        raise
    return Instance(slot, store, backend)


def _close_others(engine: Engine) -> None:
    """Close the instances that were served besides our own."""
    for instance in engine.instances[1:]:
        instance.backend.close()
        instance.store.close(CLOSE_SECONDS)


def _interruptible(
    opening: Callable[[], Instance], waker: Waker, inbox: queue.SimpleQueue[signal.Signals]
) -> Instance | None:
    """Open on a thread of its own, so that a signal ends a slow start at once: then None. Raises as *opening* does."""
    answer: queue.SimpleQueue[Instance | BaseException] = queue.SimpleQueue()

    def body() -> None:
        try:
            answer.put(opening())
        except BaseException as error:  # raised again by the main thread
            answer.put(error)
        waker.wake()

    threads.start("opening", body, lambda _name, _error: None)
    poll = select.poll()
    poll.register(waker.fileno(), select.POLLIN)
    while True:
        poll.poll()
        waker.drain()
        if any(number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1) for number in _drained(inbox)):
            return None
        with contextlib.suppress(queue.Empty):
            opened = answer.get_nowait()
            if isinstance(opened, BaseException):
                raise opened
            return opened


def _session(settings: Settings, engine: Engine) -> OzSession:
    return OzSession(
        intake=engine,
        worker_id=settings.worker_id,
        server_root_url=settings.server_root_url,
        session_sharing_server_url=settings.session_sharing_server_url,
        idle_on_complete=settings.idle_on_complete,
        meters=engine.meters,
    )


def _limits(settings: Settings, instance: Path, endpoint: str) -> Limits:
    options = settings.options
    workspace = options.target_dir or options.workspace_root if isinstance(options, DirectOptions) else ""
    return Limits(
        max_concurrent_tasks=settings.max_concurrent_tasks,
        most_tasks=1 if settings.one_shot else settings.exit_after.tasks,
        one_shot=settings.one_shot,
        stop_grace=settings.stop_grace,
        task_timeout=settings.task_timeout,
        cleanup=settings.cleanup,
        keep_failed=settings.keep_failed,
        min_free_disk=settings.min_free_disk,
        min_free_inodes=settings.min_free_inodes,
        disk_paths=tuple(Path(path) for path in (str(instance), workspace) if path),
        backend=settings.backend,
        endpoint=endpoint,
    )


def _stop_options(settings: Settings, state_dir: Path) -> StopOptions:
    flush = settings.flush_timeout
    if settings.link.acknowledgement == "write":
        flush = max(flush, BLIND_FLUSH)
    short_lived = settings.one_shot or (slots.in_container() and os.stat(state_dir).st_dev == os.stat("/").st_dev)
    return StopOptions(
        on_shutdown=settings.on_shutdown,
        stop_grace=settings.stop_grace,
        drain_timeout=settings.drain_timeout,
        flush_timeout=max(flush, LONG_FLUSH) if short_lived else flush,
        exit_tasks=settings.exit_after.tasks,
        exit_idle=settings.exit_after.idle,
        exit_uptime=settings.exit_after.uptime,
        one_shot=settings.one_shot,
    )
