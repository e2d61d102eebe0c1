"""HTTP for the API: reads requests, asks who sends them, lets the faults have their way, and answers."""

from __future__ import annotations

import http.server
import json
import select
import socket
import ssl
import struct
import traceback
from typing import Any, Callable, Iterator, Mapping

from tests.cluster import rest
from tests.cluster.access import ADMIN, User
from tests.cluster.api import Api
from tests.cluster.faults import ApiFaults, Cut
from tests.cluster.front import Front
from tests.cluster.refusals import Refused, internal, unauthorized
from tests.cluster.requests import Journal, Request, parse
from tests.cluster.watching import Broken, Watch, lines

_LARGEST_BODY = 3 * 1024 * 1024


class Server:
    """The API server. *users* maps bearer tokens to who they stand for; without *secure* no token means the admin."""

    def __init__(
        self,
        api: Api,
        answers: rest.Rest,
        faults: Callable[[Callable[[], Front]], ApiFaults],
        *,
        port: int = 0,
        tls: ssl.SSLContext | None = None,
        bookmark_every: float = 60.0,
    ) -> None:
        self.api = api
        self.rest = answers
        self.journal = Journal()
        self.users: dict[str, User] = {}
        self.secure = tls is not None
        self.bookmark_every = bookmark_every
        self.mistakes: list[str] = []
        self.faults = faults(lambda: self.front)
        self.front = Front(self._serve, port, tls)

    def user(self, headers: Mapping[str, str]) -> User:
        """Who sends a request. Raises Refused (401)."""
        kind, _, token = headers.get("authorization", "").partition(" ")
        if not token:
            return User("system:anonymous", ()) if self.secure else ADMIN
        if kind.lower() != "bearer" or token not in self.users or token in self.faults.expired_tokens:
            raise unauthorized()
        return self.users[token]

    def _serve(self, connection: socket.socket) -> None:
        server = self

        class Handler(_Handler):
            cluster = server

        Handler(connection, ("127.0.0.1", 0), None)  # type: ignore[arg-type]

    def close(self) -> None:
        self.faults.close()
        self.front.close()


class _Handler(http.server.BaseHTTPRequestHandler):
    """One connection."""

    cluster: Server
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # each answer leaves in as few packets as it can
    server_version = "cluster"

    def log_message(self, format: str, *args: Any) -> None:
        """Requests stand in the journal."""

    def handle(self) -> None:
        try:
            super().handle()
        except (OSError, ValueError):
            self.close_connection = True  # cut, by them or by us

    def _one(self) -> None:
        body = self._body()
        path, query, target = parse(self.command, self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, path, query, headers, body, target)
        number = self.cluster.journal.enter(request)
        self._number = number
        try:
            if len(body) > _LARGEST_BODY:
                raise Refused(413, "RequestEntityTooLarge", f"Request entity too large: limit is {_LARGEST_BODY}")
            self.cluster.faults.meet(request)
            answer = self.cluster.rest.answer(request, self.cluster.user(headers))
            if isinstance(answer, rest.Answer):
                self._send(answer)
            else:
                self._stream(answer, request)
        except Refused as refused:
            self._send(rest.Answer(refused.code, refused.status, headers=refused.headers))
        except Cut:
            self._reset()
        except (OSError, ssl.SSLError):
            raise
        except Exception as error:
            self.cluster.mistakes.append(traceback.format_exc())
            self._send(rest.Answer(500, internal(repr(error)).status))

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("transfer-encoding", ""):
            return self._bytes(int(self.headers.get("content-length") or 0))
        parts = []
        while size := int(self._line().split(b";")[0], 16):
            parts.append(self._bytes(size))
            self._line()
        while self._line().strip():
            pass  # trailers
        return b"".join(parts)

    def _bytes(self, size: int) -> bytes:
        data = self.rfile.read(size)
        if len(data) < size:
            raise ConnectionError("the body of a request was cut off")
        return data

    def _line(self) -> bytes:
        """The next line of a body. One that is cut off is no body: what it was to say is not known."""
        line = self.rfile.readline()
        if not line.endswith(b"\n"):
            raise ConnectionError("the body of a request was cut off")
        return line

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _one

    def _send(self, answer: rest.Answer) -> None:
        data = answer.text if answer.text is not None else json.dumps(answer.body).encode() + b"\n"
        self.cluster.journal.answered(self._number, answer.code)
        self.send_response(answer.code)
        self.send_header("Content-Type", answer.kind)
        self.send_header("Content-Length", str(len(data)))
        for name, value in answer.headers.items():
            self.send_header(name, value)
        for warning in answer.warnings:
            said = warning.replace("\\", "\\\\").replace('"', '\\"')
            self.send_header("Warning", f'299 - "{said}"')
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()

    def _stream(self, answer: rest.Stream, request: Request) -> None:
        watch = Watch(answer.asked, request.agent) if answer.asked else None
        kind = "text/plain" if watch is None else "application/json"
        self.cluster.journal.answered(self._number, 200)
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.flush()
        if watch is None:
            self._chunks(answer.parts)
            return
        self.cluster.faults.begins(watch)
        try:
            self._chunks(lines(self.cluster.api.store, watch, self.cluster.bookmark_every, self._is_there))
        except Broken:
            self._reset()
        finally:
            self.cluster.faults.is_over(watch)

    def _chunks(self, parts: Iterator[bytes]) -> None:
        for part in parts:
            if part:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
            self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")
        self.wfile.flush()

    def _is_there(self) -> bool:
        """Whether the other side still listens: it says nothing while a stream runs, so what can be read is its end."""
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        return not poll.poll(0)

    def _reset(self) -> None:
        """End the connection as a crash does."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
