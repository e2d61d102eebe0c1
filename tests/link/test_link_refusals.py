"""Each way of failing to connect is named, with its cure, its pause, and whether the server meant no."""

from __future__ import annotations

import datetime
import errno
import math
import random
import re
import socket
import ssl
from dataclasses import replace
from email.utils import format_datetime
from pathlib import Path
from typing import Any, Sequence

import pytest
import trustme

from oz_worker.dial import DialError, Step
from oz_worker.link.key import KeySource
from oz_worker.link.refusals import explain
from oz_worker.link.session import Limits
from oz_worker.redact import Secret
from oz_worker.reply import Reply
from oz_worker.timing import backoff
from tests.conftest import Certificates, server_context
from tests.link.book import FAST, KEY, Running
from tests.link.conftest import Line
from tests.rawserver import Peer, RawServer, refused_port, silent_listener

SHORT = replace(FAST, dial_timeout=0.3)
PATIENT = replace(FAST, dial_timeout=2.0)
"""The authorities are read from the disk first, which takes its time on a busy machine."""


def failure(url: str, **more: Any) -> tuple[str, bool, float]:
    """How the first dial to *url* fails."""
    with Running(url, **more) as run:
        _, sentence, refused, delay = run.book.expect("failed")
        assert KEY not in sentence
        return sentence, refused, delay


@pytest.mark.parametrize(
    ("status", "refused", "said"),
    [
        ("200 OK", False, "answers as a web page"),
        ("301 Moved", False, "redirects to wss://elsewhere.example/"),
        ("302 Found", False, "redirects to wss://elsewhere.example/"),
        ("400 Bad Request", True, "check web_socket_url and worker_id"),
        ("401 Unauthorized", True, "does not know the API key"),
        ("403 Forbidden", True, "needs team scope"),
        ("404 Not Found", True, "no worker end point at this URL"),
        ("409 Conflict", False, "another worker uses this worker id"),
        ("418 Teapot", False, "refused the connection (418 Teapot"),
        ("429 Too Many Requests", False, "too busy"),
        ("500 Internal Server Error", False, "a fault of its own"),
        ("502 Bad Gateway", False, "a fault of its own"),
        ("503 Service Unavailable", False, "too busy or being maintained"),
    ],
)
def test_a_refused_upgrade_is_named_by_its_status(status: str, refused: bool, said: str, line: Line) -> None:
    def script(peer: Peer) -> None:
        headers = ["Location: wss://elsewhere.example/", "X-Warp-Error-Code: QUOTA_7", "Content-Type: text/html"]
        peer.refuse(
            status, *headers, body=b"<html><style>p{}</style><body>because\x1b[31m\n of <b>this</b></body></html>"
        )

    with line(script) as (_, run):
        _, sentence, was_refused, delay = run.book.expect("failed")
    assert said in sentence
    assert was_refused is refused
    assert "code QUOTA_7" in sentence
    assert "because [31m of this" in sentence
    assert 0 < delay < 1


@pytest.mark.parametrize("length", ["30000000", "", "nonsense", "-5"])
def test_a_refusal_with_an_endless_body_is_still_that_refusal(length: str, line: Line) -> None:
    def script(peer: Peer) -> None:
        peer.read_head()
        peer.send(f"HTTP/1.1 403 Forbidden\r\nContent-Length: {length}\r\n\r\n".encode())
        while True:
            peer.send(b"A" * 65536)

    with line(script) as (_, run):
        _, sentence, refused, _ = run.book.expect("failed")
    assert "403 Forbidden" in sentence
    assert refused
    assert len(sentence) < 1000


