"""A dead line is noticed, a living one is not called dead, and pings are trusted only where they prove something."""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import replace

import pytest

from oz_worker.link.session import Limits
from oz_worker.link.traffic import Phase
from tests.link.book import FAST, PATIENCE, Running
from tests.link.conftest import Line
from tests.rawserver import PING, PONG, TEXT, Gone, Peer, RawServer

QUICK = replace(FAST, ping_interval=0.1, dead_after=0.4)
CALM = replace(FAST, ping_interval=0.1, dead_after=0.6)
WRITTEN = Limits(pause=0.0, written=0.3, written_blind=0.6)


def test_a_half_open_line_is_noticed_and_what_was_sent_is_sent_again(line: Line) -> None:
    def script(peer: Peer) -> None:
        peer.accept()
        if peer.number == 0:
            peer.hold()  # keeps the socket, reads nothing, says nothing
        else:
            peer.serve()

    with line(script, QUICK) as (server, run):
        run.book.expect("opened")
        run.book.post("a report")
        assert "dead" in run.book.expect("closed")[1]
        assert server.texts.get(timeout=PATIENCE) == "a report"
        run.flush()
        run.ended()
        assert run.book.left == []


def test_a_silent_peer_that_still_reads_is_noticed_too(line: Line) -> None:
    def script(peer: Peer) -> None:
        peer.accept()
        if peer.number == 0:
            peer.until_gone()
        else:
            peer.serve()

    with line(script, QUICK) as (_, run):
        assert "dead" in run.book.expect("closed")[1]
        run.book.expect("opened")


def test_a_peer_that_stops_reading_trips_the_write_deadline(line: Line) -> None:
    def script(peer: Peer) -> None:
        peer.accept()
        if peer.number:
            peer.serve()
            return
        try:
            while not peer.server.leaving.wait(0.05):
                peer.text("I talk but do not listen")  # bytes come, so silence is not what ends it
        except Gone:
            pass

    with line(script, replace(FAST, write_timeout=0.3)) as (server, run):
        run.book.expect("opened")
        run.book.post("z" * 8_000_000)
        assert "stopped reading" in run.book.expect("closed")[1]
        assert len(server.texts.get(timeout=PATIENCE)) == 8_000_000


def test_an_idle_line_lives_by_its_pings(line: Line) -> None:
    """More than `dead_after` passes on one connection on which nothing but pongs comes."""
    options = replace(FAST, ping_interval=0.1, dead_after=0.7)
    lived = threading.Event()

    def script(peer: Peer) -> None:
        peer.accept()
        end = time.monotonic() + 1.5 * options.dead_after
        while time.monotonic() < end:
            opcode, data = peer.read_frame()
            assert opcode == PING
            peer.frame(PONG, data)
        lived.set()
        peer.serve()

    with line(script, options) as (server, run):
        assert lived.wait(PATIENCE)
        assert server.connections.qsize() == 1
        assert run.book.events.qsize() == 1


def test_a_machine_that_slept_redials_at_once(line: Line) -> None:
    slept = [0.0]
    options = replace(FAST, backoff_min=1e4, backoff_max=2e4, ping_interval=1e4, dead_after=40.0)

    def script(peer: Peer) -> None:
        peer.accept()
        peer.serve()

    with line(script, options, asleep=lambda: slept[0]) as (_, run):
        run.book.expect("opened")
        slept[0] = 600.0
        run.waker.wake()  # as the interface does when it comes back; without it the next look is 5 s away
        assert "slept for 600 s" in run.book.expect("closed")[1]
        run.book.expect("opened")


def test_a_machine_that_slept_during_backoff_dials_at_once(line: Line) -> None:
    slept = [0.0]

    def script(peer: Peer) -> None:
        if peer.number == 0:
            peer.refuse("500 Fault")
        else:
            peer.accept()
            peer.serve()

    options = replace(FAST, backoff_min=1e4, backoff_max=2e4, dead_after=40.0)
    with line(script, options, asleep=lambda: slept[0]) as (_, run):
        run.book.expect("failed")
        for _ in range(2):  # the second answer comes from inside the wait
            run.heard()
        slept[0] = 600.0
        run.waker.wake()
        run.book.expect("opened")


def test_bytes_that_waited_while_the_worker_was_stopped_are_life(line: Line) -> None:
    """The main thread is held up for longer than `dead_after` (as by SIGSTOP) while a message waits in the kernel."""
    go, sent, held = threading.Event(), threading.Event(), threading.Event()

    def script(peer: Peer) -> None:
        peer.accept()
        go.wait(PATIENCE)
        peer.text("hold")
        held.wait(PATIENCE)
        peer.text("while you slept")
        sent.set()
        peer.serve()

    with line(script, QUICK) as (server, run):

        def hold(text: str) -> None:
            if text == "hold":
                held.set()
                sent.wait(PATIENCE)
                time.sleep(QUICK.dead_after * 1.5)  # what is simulated is the passing of time itself

        run.book.on_text = hold
        go.set()
        assert run.book.got.get(timeout=PATIENCE) == "hold"
        assert run.book.got.get(timeout=PATIENCE) == "while you slept"
        run.flush()
        run.ended()
        assert server.connections.qsize() == 1


