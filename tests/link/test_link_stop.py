"""Stop is prompt in every state of the link: each of these waits would otherwise last far longer than the test."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import closing
from dataclasses import replace
from typing import Any, Callable, Sequence

import pytest

from oz_worker.link.session import Limits
from oz_worker.link.traffic import Phase
from oz_worker.redact import Secret
from tests.link.book import FAST, KEY, PATIENCE, Running
from tests.link.conftest import Line
from tests.rawserver import Peer, RawServer, refused_port, silent_listener

SLOW = replace(
    FAST, ping_interval=1e4, dead_after=2e4, write_timeout=1e4, dial_timeout=1e4, backoff_min=1e4, backoff_max=2e4
)
"""Every wait longer than any test: only the waker can end it."""

Stop = Callable[[Running], None]


def leave(run: Running) -> None:
    run.book.order(Phase.LEAVE)


def flush(run: Running) -> None:
    run.flush(1e4)


stops = pytest.mark.parametrize("stop", [leave, flush])


@stops
def test_in_backoff(stop: Stop) -> None:
    with Running(f"ws://127.0.0.1:{refused_port()}/", options=SLOW) as run:
        assert run.book.expect("failed")[3] >= 5e3
        stop(run)
        run.ended()


@stops
def test_in_a_look_up_that_hangs(stop: Stop) -> None:
    asked, release = threading.Event(), threading.Event()

    def look(host: str, port: int) -> Sequence[Any]:
        asked.set()
        release.wait(PATIENCE * 2)
        return []

    with Running("ws://name.example/", options=SLOW, look=look) as run:
        assert asked.wait(PATIENCE)
        stop(run)
        run.ended()
        release.set()


@stops
def test_while_the_key_file_hangs(stop: Stop) -> None:
    asked, release = threading.Event(), threading.Event()

    def key() -> Secret:
        asked.set()
        release.wait(PATIENCE * 2)
        return Secret(KEY)

    with Running("ws://127.0.0.1:1/", options=SLOW, key=key) as run:
        assert asked.wait(PATIENCE)
        stop(run)
        run.ended()
        release.set()


@stops
def test_in_a_connect_that_nobody_answers(stop: Stop) -> None:
    looked = threading.Event()
    listener, port = silent_listener()

    def look(host: str, port: int) -> Sequence[Any]:
        looked.set()
        return socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)

    with closing(listener), Running(f"ws://127.0.0.1:{port}/", options=SLOW, look=look) as run:
        assert looked.wait(PATIENCE)
        stop(run)
        run.ended()


@stops
@pytest.mark.parametrize("scheme", ["ws", "wss"])
def test_while_the_proxy_is_silent(scheme: str, stop: Stop) -> None:
    reached = threading.Event()

    def script(peer: Peer) -> None:
        peer.read_head()
        reached.set()
        peer.hold()

    with RawServer(script) as server:
        proxy = {"http_proxy": f"http://{server.place}", "https_proxy": f"http://{server.place}"}
        with Running(f"{scheme}://server.example/", options=SLOW, environ=proxy) as run:
            assert reached.wait(PATIENCE)
            stop(run)
            run.ended()


@stops
def test_in_a_tls_handshake_that_stalls(stop: Stop) -> None:
    reached = threading.Event()

    def script(peer: Peer) -> None:
        peer.read(5)
        reached.set()
        peer.hold()

    with RawServer(script) as server, Running(f"wss://{server.place}/", options=SLOW) as run:
        assert reached.wait(PATIENCE)
        stop(run)
        run.ended()


@stops
def test_in_a_handshake_that_stalls(stop: Stop, line: Line) -> None:
    reached = threading.Event()

    def script(peer: Peer) -> None:
        peer.read_head()
        peer.send(b"HTTP/1.1 101 Swi")
        reached.set()
        peer.hold()

    with line(script, SLOW) as (_, run):
        assert reached.wait(PATIENCE)
        stop(run)
        run.ended()


@stops
def test_while_idle(stop: Stop, line: Line) -> None:
    def script(peer: Peer) -> None:
        peer.accept()
        peer.hold()  # reads nothing: even a close frame is never answered

    with line(script, SLOW) as (_, run):
        run.book.expect("opened")
        stop(run)
        run.ended()
        run.book.expect("closed")


def stuck(peer: Peer) -> None:
    peer.accept()
    peer.hold()


def test_leave_ends_a_blocked_write_at_once(line: Line) -> None:
    with line(stuck, SLOW) as (_, run):
        run.book.expect("opened")
        run.book.post(*["z" * 4_000_000] * 4)
        _until_blocked(run)
        leave(run)
        run.ended()
        assert len(run.book.left) == 4


def test_any_other_wake_lets_a_blocked_frame_finish(line: Line) -> None:
    go = threading.Event()

    def script(peer: Peer) -> None:
        peer.accept()
        go.wait(PATIENCE)
        peer.serve()

    with line(script, SLOW) as (server, run):
        run.book.expect("opened")
        run.book.post("z" * 8_000_000)
        _until_blocked(run)
        flush(run)
        run.heard()
        go.set()
        assert len(server.texts.get(timeout=PATIENCE)) == 8_000_000
        run.ended()
        assert run.book.left == []


def _until_blocked(run: Running) -> None:
    """A wake-up that is answered after everything was taken is answered from inside the blocked write."""
    end = time.monotonic() + PATIENCE
    while not run.book.taken_all:
        assert time.monotonic() < end, "the link did not take the frames"
        time.sleep(0.005)
    run.heard()


def test_flush_offline_dials_once_at_once_and_keeps_what_it_cannot_deliver() -> None:
    with Running(f"ws://127.0.0.1:{refused_port()}/", options=SLOW) as run:
        run.book.expect("failed")
        run.book.post("a report")
        run.flush()
        assert run.book.expect("failed")[3] == 0
        run.ended()
        assert run.book.left == ["a report"]


def test_flush_offline_delivers_by_that_one_dial(line: Line) -> None:
    def script(peer: Peer) -> None:
        if peer.number == 0:
            peer.refuse("503 Busy")
        else:
            peer.accept()
            peer.serve()

    with line(script, SLOW) as (server, run):
        run.book.expect("failed")
        run.book.post("a report")
        flush(run)
        run.ended()
        assert run.book.left == []
        assert server.texts.get_nowait() == "a report"


def test_flush_gives_up_at_its_moment_and_keeps_the_rows(line: Line) -> None:
    def script(peer: Peer) -> None:
        peer.accept()
        while True:  # reads everything, confirms nothing
            peer.read_frame()

    with line(script, SLOW, limits=Limits(closing=0.2)) as (_, run):
        run.book.post("a report")
        run.book.expect("opened")
        run.flush(0.2)
        run.ended()
        assert run.book.left == ["a report"]


def test_flush_gives_up_at_its_moment_during_a_dial() -> None:
    looked = threading.Event()
    release = threading.Event()

    def look(host: str, port: int) -> Sequence[Any]:
        looked.set()
        release.wait(PATIENCE * 2)
        return []

    with Running("ws://name.example/", options=SLOW, look=look) as run:
        run.book.post("a report")
        assert looked.wait(PATIENCE)
        run.flush(0.2)
        run.ended()
        release.set()


def test_leave_ends_a_close_handshake_at_once(line: Line) -> None:
    closing_began = threading.Event()

    def script(peer: Peer) -> None:
        peer.accept()
        peer.read_close()
        closing_began.set()
        peer.hold()

    with line(script, SLOW) as (_, run):
        run.book.expect("opened")
        run.book.post("a report")
        run.flush(0.05)
        assert closing_began.wait(PATIENCE)
        leave(run)
        run.ended()


def test_the_daemons_timer_is_served_in_every_wait() -> None:
    with Running(f"ws://127.0.0.1:{refused_port()}/", options=SLOW) as run:
        run.book.expect("failed")
        run.book.tick(0.01)
        assert run.book.ticked(5)