def test_a_refusal_whose_body_never_comes_does_not_wait_for_it() -> None:
    def script(peer: Peer) -> None:
        peer.read_head()
        peer.send(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 1000\r\n\r\nhalf")
        peer.hold()

    with RawServer(script) as server, Running(server.url, options=replace(FAST, dial_timeout=1e4)) as run:
        _, sentence, refused, _ = run.book.expect("failed")
    assert "403 Forbidden: half" in sentence
    assert refused


def test_retry_after_is_honoured_up_to_five_minutes() -> None:
    later = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=100)
    asked = {
        "7": 7, "0": 0, "300": 300, "99999": 300, "9" * 400: 300, "-3": 0, "soon": 0, "": 0, "Mon, 32 Foo": 0,
        format_datetime(later, usegmt=True): 100,
    }  # fmt: skip
    for value, wanted in asked.items():
        said = Reply(503, "Busy", {"retry-after": value}, b"")
        delay = explain(DialError(Step.HANDSHAKE, "h:1", ValueError("x"), said)).delay
        assert delay == pytest.approx(wanted, abs=30 if wanted == 100 else 0), value


def test_the_pause_after_a_busy_answer_is_what_the_server_asked_for(line: Line) -> None:
    with line(lambda peer: peer.refuse("429 Too Many Requests", "Retry-After: 120")) as (_, run):
        assert run.book.expect("failed")[3] == 120


def test_a_server_that_says_no_is_asked_slowly() -> None:
    options = replace(FAST, refused_backoff=60.0)
    with RawServer(lambda peer: peer.refuse("401 Unauthorized")) as server, Running(server.url, options=options) as run:
        assert 30 <= run.book.expect("failed")[3] <= 60


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (b"SSH-2.0-OpenSSH_9\r\n", "does not speak HTTP or WebSocket"),
        (b"\x15\x03\x01\x00\x02\x02\x50", "handshake"),
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", "breaks the WebSocket handshake"),
        (
            b"HTTP/1.1 101 X\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: no\r\n\r\n",
            "breaks the",
        ),
        (b"", "closed the connection during the WebSocket handshake"),
        (b"HTTP/1.1 101 Swi", "closed the connection during the WebSocket handshake"),
        (b"HTTP/1.1 \xff\xfe\r\n\r\n", "does not speak HTTP or WebSocket"),
    ],
)
def test_garbage_instead_of_a_handshake_is_called_so(reply: bytes, said: str, line: Line) -> None:
    def script(peer: Peer) -> None:
        peer.read_head()
        peer.send(reply)

    with line(script) as (_, run):
        assert said in run.book.expect("failed")[1]


def test_endless_headers_end_at_the_budget(line: Line) -> None:
    def script(peer: Peer) -> None:
        peer.read_head()
        peer.send(b"HTTP/1.1 101 Switching Protocols\r\n")
        while True:
            peer.send(b"X-Bomb: " + b"a" * 1000 + b"\r\n")

    with line(script) as (_, run):
        assert "endless headers" in run.book.expect("failed")[1]


def test_a_dripping_handshake_ends_at_the_dials_deadline(line: Line) -> None:
    def script(peer: Peer) -> None:
        peer.read_head()
        peer.drip(b"HTTP/1.1 101 Switching Protocols\r\n" + b"X: y\r\n" * 1000, 0.02)

    with line(script, SHORT) as (_, run):
        assert "does not answer the WebSocket handshake" in run.book.expect("failed")[1]


def test_a_handshake_that_stalls_behind_its_yes_is_a_timeout(line: Line) -> None:
    def script(peer: Peer) -> None:
        peer.read_head()
        peer.send(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n")
        peer.hold()

    with line(script, SHORT) as (_, run):
        assert "does not answer the WebSocket handshake" in run.book.expect("failed")[1]


def test_a_port_where_nobody_listens_is_refused_by_name() -> None:
    port = refused_port()
    sentence, refused, _ = failure(f"ws://127.0.0.1:{port}/")
    assert f"127.0.0.1:{port} refused the connection" in sentence
    assert not refused


def test_an_address_that_does_not_answer_is_a_timeout() -> None:
    listener, port = silent_listener()
    with listener:
        assert "does not answer" in failure(f"ws://127.0.0.1:{port}/", options=SHORT)[0]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "cannot be resolved"),
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure"), "failed for now"),
        (UnicodeError("label too long"), "cannot be resolved"),
    ],
)
def test_a_look_up_that_fails_is_named(error: Exception, said: str) -> None:
    def look(host: str, port: int) -> Sequence[Any]:
        raise error

    sentence, _, _ = failure("wss://name.example/", look=look)
    assert said in sentence
    assert "name.example:443" in sentence


