"""URLs, look-ups, addresses, certificate authorities."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path
from typing import Any, Sequence

import pytest
import trustme

from oz_worker.dial import Dialler, interleaved, target
from oz_worker.errors import ConfigurationError
from oz_worker.pulse import Pulse
from oz_worker.resolver import Resolver
from oz_worker.threads import Waker
from oz_worker.timing import Deadline
from oz_worker.trust import Trust, UnusableRoots
from tests.link.book import PATIENCE, Running
from tests.rawserver import Peer, RawServer, refused_port, silent_listener

Entry = tuple[int, int, int, str, tuple[Any, ...]]


def entry(address: str, port: int = 1) -> Entry:
    if ":" in address:
        return (socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port, 0, 0))
    return (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port))


@pytest.mark.parametrize(
    ("url", "origin", "resource"),
    [
        ("ws://h", "ws://h:80", "/?worker_id=w"),
        ("wss://h/a/b?x=1&y=%20", "wss://h:443", "/a/b?x=1&y=%20&worker_id=w"),
        ("wss://h:8443/?worker_id=old&x=", "wss://h:8443", "/?x=&worker_id=w"),
        ("ws://[::1]:8080/ws", "ws://[::1]:8080", "/ws?worker_id=w"),
        ("WSS://User:Pass@Host.Example/ws#part", "wss://host.example:443", "/ws?worker_id=w"),
        ("wss://b\u00fccher.example/\u00fc b", "wss://xn--bcher-kva.example:443", "/%C3%BC%20b?worker_id=w"),
    ],
)
def test_a_url_keeps_its_query_and_gets_the_worker(url: str, origin: str, resource: str) -> None:
    where = target(url, {"worker_id": "w"})
    assert (where.origin, where.resource) == (origin, resource)
    assert where.url == origin + resource


def test_what_is_no_query_character_is_encoded() -> None:
    assert target("ws://h/", {"worker_id": "a b&c=d/\u00e9\r\n"}).resource == "/?worker_id=a%20b%26c%3Dd%2F%C3%A9%0D%0A"


@pytest.mark.parametrize(
    "url", ["", "h", "http://h/", "https://h", "ws://", "ws://h:port/", "ws://h:99999/", "ws://[::1/"]
)
def test_what_is_no_websocket_url_is_a_configuration_error(url: str) -> None:
    with pytest.raises(ConfigurationError, match="not a WebSocket URL"):
        target(url)


def test_families_take_turns_and_doubles_are_dropped() -> None:
    found = [entry(a) for a in ("::1", "::2", "::2", "::3", "1.1.1.1", "2.2.2.2")]
    assert [e[4][0] for e in interleaved(found)] == ["::1", "1.1.1.1", "::2", "2.2.2.2", "::3"]
    assert interleaved([]) == []


def test_every_address_is_tried_until_one_answers() -> None:
    def script(peer: Peer) -> None:
        peer.accept()
        peer.serve()

    with RawServer(script) as server:
        dead = refused_port()

        def look(host: str, port: int) -> Sequence[Entry]:
            return [entry("::1", dead), entry("127.0.0.1", dead), entry("127.0.0.1", server.port)]

        with Running("ws://name.example/", look=look) as run:
            run.book.expect("opened")


def test_an_address_that_is_silent_costs_only_its_own_patience() -> None:
    listener, silent = silent_listener()
    with listener, socket.create_server(("127.0.0.1", 0)) as good:
        clock = Clock()
        dialler = Dialler(
            clock.resolver,
            clock.pulse,
            trust=Trust("", {}),
            dead_after=40,
            look=lambda host, port: [entry("127.0.0.1", silent), entry("127.0.0.1", good.getsockname()[1])],
            environ={},
            address_seconds=0.1,
        )
        with dialler.open(target("ws://name.example/"), Deadline(1e4)) as sock:
            assert sock.getpeername() == good.getsockname()
            assert not sock.getblocking()
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        clock.waker.close()


def test_when_no_address_answers_each_is_named() -> None:
    dead, other = refused_port(), refused_port()

    def look(host: str, port: int) -> Sequence[Entry]:
        return [entry("127.0.0.1", dead), entry("127.0.0.2", other)]

    with Running("ws://name.example/", look=look) as run:
        sentence = run.book.expect("failed")[1]
    assert "name.example:80 refused the connection (127.0.0.1: " in sentence
    assert "127.0.0.2: " in sentence


class Clock:
    """A resolver with its own main thread: this one."""

    def __init__(self) -> None:
        self.waker = Waker()
        self.resolver = Resolver(self.waker)
        self.pulse = Pulse(self.waker, lambda: float("inf"))

    def ask(self, work: Any, seconds: float) -> Any:
        question = self.resolver.ask("it", work)
        return self.resolver.wait("it", question, self.pulse, time.monotonic() + seconds)


def test_a_late_answer_is_used_when_it_comes_and_only_one_thread_waits_for_it() -> None:
    clock, release, started = Clock(), threading.Event(), threading.Semaphore(0)

    def work() -> int:
        started.release()
        release.wait(PATIENCE)
        return 42

    for _ in range(3):
        with pytest.raises(TimeoutError):
            clock.ask(work, 0.02)
    release.set()
    assert clock.ask(lambda: 43, PATIENCE) == 42
    assert clock.ask(lambda: 43, PATIENCE) == 43
    assert started.acquire(blocking=False)
    assert not started.acquire(blocking=False)
    clock.waker.close()


def test_an_answer_that_nobody_waited_for_is_asked_anew() -> None:
    clock = Clock()
    question = clock.resolver.ask("it", lambda: 1)
    end = time.monotonic() + PATIENCE
    while not question.done and time.monotonic() < end:
        time.sleep(0.001)
    assert clock.ask(lambda: 2, PATIENCE) == 2
    clock.waker.close()


def test_a_late_failure_tells_of_the_past_and_is_asked_anew() -> None:
    clock, release = Clock(), threading.Event()

    def work() -> int:
        release.wait(PATIENCE)
        raise OSError("the network was down")

    with pytest.raises(TimeoutError):
        clock.ask(work, 0.02)
    late = clock.resolver.ask("it", work)
    release.set()
    end = time.monotonic() + PATIENCE
    while not late.done and time.monotonic() < end:
        time.sleep(0.001)
    assert clock.ask(lambda: 7, PATIENCE) == 7
    clock.waker.close()


def test_what_a_question_raises_is_raised_by_its_wait() -> None:
    clock = Clock()
    with pytest.raises(ZeroDivisionError):
        clock.ask(lambda: 1 // 0, PATIENCE)
    assert clock.ask(lambda: 1, PATIENCE) == 1
    clock.waker.close()


@pytest.fixture
def authorities(tmp_path: Path) -> tuple[str, str]:
    paths = []
    for name in ("one.pem", "two.pem"):
        paths.append(str(tmp_path / name))
        trustme.CA().cert_pem.write_to_path(paths[-1])
    return paths[0], paths[1]


def test_the_authorities_come_from_the_first_source_that_is_set(authorities: tuple[str, str], tmp_path: Path) -> None:
    one, two = authorities
    every = {"SSL_CERT_FILE": one, "REQUESTS_CA_BUNDLE": two}
    assert Trust(two, every).roots().origin == "ca_file"
    assert Trust("", every).roots()[:2] == ("SSL_CERT_FILE", one)
    assert Trust("", {"SSL_CERT_DIR": str(tmp_path), **every}).roots()[1:] == (one, str(tmp_path))
    assert Trust("", {"REQUESTS_CA_BUNDLE": two}).roots()[:2] == ("REQUESTS_CA_BUNDLE", two)
    assert Trust("", {"REQUESTS_CA_BUNDLE": str(tmp_path)}).roots().directory == str(tmp_path)
    assert Trust("", {}).roots().origin in ("the system's store", "certifi")
    assert Trust("", {}).context().verify_mode.name == "CERT_REQUIRED"


def test_the_context_is_built_once_and_anew_when_its_file_changes(authorities: tuple[str, str]) -> None:
    one, two = authorities
    trust = Trust(one, {})
    first = trust.context()
    assert trust.context() is first
    os.replace(two, one)
    assert trust.context() is not first
    os.remove(one)
    with pytest.raises(UnusableRoots) as caught:
        trust.context()
    assert caught.value.origin == "ca_file"


def test_a_wake_up_is_answered_in_every_wait_and_what_it_raises_gets_out() -> None:
    waker = Waker()
    calls: list[float] = []

    class Out(Exception):
        pass

    def on_wake() -> float:
        calls.append(time.monotonic())
        if len(calls) == 3:
            raise Out
        return time.monotonic() + 0.01 if len(calls) == 1 else float("inf")

    pulse = Pulse(waker, on_wake)
    waker.wake()
    assert not pulse.poll(float("inf"))  # the wake-up
    assert not pulse.poll(float("inf"))  # the moment that the first call asked for
    assert len(calls) == 2
    waker.wake()
    with pytest.raises(Out):
        pulse.poll(float("inf"))
    waker.close()
