"""What is posted arrives, in order, and is gone only once the peer has read it."""

from __future__ import annotations

import logging
import random
from dataclasses import replace

import pytest

from oz_worker.link.session import Limits
from tests.link.book import FAST, KEY, PATIENCE
from tests.link.conftest import Line
from tests.rawserver import CLOSE, PING, PONG, TEXT, Gone, Peer


def test_what_is_posted_arrives_in_order_and_is_acknowledged(line: Line) -> None:
    def script(peer: Peer) -> None:
        peer.accept()
        assert b"GET /ws?worker_id=w%201 HTTP/1.1" in peer.request
        assert peer.header("Authorization") == "Bearer wk-4711-not-to-be-seen"
        assert peer.header("User-Agent").startswith("oz-worker/")
        assert peer.header("X-Warp-Worker-Capabilities") == "execution-scoped-cancellation-v1"
        assert not peer.header("Origin")
        peer.serve()

    with line(script) as (server, run):
        run.book.post(*(f"m{n}" for n in range(200)))
        for n in range(200):
            assert server.texts.get(timeout=PATIENCE) == f"m{n}"
        run.flush()
        run.ended()
        assert run.book.left == []
        assert server.closes.get(timeout=PATIENCE) == 1000


def test_every_message_arrives_through_fifty_random_cuts(line: Line) -> None:
    rng = random.Random(4)
    cuts = [(rng.randrange(1, 30), rng.choice(["reset", "close", "half"])) for _ in range(50)]

    def script(peer: Peer) -> None:
        peer.accept()
        if peer.number >= len(cuts):
            peer.serve()
            return
        count, how = cuts[peer.number]
        while count:
            opcode, data = peer.read_frame()
            if opcode == TEXT:
                peer.server.texts.put(data.decode())
                count -= 1
            elif opcode == PING:
                peer.frame(PONG, data)
            else:
                raise Gone
        if how == "half":
            peer.send(b"\x81\x7e\x10")
        elif how == "reset":
            peer.reset()

    with line(script, replace(FAST, backoff_max=0.01)) as (server, run):
        for n in range(400):
            run.book.post(f"m{n}")
        seen: list[str] = []
        while "m399" not in seen:
            seen.append(server.texts.get(timeout=PATIENCE))
        run.flush()
        run.ended()
        first_seen = list(dict.fromkeys(seen))
    assert first_seen == [f"m{n}" for n in range(400)]
    assert run.book.left == []


@pytest.mark.parametrize("size", [0, 125, 126, 65535, 65536, 300_000])
def test_frames_of_every_length_class_arrive_whole(size: int, line: Line) -> None:
    def script(peer: Peer) -> None:
        peer.accept()
        peer.text("x" * size)
        peer.serve()

    with line(script) as (server, run):
        assert run.book.got.get(timeout=PATIENCE) == "x" * size
        run.book.post("y" * size)
        assert server.texts.get(timeout=PATIENCE) == "y" * size


def test_the_key_never_shows_in_a_log(line: Line, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    def script(peer: Peer) -> None:
        if peer.number == 0:
            peer.refuse("401 Unauthorized", "Set-Cookie: session=hush-hush", body=b"no")
            return
        peer.accept()
        peer.serve()

    with line(script) as (_, run):
        run.book.expect("failed")
        run.book.post("a report")
        run.book.expect("acknowledged")
        run.flush()
        run.ended()
    assert KEY not in caplog.text
    assert "hush-hush" not in caplog.text


def test_under_write_a_flush_does_not_storm_the_server_with_pings(line: Line) -> None:
    pings = 0

    def script(peer: Peer) -> None:
        nonlocal pings
        peer.accept()
        while True:
            opcode, data = peer.read_frame()
            if opcode == PING:
                pings += 1
                peer.frame(PONG, data)
            elif opcode == CLOSE:
                return

    options = replace(FAST, acknowledgement="write", ping_interval=1e4)
    with line(script, options, limits=Limits(written=0.3, written_blind=0.3)) as (_, run):
        run.book.post("a report")
        run.book.expect("opened")
        run.flush()
        run.ended()
        assert run.book.left == []
    assert pings == 0