@pytest.mark.parametrize("number", [errno.ENETUNREACH, errno.EHOSTUNREACH])
def test_no_route_is_named(number: int) -> None:
    sentence = explain(DialError(Step.CONNECT, "far.example:443", OSError(number, "unreachable"))).sentence
    assert "no route to far.example:443" in sentence


@pytest.mark.parametrize("kind", ["expired", "self-signed", "wrong name", "unknown authority", "not yet"])
def test_a_bad_certificate_is_named_by_what_is_wrong(kind: str, certificates: Certificates, tmp_path: Path) -> None:
    now = datetime.datetime.now(datetime.timezone.utc)
    day = datetime.timedelta(days=1)
    ca, said = certificates.ca, ""
    if kind == "expired":
        leaf, said = ca.issue_cert("127.0.0.1", not_before=now - 2 * day, not_after=now - day), "has expired"
    elif kind == "not yet":
        leaf, said = ca.issue_cert("127.0.0.1", not_before=now + day, not_after=now + 2 * day), "is not valid yet"
    elif kind == "wrong name":
        leaf, said = ca.issue_cert("other.example"), "is for another"
    elif kind == "unknown authority":
        leaf, said = trustme.CA().issue_cert("127.0.0.1"), "authority that is not trusted here"
    else:
        leaf, said = ca.issue_cert("127.0.0.1"), "is self-signed"
    context = server_context(leaf)
    if kind == "self-signed":
        own = trustme.CA()  # an authority's certificate, served as a server's own
        (tmp_path / "own.pem").write_bytes(own.private_key_pem.bytes() + own.cert_pem.bytes())
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(str(tmp_path / "own.pem"))
    with RawServer(Peer.accept, tls=context) as server:
        sentence, refused, _ = failure(server.url, ca_file=certificates.ca_file)
    assert said in sentence
    assert not refused


@pytest.mark.parametrize("step", [Step.KEY, Step.TRUST])
def test_a_disk_that_does_not_answer_is_named(step: Step) -> None:
    sentence = explain(DialError(step, "", TimeoutError("no answer in time"))).sentence
    assert re.fullmatch(
        r"the (API key|certificate authorities) could not be read in time: see whether the disk .*", sentence
    )


def test_tls_that_stalls_is_named(certificates: Certificates) -> None:
    with RawServer(Peer.hold) as server:
        sentence = failure(f"wss://{server.place}/", options=PATIENT, ca_file=certificates.ca_file)[0]
    assert "does not answer the TLS handshake" in sentence


def test_tls_that_drips_ends_at_the_deadline(certificates: Certificates) -> None:
    def script(peer: Peer) -> None:
        peer.drip(b"\x16\x03\x03\x3f\xff" + b"\0" * 9000, 0.01)

    with RawServer(script) as server:
        sentence = failure(f"wss://{server.place}/", options=PATIENT, ca_file=certificates.ca_file)[0]
    assert "does not answer the TLS handshake" in sentence


def test_a_plain_server_behind_wss_is_named() -> None:
    def script(peer: Peer) -> None:
        peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        peer.until_gone()

    with RawServer(script) as server:
        assert "wss or ws" in failure(f"wss://{server.place}/")[0]


def test_a_server_that_hangs_up_during_tls_is_named() -> None:
    with RawServer(lambda peer: None) as server:
        assert "during the TLS handshake" in failure(f"wss://{server.place}/")[0]