def talkative(peer: Peer) -> None:
    """Reads everything, answers no ping with its payload, and goes on talking."""
    peer.accept()
    peer.sock.settimeout(0.02)
    while not peer.server.leaving.is_set():
        try:
            opcode, data = peer.read_frame()
            if opcode == TEXT:
                peer.server.texts.put(data.decode())
            elif opcode == PING:
                peer.frame(PONG, b"something else")
        except TimeoutError:
            peer.frame(PING, b"are you there")


def test_a_peer_that_does_not_echo_is_found_out_after_two_connections_and_served_without_pings(
    line: Line, caplog: pytest.LogCaptureFixture
) -> None:
    with line(talkative, CALM, limits=WRITTEN) as (server, run):
        run.book.post("a report")
        assert "does not answer pings" in run.book.expect("closed")[1]
        assert run.book.left == ["a report"]
        run.book.expect("acknowledged")
        assert run.book.left == []
        assert [server.texts.get(timeout=PATIENCE) for _ in range(2)] == ["a report"] * 2
        run.book.post("another one")
        assert server.texts.get(timeout=PATIENCE) == "another one"
        run.book.expect("acknowledged")
        assert server.connections.qsize() == 2
    assert sum("does not answer pings" in record.getMessage() for record in caplog.records) == 1


def test_a_line_that_breaks_again_and_again_is_not_taken_for_a_peer_that_does_not_echo() -> None:
    """A message still comes behind the ping, then everything goes quiet: that is a broken line, however often."""

    def script(peer: Peer) -> None:
        peer.accept()
        if peer.number < 2:
            peer.read_frame()
            assert peer.read_frame()[0] == PING
            peer.text("in flight when the line broke")
            peer.hold()
        else:
            peer.serve()

    options = replace(FAST, ping_interval=0.1, dead_after=1.0)
    with RawServer(script) as server, Running(server.url, options=options) as run:
        run.book.post("a report")
        for _ in range(2):
            assert "dead" in run.book.expect("closed")[1]
            assert run.book.left == ["a report"]
        run.book.expect("acknowledged")


@pytest.mark.parametrize("asked", [True, False])
def test_acknowledgement_by_writing_needs_no_pongs_and_does_not_trust_them(asked: bool, line: Line) -> None:
    pinged: queue.Queue[bytes] = queue.Queue()

    def script(peer: Peer) -> None:
        peer.accept()
        while True:
            opcode, data = peer.read_frame()
            if opcode == PING:
                peer.frame(PONG, data)
                pinged.put(data)

    limits = WRITTEN if asked else Limits(pause=0.0, written=1e4, written_blind=1e4)
    with line(script, replace(FAST, ping_interval=0.05, acknowledgement="write"), limits=limits) as (_, run):
        run.book.post("a report")
        if asked:
            run.book.expect("acknowledged")
            return
        for _ in range(4):
            pinged.get(timeout=PATIENCE)
        assert run.book.left == ["a report"]


def test_under_write_a_frame_that_two_connections_carried_counts_as_delivered(line: Line) -> None:
    def script(peer: Peer) -> None:
        peer.accept()
        peer.server.texts.put(peer.read_text())

    limits = Limits(pause=0.0, written=1e4, written_blind=1e4)
    with line(script, replace(FAST, acknowledgement="write"), limits=limits) as (server, run):
        run.book.post("a report")
        run.book.expect("closed")
        assert run.book.left == ["a report"]
        run.book.expect("acknowledged")
        assert run.book.left == []
        assert [server.texts.get(timeout=PATIENCE) for _ in range(2)] == ["a report"] * 2


def test_forged_pongs_clear_nothing(line: Line) -> None:
    def script(peer: Peer) -> None:
        peer.accept()
        peer.read_text()
        _, ping = peer.read_frame()
        connection = ping.split(b":")[0]
        for forged in (b"999999", b"", connection + b":99999", ping + b"0", connection):
            peer.frame(PONG, forged)
        peer.text("forged")
        peer.serve()

    with line(script, replace(FAST, ping_interval=0.1)) as (_, run):
        run.book.post("a report")
        assert run.book.got.get(timeout=PATIENCE) == "forged"
        assert run.book.left == ["a report"]
        run.book.order(Phase.FLUSH, PATIENCE)
        run.ended()
        assert run.book.left == []
