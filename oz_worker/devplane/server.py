"""The strict control plane: one port on loopback for WebSocket and HTTP, every frame judged by the rules.

Used by `python -m oz_worker dev` and, in-process, by the tests:

    with ControlPlane() as plane:
        ... start a worker with --web-socket-url plane.url, --server-root-url plane.root_url, WARP_API_KEY=plane.key
        task = plane.submit("echo hi")
        plane.wait_for(lambda: task.ended)
        plane.check()                       # raises AssertionError with every violation

Threads: one accepts, one serves each socket (`connection.Connection`, or an HTTP request of `api`). `lock` guards all
state of the plane, its tasks and connections; every method takes it itself, predicates of `wait_for` run under it.
Frames are judged and pings answered in the order of arrival, so a pong promises that what came before was judged.
"""

from __future__ import annotations

import secrets
import ssl
import threading
import time
from typing import Any, Callable, Iterable, Mapping

from oz_worker.devplane import wire
from oz_worker.devplane.connection import Connection
from oz_worker.devplane.faults import Faults
from oz_worker.devplane.port import Port, Refusal
from oz_worker.devplane.rules import Ledger, Violation
from oz_worker.devplane.tasks import REJECTED, SENT, Received, Task
from oz_worker.devplane.waiting import Waiting
from oz_worker.devplane.wire import Frame, Key

__all__ = ["ControlPlane", "Refusal"]

Observer = Callable[[str, "Task | None", str], None]