@pytest.mark.parametrize("content", [None, "", "no certificate"])
def test_a_bad_ca_file_is_named(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content)
    with RawServer(Peer.hold) as server:
        sentence, _, _ = failure(f"wss://{server.place}/", ca_file=str(path))
    assert "ca_file" in sentence
    assert str(path) in sentence


def test_a_key_that_cannot_be_used_is_named_and_never_shown(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert str(missing) in failure("ws://127.0.0.1:1/", key=KeySource(Secret(""), str(missing)))[0]
    (tmp_path / "empty").write_text("\n")
    assert "is empty" in failure("ws://127.0.0.1:1/", key=KeySource(Secret(""), str(tmp_path / "empty")))[0]
    sentence = failure("ws://127.0.0.1:1/", key=KeySource(Secret(f"{KEY}\r\nX-Evil: 1")))[0]
    assert "blanks" in sentence
    (tmp_path / "long").write_text("k" * 100_000)
    assert "too long" in failure("ws://127.0.0.1:1/", key=KeySource(Secret(""), str(tmp_path / "long")))[0]


def test_the_key_file_is_read_anew_at_each_dial(tmp_path: Path, line: Line) -> None:
    path = tmp_path / "key"
    path.write_text("first\n")
    keys: list[str] = []

    def script(peer: Peer) -> None:
        peer.read_head()
        keys.append(peer.header("Authorization"))
        path.write_text("second\n")
        if peer.number == 0:
            peer.send(b"HTTP/1.1 401 Unauthorized\r\n\r\n")
        else:
            peer.send(peer.acceptance())
            peer.serve()

    with line(script, key=KeySource(Secret(""), str(path))) as (_, run):
        assert run.book.expect("failed")[2]
        run.book.expect("opened")
    assert keys == ["Bearer first", "Bearer second"]


def test_a_fleet_that_lost_its_server_together_does_not_return_together() -> None:
    """1,000 workers: their dials fill the whole window, and none comes back at once."""
    instants = [next(backoff(1, 60, random.Random(seed))) for seed in range(1000)]
    assert min(instants) >= 0.5
    buckets = [sum(1 for i in instants if 0.5 + n / 20 <= i < 0.5 + (n + 1) / 20) for n in range(10)]
    assert min(buckets) > 50  # 100 expected; a lump would leave others empty
    later = [list(zip(range(9), backoff(1, 60, random.Random(s)), strict=False))[-1][1] for s in range(1000)]
    assert 30 <= min(later) < 33
    assert 57 < max(later) <= 60
    assert not math.isclose(instants[0], instants[1])


@pytest.mark.parametrize(("healthy_after", "first"), [(1e4, (0.08, 0.16)), (0.0, (0.01, 0.02))])
def test_the_delay_grows_over_short_sessions_and_resets_after_a_healthy_one(
    healthy_after: float, first: tuple[float, float]
) -> None:
    """A failed dial tells where the delays have got to: four short sessions come before the first one, a session
    with a known message before the second."""
    options = replace(FAST, backoff_min=0.01, backoff_max=1e4, healthy_after=healthy_after)

    def script(peer: Peer) -> None:
        if peer.number in (4, 6):
            peer.refuse("500 Fault")
            return
        peer.accept()
        if peer.number == 5:
            peer.text("known")

    with RawServer(script) as server, Running(server.url, options=options) as run:
        grown, reset = run.book.expect("failed")[3], run.book.expect("failed")[3]
    assert first[0] <= grown <= first[1]
    assert 0.01 <= reset <= 0.02


def test_after_a_session_there_is_always_a_pause() -> None:
    options = replace(FAST, backoff_min=0.001, backoff_max=0.001)
    with RawServer(Peer.accept) as server, Running(server.url, options=options, limits=Limits(pause=0.2)) as run:
        run.book.known = False
        for _ in range(3):
            run.book.expect("opened")
        assert min(run.book.pauses) >= 0.2
