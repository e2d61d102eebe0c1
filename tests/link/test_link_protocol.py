"""What a peer may send, how much of it, how slowly, and what it hears when it goes too far."""

from __future__ import annotations

import queue
import struct
from dataclasses import replace

import pytest

from oz_worker.link import message
from oz_worker.link.session import Limits
from tests.link.book import FAST, PATIENCE
from tests.link.conftest import Line
from tests.rawserver import BINARY, CLOSE, CONT, PING, PONG, TEXT, Gone, Peer, encode

VIOLATIONS = {
    "reserved bit": (encode(TEXT, b"x", rsv=4), 1002),
    "reserved opcode": (encode(3, b"x"), 1002),
    "reserved control opcode": (encode(11, b""), 1002),
    "lonely continuation": (encode(CONT, b"x"), 1002),
    "message inside a message": (encode(TEXT, b"x", fin=False) + encode(TEXT, b"y"), 1002),
    "split ping": (encode(PING, b"x", fin=False), 1002),
    "split pong": (encode(PONG, b"x", fin=False), 1002),
    "long ping": (encode(PING, b"x" * 126), 1002),
    "long pong": (encode(PONG, b"x" * 126), 1002),
    "close code of one byte": (encode(CLOSE, b"\x03"), 1002),
    "close code nobody may send": (encode(CLOSE, struct.pack("!H", 1005)), 1002),
    "close reason that is no text": (encode(CLOSE, struct.pack("!H", 1000) + b"\xff\xfe"), 1007),
    "text that is not UTF-8": (encode(TEXT, b"\xc3\x28"), 1007),
    "text that is not UTF-8 in parts": (encode(TEXT, b"\xc3", fin=False) + encode(CONT, b"\x28"), 1007),
    "too many parts": (encode(TEXT, fin=False) + encode(CONT, fin=False) * 4096, 1009),
    "too big in parts": (encode(TEXT, b"x" * 2**20, fin=False) + encode(CONT, b"x" * 2**20, fin=False) * 16, 1009),
}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_violation_is_answered_with_its_code_and_the_link_goes_on(name: str, line: Line) -> None:
    data, code = VIOLATIONS[name]
    codes: queue.Queue[int] = queue.Queue()

    def script(peer: Peer) -> None:
        peer.accept()
        if peer.number == 0:
            peer.send(data)
            codes.put(peer.read_close())
        else:
            peer.text("still here")
            peer.serve()

    with line(script) as (_, run):
        assert codes.get(timeout=PATIENCE) == code
        assert run.book.got.get(timeout=PATIENCE) == "still here"


def test_a_message_of_exactly_the_cap_arrives_and_one_byte_more_does_not(line: Line) -> None:
    codes: queue.Queue[int] = queue.Queue()
    size = message.MESSAGE_BYTES

    def script(peer: Peer) -> None:
        peer.accept()
        if peer.number == 0:
            peer.frame(TEXT, b"x" * size)
            peer.frame(TEXT, b"x" * (size + 1))
            codes.put(peer.read_close())

    with line(script) as (_, run):
        assert len(run.book.got.get(timeout=PATIENCE)) == size
        assert codes.get(timeout=PATIENCE) == 1009


def test_an_announced_length_of_exabytes_costs_no_more_than_the_cap(line: Line) -> None:
    def script(peer: Peer) -> None:
        peer.accept()
        if peer.number == 0:
            peer.send(encode(BINARY, length=2**62))
            while True:
                peer.send(b"x" * 65536)

    with line(script) as (_, run):
        assert "more than" in run.book.expect("closed")[1]


def test_a_message_dribbled_byte_by_byte_between_pings_arrives(line: Line) -> None:
    pongs: queue.Queue[bytes] = queue.Queue()

    def script(peer: Peer) -> None:
        peer.accept()
        peer.drip(encode(TEXT, "gr\u00fc\u00df".encode()[:3], fin=False), 0.06)  # slower than a slice
        peer.frame(PING, b"between")
        pongs.put(peer.read_frame()[1])
        peer.drip(encode(CONT, "gr\u00fc\u00df".encode()[3:]), 0.06)
        peer.serve()

    with line(script, replace(FAST, ping_interval=1e4)) as (_, run):
        assert run.book.got.get(timeout=PATIENCE) == "gr\u00fc\u00df"
        assert pongs.get(timeout=PATIENCE) == b"between"


def test_a_dripping_peer_does_not_hold_up_what_is_sent(line: Line) -> None:
    arrived: queue.Queue[str] = queue.Queue()

    def script(peer: Peer) -> None:
        peer.accept()
        peer.send(b"\x81\x7d")  # a frame that begins and never ends
        arrived.put(peer.read_text())
        peer.send(b"x" * 0x7D)
        peer.serve()

    with line(script) as (_, run):
        run.book.expect("opened")
        run.book.post("a report")
        assert arrived.get(timeout=PATIENCE) == "a report"
        run.flush()
        run.ended()
        assert run.book.left == []


@pytest.mark.parametrize("drip", [True, False])
def test_a_message_that_is_not_whole_in_time_ends_with_1008(drip: bool, line: Line) -> None:
    codes: queue.Queue[int] = queue.Queue()

    def script(peer: Peer) -> None:
        peer.accept()
        if peer.number == 0:
            peer.send(b"\x81\x7e\x70\x00")
            if drip:
                peer.drip(b"x" * 20, 0.02)
            codes.put(peer.read_close())

    with line(script, limits=Limits(message=0.2, pause=0.0)) as (_, run):
        assert codes.get(timeout=PATIENCE) == 1008
        assert "whole within" in run.book.expect("closed")[1]


def test_binary_and_empty_messages_do_not_end_the_link(line: Line, caplog: pytest.LogCaptureFixture) -> None:
    def script(peer: Peer) -> None:
        peer.accept()
        for _ in range(20):
            peer.frame(BINARY, b"\0\1")
        peer.text("")
        peer.text("text")
        peer.serve()

    with line(script) as (_, run):
        assert run.book.got.get(timeout=PATIENCE) == ""
        assert run.book.got.get(timeout=PATIENCE) == "text"
    assert sum("binary" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("end", ["close", "reset", "end", "inside a frame", "inside a header"])
def test_however_a_connection_ends_the_next_one_comes(end: str, line: Line) -> None:
    said = {
        "close": "code 1012, back in a minute",
        "end": "without a word",
        "inside a frame": "cut inside a frame",
        "inside a header": "cut inside a frame",
        "reset": "",
    }[end]

    def script(peer: Peer) -> None:
        peer.accept()
        if peer.number:
            peer.serve()
        peer.read_text()  # a reset that came with the handshake's reply would take it along
        if end == "close":
            peer.frame(CLOSE, struct.pack("!H", 1012) + b"back in a minute")
            assert peer.read_close() == 1012
        elif end == "reset":
            peer.reset()
        elif end == "inside a frame":
            peer.send(b"\x81\x05he")
        elif end == "inside a header":
            peer.send(b"\x81")

    with line(script) as (_, run):
        run.book.post("a report")
        run.book.expect("opened")
        assert said in run.book.expect("closed")[1]
        run.book.expect("opened")


def test_a_flood_of_pings_does_not_hold_up_a_stop(line: Line) -> None:
    def script(peer: Peer) -> None:
        peer.accept()
        peer.server.texts.put("flooding")
        try:
            while True:
                peer.send(encode(PING, b"x") * 100)
                peer.read(100)
        except Gone:
            pass

    with line(script) as (server, run):
        assert server.texts.get(timeout=PATIENCE) == "flooding"
        run.book.expect("opened")
        run.flush()
        run.ended()