class ControlPlane(Waiting, Faults):
    """A control plane for any number of workers, strict about what they say.

    *key* is what workers must present; without one it makes its own, a new one each time. *tls* (a server-side context)
    makes it `wss`. *requeue_after*: a rejected task is offered again after that many seconds also when nothing was seen
    to change (None: only after a report or on a new connection). *redeliver_unclaimed*: on each new connection what was
    sent and never answered is sent again. *observer* is told of every edge as (what, task, detail), under the lock: it
    must be quick.
    """

    def __init__(
        self,
        *,
        key: str = "",
        host: str = "127.0.0.1",
        port: int = 0,
        tls: ssl.SSLContext | None = None,
        requeue_after: float | None = None,
        redeliver_unclaimed: bool = False,
        observer: Observer | None = None,
    ) -> None:
        Waiting.__init__(self)
        Faults.__init__(self)
        self.key = key or f"wk-dev-{secrets.token_hex(12)}"
        self.ledgers: dict[Key, Ledger] = {}
        self.received: list[Received] = []
        self.refused: list[tuple[float, int]] = []
        self._waiting: dict[Key, Task] = {}
        self._refused: dict[Key, Task] = {}
        self._requeue_after = requeue_after
        self._redeliver_unclaimed = redeliver_unclaimed
        self._observer = observer
        self._retry: threading.Timer | None = None
        self.port = Port(self, host=host, port=port, tls=tls)

    # Life.

    def __enter__(self) -> ControlPlane:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen. The port is known from here on and stays the same through `down` and `up`."""
        self.port.open()

    def stop(self) -> None:
        """Close every socket and join every thread; idempotent."""
        with self.lock:
            self._requeue_after = None
            if self._retry is not None:
                self._retry.cancel()
        self.port.close()

    @property
    def url(self) -> str:
        """Where workers connect, `ws[s]://127.0.0.1:port/api/v1/selfhosted/worker/ws`."""
        return f"{'wss' if self.port.tls else 'ws'}://{self.port.address}{Port.WEB_SOCKET_PATH}"

    @property
    def root_url(self) -> str:
        """The HTTP side, `http[s]://127.0.0.1:port`."""
        return f"{'https' if self.port.tls else 'http'}://{self.port.address}"

    # Work.

    def submit(
        self,
        script: str = "",
        *,
        task_id: str | None = None,
        execution_id: str | None = None,
        run_id: str | None = None,
        env_vars: Mapping[str, str] | None = None,
        snapshot: Mapping[str, Any] | None = None,
        task_extra: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
        frame: str | None = None,
        requeue: bool = True,
    ) -> Task:
        """Queue a task and send it at once when a worker is connected.

        Ids are made up where None; `execution_id=""` leaves it out. *run_id* is `task.id` (default: the task id).
        *script* is the prompt, which the sample agent runs. *env_vars* join the task's own WARP_API_KEY. *task_extra*
        and *extra* add to, or replace, fields of the task object and of the frame's data. *frame* is sent instead of
        all that, as it is; the ids must then say what a worker can read from it. *requeue*: offer it again when it was
        rejected. Raises ValueError when the key exists (see `redeliver`).
        """
        mark = secrets.token_hex(4)
        key = Key(
            f"task-{mark}" if task_id is None else task_id, f"exec-{mark}" if execution_id is None else execution_id
        )
        secret = f"task-key-{secrets.token_hex(12)}"
        task_object: dict[str, Any] = {
            "id": key.task_id if run_id is None else run_id,
            "title": (script.splitlines() or ["no script"])[0][:60],
            "task_definition": {"prompt": script},
            "created_at": "2026-01-01T00:00:00Z",
            "updated_at": "2026-01-01T00:00:00Z",
        }
        if snapshot is not None:
            task_object["agent_config_snapshot"] = dict(snapshot)
        task_object.update(task_extra or {})
        text = (
            frame
            if frame is not None
            else wire.assignment(
                key.task_id,
                execution_id=key.execution_id,
                task=task_object,
                env_vars={"WARP_API_KEY": secret, **(env_vars or {})},
                extra=extra,
            )
        )
        with self.lock:
            if key in self.tasks:
                raise ValueError(f"{key} was submitted before")
            ledger = self.ledgers.setdefault(key, Ledger(key))
            task = Task(key, str(task_object["id"]), text, secret, script, ledger, requeue=requeue)
            if env_vars and "WARP_API_KEY" in env_vars:
                task.secret = env_vars["WARP_API_KEY"]
            self.tasks[key] = task
            self._wait(task)
            self._tell("submitted", task)
            self._offer()
            return task

    def redeliver(self, task: Task) -> None:
        """Send a task's assignment again, byte-identical, on the newest connection (queued when there is none)."""
        with self.lock:
            self._wait(task)
            self._offer()

    def cancel(self, task: Task | str, execution_id: str | None = None) -> None:
        """Cancel a task's execution; `execution_id=""` cancels all of the task's. With strings: any ids at all.

        Raises ConnectionError when no worker is connected: a cancel is not queued.
        """
        task_id = task.task_id if isinstance(task, Task) else task
        if execution_id is None:
            execution_id = task.execution_id if isinstance(task, Task) else ""
        with self.lock:
            connection = self._connected()
            for ledger in self._covered(task_id, execution_id):
                ledger.cancelled()
                known = self.tasks.get(ledger.key)
                if known is not None:
                    known.cancelled_at = known.cancelled_at or time.monotonic()
                    self._tell("cancel sent", known)
            connection.send_text(wire.cancellation(task_id, execution_id))

    def send_text(self, text: str) -> None:
        """Send any text message on the newest connection, past the rules."""
        with self.lock:
            self._connected().send_text(text)

    def send_binary(self, data: bytes) -> None:
        """Send a binary message on the newest connection."""
        with self.lock:
            self._connected().send_binary(data)

    def send_bytes(self, data: bytes) -> None:
        """Send bytes on the newest connection with no frame around them."""
        with self.lock:
            self._connected().send_bytes(data)

    def send_ping(self, data: bytes = b"") -> None:
        """Send a ping on the newest connection."""
        with self.lock:
            self._connected().send_ping(data)

    def abandon(self) -> None:
        """The worker's state was lost on purpose: what it had claimed may be answered as unknown."""
        with self.lock:
            for ledger in self.ledgers.values():
                ledger.abandoned()

    # Called by connections and HTTP handlers.

    def connection_opened(self, connection: Connection) -> None:
        """A handshake succeeded. Requires holding the lock."""
        self.connections.append(connection)
        self._tell("connected", None, f"connection {connection.number} of {connection.worker_id}")
        for task in self.tasks.values():
            if (task.state == REJECTED and task.requeue) or (task.state == SENT and self._redeliver_unclaimed):
                self._wait(task)
        self._offer()

    def connection_closed(self, connection: Connection) -> None:
        """A connection is over."""
        with self.lock:
            self._tell("disconnected", None, f"connection {connection.number}")

    def handshake_refused(self, status: int) -> None:
        """A handshake was answered with *status*; 0 for silence or raw bytes. Requires holding the lock."""
        self.refused.append((time.monotonic(), status))
        self._tell("refused", None, str(status or "without an answer"))

    def message_received(self, connection: Connection, data: bytes) -> None:
        """Judge one message. Requires holding the lock."""
        try:
            frame = wire.parse(data.decode())
        except (UnicodeDecodeError, wire.WireFault) as error:
            self.violation(f"connection {connection.number}: {error}: {data[:300]!r}")
            return
        for entry in self.cuts:
            if entry[0](frame):
                self.cuts.remove(entry)
                connection.cut("reset")
                if entry[1]:
                    return
                break
        self._judge(connection, frame)

    def ping_received(self, connection: Connection) -> None:
        """A ping was answered after everything before it was judged. Requires holding the lock."""
        if self.pongs == "echo":
            for ledger in connection.unconfirmed:
                if ledger.acknowledged(connection.number):
                    self._tell("acknowledged", self.tasks.get(ledger.key))
        connection.unconfirmed.clear()
        self.lock.notify_all()

    def batch_done(self, connection: Connection) -> None:
        """What arrived together was judged: offer again what may be taken now. Requires holding the lock."""
        self._offer()

    def agent_started(self, task: Task, run: str) -> None:
        """An agent asked for its prompt."""
        with self.lock:
            try:
                task.ledger.agent(run)
            except Violation as error:
                self.violation(str(error))
            self._tell("agent started", task)

    def agent_printed(self, task: Task, data: bytes) -> None:
        """An agent sent a piece of its output."""
        with self.lock:
            task.append(data)
            self._tell("output", task, data.decode("utf-8", "replace"))

    def agent_ended(self, task: Task, code: int) -> None:
        """The sample agent is about to exit with *code*."""
        with self.lock:
            task.agent_code = code
            self._tell("agent ended", task, str(code))

    def violation(self, sentence: str) -> None:
        """Record that the worker broke a rule."""
        with self.lock:
            self.violations.append(sentence)
            self._tell("violation", None, sentence)

    # Inside; all of it requires holding the lock.

    def _judge(self, connection: Connection, frame: Frame) -> None:
        entry = Received(frame, connection.number, time.monotonic())
        self.received.append(entry)
        task = self.tasks.get(frame.key)
        if task is not None:
            task.history.append(entry)
        ledger = self.ledgers.get(frame.key)
        try:
            if frame.kind == wire.CLAIMED and frame.worker_id != connection.worker_id:
                raise Violation(
                    f"{frame.key} was claimed by {frame.worker_id!r} on the connection of {connection.worker_id!r}"
                )
            if ledger is None:
                raise Violation(f"{frame.kind} for {frame.key}, which this server never named{self._near(frame.key)}")
            first_end = frame.terminal and ledger.attempt.terminal is None
            ledger.received(frame, connection.number)
        except Violation as error:
            self.violation(f"connection {connection.number}: {error}")
            return
        connection.unconfirmed.append(ledger)
        if self.pongs != "echo":
            ledger.acknowledged(connection.number)  # told apart in no other way: judged by what was written
        if task is not None:
            self._follow_up(task, frame, first_end)
        self._tell("task_cancelled" if frame.cancelled else frame.kind, task, frame.message or frame.reason)

    def _follow_up(self, task: Task, frame: Frame, first_end: bool) -> None:
        """What the frame changes for other tasks: one report frees one slot, a rejection waits for that."""
        if first_end:
            task.ended_at = time.monotonic()
            while self._refused:
                freed = self._refused.pop(next(iter(self._refused)))
                if freed.state == REJECTED:
                    self._wait(freed)
                    break
        elif task.state == REJECTED and task.requeue:
            self._refused[task.key] = task
            if self._requeue_after is not None and self._retry is None:
                self._retry = threading.Timer(self._requeue_after, self._offer_again)
                self._retry.daemon = True
                self._retry.start()

    def _offer_again(self) -> None:
        """The retry timer's thread: what was rejected may be taken now."""
        with self.lock:
            self._retry = None
            for task in self._refused.values():
                if task.state == REJECTED:
                    self._wait(task)
            self._offer()

    def _offer(self) -> None:
        """Send every waiting assignment when a worker is there."""
        connection = self.newest()
        if connection is None:
            return
        waiting, self._waiting = self._waiting, {}
        for task in waiting.values():
            task.waiting = False
            self._refused.pop(task.key, None)
            task.deliveries += 1
            task.sent_at = task.sent_at or time.monotonic()
            task.ledger.assigned(connection.number)
            connection.send_text(task.text)
            self._tell("sent", task)

    def _wait(self, task: Task) -> None:
        task.waiting = True
        self._waiting[task.key] = task

    def _connected(self) -> Connection:
        connection = self.newest()
        if connection is None:
            raise ConnectionError("no worker is connected")
        return connection

    def _covered(self, task_id: str, execution_id: str) -> Iterable[Ledger]:
        if execution_id:
            key = Key(task_id, execution_id)
            return [self.ledgers.setdefault(key, Ledger(key))]
        return [ledger for ledger in self.ledgers.values() if ledger.key.task_id == task_id]

    def _near(self, key: Key) -> str:
        known = [str(other) for other in self.ledgers if other.task_id == key.task_id]
        return f" (it knows {', '.join(known)})" if known else ""

    def _tell(self, what: str, task: Task | None, detail: str = "") -> None:
        self.lock.notify_all()
        if self._observer is not None:
            self._observer(what, task, detail)
