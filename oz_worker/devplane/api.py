"""The control plane over HTTP: submit, list and cancel for people; prompt and output for agents (names.md).

    POST /tasks {"script": "...", "count": 1, "task_id"?, "execution_id"?, "env_vars"?}     201
    GET  /tasks                                                                             200
    GET  /tasks/ID                                                                          200
    POST /tasks/ID/cancel {"execution_id"?}                                                 202
    GET  /agent/tasks/ID/prompt          bearer = the task's own WARP_API_KEY               200, text
    POST /agent/tasks/ID/output          the same; a piece of what the agent prints         204
                                         X-Oz-Exit-Code on the last one

Submitting runs programs, so the port is no open door: it listens on loopback only, a request that a web page sent
(an Origin header, or a Host that is no loopback name) is refused, and where the kernel tells whose socket the peer
is, so is another user's.
"""

from __future__ import annotations

import hmac
import io
import json
import os
import socket
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any, Callable, Union

from oz_worker.devplane.tasks import Task

if TYPE_CHECKING:
    from oz_worker.devplane.server import ControlPlane

BODY_BYTES = 1024 * 1024
IDLE_SECONDS = 60.0
TASKS_AT_ONCE = 1000
SUBMIT_FIELDS = {"script": str, "count": int, "task_id": str, "execution_id": str, "env_vars": dict}

Content = Union[dict[str, Any], str]


