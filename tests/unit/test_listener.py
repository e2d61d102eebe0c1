"""The listener for scrapes and probes against everything that may call it."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Iterator

import pytest

from oz_worker.observe.http import HEAD_BYTES, MOST_OPEN, Listener, Reply

SAFETY = 60.0
LARGE = b"x" * 8_000_000


def failing() -> Reply:
    """A route with a fault."""
    raise ValueError("on purpose")


class Site:
    """A running listener and how to call it."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.address = listener.open()

    def connect(self) -> socket.socket:
        """A new connection."""
        return socket.create_connection(self.address, timeout=SAFETY)

    def ask(self, raw: bytes) -> bytes:
        """Everything that is answered to these bytes."""
        with self.connect() as connection:
            connection.sendall(raw)
            answer = b""
            while piece := connection.recv(65536):
                answer += piece
            return answer

    def get(self, path: str = "/ok") -> tuple[int, bytes]:
        """An ordinary request."""
        connection = http.client.HTTPConnection(*self.address, timeout=SAFETY)
        with contextlib.closing(connection):
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()


@pytest.fixture
def site() -> Iterator[Site]:
    deaths: list[BaseException] = []
    routes = {"/ok": lambda: Reply(200, b"fine\n"), "/large": lambda: Reply(200, LARGE), "/fault": failing}
    listener = Listener("http-test", "localhost", 0, routes)
    site = Site(listener)
    listener.start(lambda _name, error: deaths.append(error))
    yield site
    listener.stop(SAFETY)
    assert deaths == []
    with pytest.raises(ConnectionRefusedError):
        site.connect()


def test_each_request_gets_its_answer_and_nothing_but_get_and_head_is_done(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    head, _, body = site.ask(b"GET /ok?x=1 HTTP/1.1\r\nHost: h\r\n\r\n").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: 5\r\n")
    assert (b"Connection: close" in head, body) == (True, b"fine\n")
    head, _, body = site.ask(b"HEAD /ok HTTP/1.0\n\n").partition(b"\r\n\r\n")
    assert (b"Content-Length: 5" in head, body) == (True, b"")
    again = site.ask(b"GET /ok HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" * 3)
    assert (again.count(b"HTTP/1.1 200"), again.count(b"fine\n")) == (1, 1), "one answer for each connection"
    assert site.get("/large") == (200, LARGE)
    statuses = {
        b"GET http://h/ok HTTP/1.1\r\n\r\n": 200,
        b"GET /metrics HTTP/1.1\r\n\r\n": 404,
        b"GET //[ HTTP/1.1\r\n\r\n": 404,
        b"GET /ok/ HTTP/1.1\r\n\r\n": 404,
        b"GET //ok HTTP/1.1\r\n\r\n": 404,
        b"GET /../ok HTTP/1.1\r\n\r\n": 404,
        b"GET /%6fk HTTP/1.1\r\n\r\n": 404,
        b"GET /ok\0\xff HTTP/1.1\r\n\r\n": 404,
        b"HEAD /" + b"x" * (HEAD_BYTES - 100) + b" HTTP/1.1\r\n\r\n": 404,
        b"OPTIONS * HTTP/1.1\r\n\r\n": 405,
        b"get /ok HTTP/1.1\r\n\r\n": 405,
        b"CONNECT h:1 HTTP/1.1\r\n\r\n": 405,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n": 505,
        b"GET /ok HTTP/1.10\r\n\r\n": 505,
        b"POST /ok HTTP/1.1\r\nContent-Length: 9999999\r\n\r\n" + LARGE: 405,
        b"GET /ok HTTP/2.0\r\n\r\n": 505,
        b"GET /ok\r\n\r\n": 400,
        b"\x16\x03\x01\x02\x00\xff\xfe\r\n\r\n": 400,
        b"\r\n\r\n": 400,
        b"GET /ok HTTP/1.1\r\nX: " + b"y" * (2 * HEAD_BYTES): 431,
    }
    assert {raw[:40]: int(site.ask(raw).split()[1]) for raw in statuses} == {
        raw[:40]: status for raw, status in statuses.items()
    }
    assert [site.get("/fault")[0] for _ in range(3)] == [500] * 3
    assert [record.getMessage() for record in caplog.records] == [
        "http-test: /fault failed: ValueError: on purpose"  # once, and no traceback
    ]


def test_those_who_hang_dribble_break_off_or_read_nothing_cost_nobody_anything(site: Site) -> None:
    """More of them than there are places, and then five hundred good ones at once."""
    threads_before = threading.active_count()
    descriptors = len(os.listdir("/proc/self/fd"))
    hanging = []
    for number in range(MOST_OPEN * 2):
        connection = site.connect()
        if number % 4 == 1:
            connection.sendall(b"GET /ok HT")
        elif number % 4 == 2:
            connection.sendall(b"GET /large HTTP/1.1\r\n\r\n")  # and never reads
        elif number % 4 == 3:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(b"GET /large HTTP/1.1\r\n\r\n")
            connection.close()  # a reset
        hanging.append(connection)
    assert site.get() == (200, b"fine\n")
    assert threading.active_count() == threads_before
    with ThreadPoolExecutor(50) as crowd:
        assert set(crowd.map(lambda _: site.get(), range(500))) == {(200, b"fine\n")}
    for connection in hanging:
        connection.close()
    assert site.get() == (200, b"fine\n")
    site.listener.stop(SAFETY)
    assert len(os.listdir("/proc/self/fd")) < descriptors


def test_whoever_waits_for_a_slow_page_holds_up_nobody_else() -> None:
    """Pages of 0.6 s asked for by a crowd: a probe behind them would be too late, and its manager would end us."""
    asked, done = threading.Semaphore(0), threading.Event()

    def slow() -> Reply | None:
        asked.release()
        return Reply(200, b"at last\n") if done.is_set() else None

    site = Site(Listener("http-test", "localhost", 0, {"/ok": lambda: Reply(200, b"fine\n"), "/slow": slow}))
    site.listener.start(lambda _name, _error: None)
    with contextlib.closing(site.connect()) as leaves:
        leaves.sendall(b"GET /slow HTTP/1.1\r\n\r\n")
        assert asked.acquire(timeout=SAFETY)
    with ThreadPoolExecutor(20) as crowd:
        answers = [crowd.submit(site.get, "/slow") for _ in range(20)]
        for _ in range(100):
            assert asked.acquire(timeout=SAFETY)
        assert site.get() == (200, b"fine\n")
        assert not any(answer.done() for answer in answers)
        done.set()
        assert {answer.result() for answer in answers} == {(200, b"at last\n")}
    site.listener.stop(SAFETY)


def test_an_address_that_cannot_be_had_is_an_oserror() -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    with contextlib.closing(taken):
        port = taken.getsockname()[1]
        cases = {("127.0.0.1", port): "in use", ("a" * 70, 1): "no name of a host", ("192.0.2.1", 0): "assign"}
        for (host, port), words in cases.items():
            with pytest.raises(OSError, match=words):
                Listener("http-test", host, port, {}).open()