class Answer(Exception):
    """A request ends here with a status and a sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


def serve(plane: ControlPlane, sock: socket.socket, head: bytes) -> None:
    """Answer the requests of one socket, of which *head* has been read, until its client leaves."""
    sock.settimeout(IDLE_SECONDS)
    Handler(plane, sock, head)


class Handler(BaseHTTPRequestHandler):
    """The requests of one socket, one after another."""

    protocol_version = "HTTP/1.1"
    server_version = "oz-worker-dev"
    sys_version = ""

    def __init__(self, plane: ControlPlane, sock: socket.socket, head: bytes) -> None:
        self._plane = plane
        self._head = head
        super().__init__(sock, sock.getpeername()[:2], None)  # type: ignore[arg-type]  # no socketserver behind it

    def setup(self) -> None:
        """Read what has been read already before the rest."""
        self.connection = self.request
        self.rfile = io.BufferedReader(_Replay(self._head, self.request))
        self.wfile = self.request.makefile("wb")

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the plane's observer tells of edges."""

    def do_GET(self) -> None:
        """List, show, hand out a prompt."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """Submit, cancel, take output."""
        self._answer(self._post)

    def _answer(self, handle: Callable[[list[str]], tuple[int, Content]]) -> None:
        """Take the lock to look and to order, never to write: a client that does not read holds only itself."""
        try:
            self._only_local()
            status, content = handle([part for part in self.path.partition("?")[0].split("/") if part])
        except Answer as answer:
            # The rest of a body that was not read would be taken for the next request.
            self.close_connection = self.close_connection or answer.status in (403, 411, 413)
            status, content = answer.status, {"error": str(answer)}
        self._send(status, content)

    def _get(self, path: list[str]) -> tuple[int, Content]:
        with self._plane.lock:
            if path == ["tasks"]:
                return 200, {"tasks": [_line(task) for task in self._plane.tasks.values()]}
            if len(path) == 2 and path[0] == "tasks":
                return 200, _whole(self._named(path[1]))
            if len(path) == 4 and path[:2] == ["agent", "tasks"] and path[3] == "prompt":
                task = self._own(path[2])
                self._plane.agent_started(task, self.headers.get("X-Oz-Agent-Run", ""))
                return 200, task.script
        raise Answer(404, f"there is nothing to get at {self.path}; try /tasks")

    def _post(self, path: list[str]) -> tuple[int, Content]:
        body = self._body()
        with self._plane.lock:
            if path == ["tasks"]:
                return 201, {"tasks": self._submit(_object(body))}
            if len(path) == 3 and path[0] == "tasks" and path[2] == "cancel":
                return 202, self._cancel(path[1], _object(body).get("execution_id"))
            if len(path) == 4 and path[:2] == ["agent", "tasks"] and path[3] == "output":
                self._output(self._own(path[2]), body, self.headers.get("X-Oz-Exit-Code"))
                return 204, ""
        raise Answer(404, f"there is nothing to post to at {self.path}; try /tasks")

    def _cancel(self, task_id: str, execution_id: object) -> Content:
        task = self._named(task_id)
        if execution_id is not None and not isinstance(execution_id, str):
            raise Answer(400, "execution_id must be a string")
        try:
            self._plane.cancel(task, execution_id)
        except ConnectionError as error:
            raise Answer(409, f"{error}; a cancel is not queued, try again when one is") from None
        return _line(task)

    def _output(self, task: Task, piece: bytes, code: str | None) -> None:
        if code is not None and not (code.isascii() and code.isdigit()):
            raise Answer(400, "X-Oz-Exit-Code must be a number")
        if piece:
            self._plane.agent_printed(task, piece)
        if code is not None:
            self._plane.agent_ended(task, int(code))

    def _submit(self, wanted: dict[str, Any]) -> list[dict[str, Any]]:
        for name, value in wanted.items():
            if name not in SUBMIT_FIELDS:
                raise Answer(400, f"unknown field {name!r}; known are {', '.join(SUBMIT_FIELDS)}")
            if type(value) is not SUBMIT_FIELDS[name]:
                raise Answer(400, f"{name} must be of type {SUBMIT_FIELDS[name].__name__}")
        if not wanted.get("script", "").strip():
            raise Answer(400, 'a task needs a script, as in {"script": "echo hi"}')
        environment = wanted.get("env_vars", {})
        if not all(isinstance(value, str) for value in environment.values()):
            raise Answer(400, "every value of env_vars must be a string")
        count = wanted.get("count", 1)
        if not 1 <= count <= TASKS_AT_ONCE or (count > 1 and "task_id" in wanted):
            raise Answer(400, f"count must be 1 to {TASKS_AT_ONCE}, and 1 when task_id is given")
        try:
            return [
                _line(
                    self._plane.submit(
                        wanted["script"],
                        task_id=wanted.get("task_id"),
                        execution_id=wanted.get("execution_id"),
                        env_vars=environment,
                    )
                )
                for _ in range(count)
            ]
        except ValueError as error:
            raise Answer(409, str(error)) from None

    def _named(self, task_id: str) -> Task:
        """The newest task of that id."""
        found = [task for task in self._plane.tasks.values() if task.task_id == task_id]
        if not found:
            raise Answer(404, f"there is no task {task_id}; GET /tasks lists them")
        return found[-1]

    def _own(self, run_id: str) -> Task:
        """The task that the bearer of this request belongs to."""
        scheme, _, bearer = self.headers.get("Authorization", "").partition(" ")
        for task in self._plane.tasks.values():
            same = hmac.compare_digest(task.secret.encode(), bearer.strip().encode())
            if same and task.run_id == run_id and scheme.lower() == "bearer":
                return task
        raise Answer(401, f"this needs the WARP_API_KEY of task {run_id} as bearer")

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise Answer(411, "say the size of the body in Content-Length")
        if len(length) > 9 or int(length) > BODY_BYTES:
            raise Answer(413, f"a body has at most {BODY_BYTES} bytes")
        return self.rfile.read(int(length))

    def _only_local(self) -> None:
        host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if host not in ("127.0.0.1", "localhost", "[::1]") or "Origin" in self.headers:
            raise Answer(403, "this port serves programs on this machine, no web pages")
        if not _same_user(self.client_address):
            raise Answer(403, "this control plane belongs to another user of this machine")

    def _send(self, status: int, content: Content) -> None:
        data = content.encode() if isinstance(content, str) else (json.dumps(content, indent=1) + "\n").encode()
        self.send_response(status)
        if status != 204:
            kind = "text/plain; charset=utf-8" if isinstance(content, str) else "application/json"
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if status != 204:
            self.wfile.write(data)
        self.wfile.flush()


class _Replay(io.RawIOBase):
    """A stream of the bytes that were read too early, and then of the socket."""

    def __init__(self, early: bytes, sock: socket.socket) -> None:
        self._early = early
        self._socket = sock

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._early:
            count = min(len(buffer), len(self._early))
            buffer[:count] = self._early[:count]
            self._early = self._early[count:]
            return count
        return self._socket.recv_into(buffer)


def _same_user(peer: tuple[str, int]) -> bool:
    """Whether the kernel says that the loopback socket *peer* is ours or root's; where it does not say (no /proc): yes.

    Only a socket that is still connected counts: a closed one belongs to nobody, and is listed as root's.
    """
    table, address = ("tcp6", "0" * 24 + "01000000") if ":" in peer[0] else ("tcp", "0100007F")
    try:
        with open(f"/proc/net/{table}", encoding="ascii") as lines:
            rows = [line.split() for line in lines]
    except OSError:
        return True
    if len(rows) < 2:
        return True  # not even our own listener: this kernel only pretends to have the table
    wanted = f"{address}:{peer[1]:04X}"
    return any(len(row) > 7 and row[1] == wanted and row[3] == "01" and int(row[7]) in (0, os.getuid()) for row in rows)


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body or b"{}")
    except (ValueError, RecursionError) as error:
        raise Answer(400, f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Answer(400, "the body must be a JSON object")
    return value


def _line(task: Task) -> dict[str, Any]:
    end = task.terminal
    return {
        "task_id": task.task_id,
        "execution_id": task.execution_id,
        "state": task.state,
        "message": end.message if end else "",
        "reason": end.reason if end else "",
        "exit_code": end.exit_code if end else None,
        "closed": task.closed,
        "agent_exit_code": task.agent_code,
    }


def _whole(task: Task) -> dict[str, Any]:
    frames = [{"type": entry.frame.kind, "connection": entry.connection} for entry in task.history]
    output = bytes(task.output).decode("utf-8", "replace")
    return {**_line(task), "frames": frames, "output": output, "output_bytes": task.output_size}
