"""The way to the server: every step that can fail, said with its cure, within its time, and without disturbing it."""

from __future__ import annotations

import os
import ssl
import threading
import time
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from typing import Any, Mapping, Sequence

import pytest
import trustme

from oz_worker.checks.der import issuer_of
from oz_worker.checks.network import Road
from oz_worker.checks.probe import Result
from oz_worker.dial import Look
from oz_worker.redact import Secret
from oz_worker.settings import LinkOptions, Settings
from tests.checks.asked import KEY, asked, command, found
from tests.conftest import Certificates, server_context
from tests.rawserver import Peer, RawServer, Script, refused_port, silent_listener
from tests.unit.test_dial_proxy import tunnel

LINK = LinkOptions(dial_timeout=20.0)
SHORT = replace(LINK, dial_timeout=1.0)
ROWS = ["proxy", "name", "connection", "certificate", "server", "clock"]


def settings(url: str, place: Path, **more: Any) -> Settings:
    defaults: dict[str, Any] = {"api_key": Secret(KEY), "link": LINK, "state_dir": str(place / "state")}
    return Settings(worker_id="w 1", web_socket_url=url, **{**defaults, **more})


def server(status: str = "", *, off: float = 0.0, body: bytes = b"", seen: list[bytes] | None = None) -> Script:
    """Answers an upgrade with *status* ("" accepts it) and anything else with its time, which is *off* by seconds."""

    def script(peer: Peer) -> None:
        head = peer.read_head()
        if seen is not None:
            seen.append(head)
        date = f"Date: {formatdate(time.time() + off, usegmt=True)}"
        if not peer.header("Upgrade"):
            peer.send(f"HTTP/1.1 404 Not Found\r\n{date}\r\nContent-Length: 0\r\n\r\n".encode())
        elif status:
            lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "X-Warp-Error-Code: E_77", date, "", ""]
            peer.send("\r\n".join(lines).encode() + body)
        else:
            peer.send(peer.acceptance())
            peer.read_close()

    return script


def tried(where: Settings, environ: Mapping[str, str] | None = None, look: Look | None = None) -> dict[str, Result]:
    with Road(where, environ or {}, look) as road:
        return found(road.probes())


def test_a_good_way_through_a_proxy_with_an_own_authority_is_ok_and_leaves_nothing(
    tmp_path: Path, certificates: Certificates
) -> None:
    tls = server_context(certificates.ca.issue_cert("server.example"))
    seen: list[bytes] = []
    config: dict[str, Any] = {
        "worker_id": "w 1",
        "ca_file": certificates.ca_file,
        "state_dir": str(tmp_path / "state"),
        "web_socket_url": "wss://server.example:8443/ws",
        "backend": {"direct": {"workspace_root": str(tmp_path / "ws"), "oz_path": "/bin/true"}},
    }
    with RawServer(server(seen=seen), tls=tls) as far, RawServer(tunnel(far.port, [])) as via:
        proxy = f"http://user:pass%20word@{via.place}"
        before = sorted(tmp_path.iterdir())
        answer = asked(tmp_path, config, https_proxy=proxy)
        lines = command(tmp_path, config, https_proxy=proxy).stdout.splitlines()
    assert set(answer.results().values()) == {"ok"}, answer.all_text
    assert (answer.code, answer.document["usable"]) == (0, True)
    assert list(answer.tests)[-6:] == ROWS
    assert answer.tests["proxy"]["said"] == f"{via.place}, from https_proxy"
    assert "trustme" in answer.tests["certificate"]["said"]
    assert {frozenset(test) for test in answer.tests.values()} == {
        frozenset(("name", "result", "seconds", "said", "cure"))
    }
    assert sorted({*answer.document}) == ["backend", "exit_code", "tests", "usable", "version", "worker_id"]
    assert [line.split()[:2] for line in lines[:-1]] == [["ok", name] for name in answer.tests]
    assert lines[-1] == f"{len(answer.tests)} ok"
    assert sorted(set(tmp_path.iterdir()) - {tmp_path / "config.yaml"}) == before
    upgrades = [head for head in seen if b"Upgrade: websocket" in head]
    assert len(upgrades) == 2
    assert all(b"worker_id=w%201" in head and KEY.encode() in head for head in upgrades)
    assert not any(KEY.encode() in head for head in seen if head not in upgrades)


@pytest.mark.parametrize(
    ("status", "said", "cure"),
    [
        ("302 Found", "redirects to nowhere", "web_socket_url"),
        ("401 Unauthorized", "does not know the API key", "make a new one"),
        ("403 Forbidden", "does not allow this API key", "team scope"),
        ("404 Not Found", "no worker end point at this URL", "web_socket_url and worker_id"),
        ("409 Conflict", "another worker uses this worker id", "its own worker_id"),
        ("503 Busy", "too busy or being maintained", "nothing is wrong here"),
    ],
)
def test_a_refusal_shows_what_the_server_said_and_its_own_cure(
    status: str, said: str, cure: str, tmp_path: Path, certificates: Certificates
) -> None:
    with RawServer(server(status, body=b"<b>ask</b> the team", off=-7200), tls=certificates.server) as far:
        shown = tried(settings(far.url, tmp_path, ca_file=certificates.ca_file))
    assert [result.outcome.value for result in shown.values()] == ["ok"] * 4 + ["failed", "warning"]
    for part in (said, status, "code E_77", "ask the team"):
        assert part in shown["server"].said
    assert cure in shown["server"].cure
    assert "is about 2h ahead of the server's" in shown["clock"].said


def test_a_server_that_repeats_the_key_does_not_get_it_shown(tmp_path: Path) -> None:
    """Nor anything else that the worker would mask in its log."""
    config = {"worker_id": "w", "web_socket_url": "", "backend": {"direct": {"oz_path": "/bin/true"}}}
    headers = {"OTEL_EXPORTER_OTLP_HEADERS": "x-key=0tel-header-32"}
    with RawServer(server("401 Unauthorized", body=f"no such key: {KEY} or 0tel-header-32".encode())) as far:
        answer = asked(
            tmp_path, {**config, "web_socket_url": far.url}, "--state-dir", str(tmp_path / "state"), **headers
        )
        assert "no such key: *** or ***" in answer.tests["server"]["said"]
        assert answer.code == 3
        assert (
            "no such key: ***" in command(tmp_path, {**config, "web_socket_url": far.url, "state_dir": "state"}).stdout
        )


def test_a_certificate_that_is_not_trusted_names_its_issuer_and_the_cure(
    tmp_path: Path, certificates: Certificates
) -> None:
    stranger = trustme.CA(organization_name="Corporate Inspection Ltd")
    with RawServer(server(off=3600), tls=server_context(stranger.issue_cert("127.0.0.1"))) as far:
        shown = tried(settings(far.url, tmp_path, ca_file=certificates.ca_file))
    assert "not trusted here" in shown["certificate"].said
    assert "O=Corporate Inspection Ltd" in shown["certificate"].said
    assert "ca_file" in shown["certificate"].cure
    assert shown["server"].outcome.value == "skipped"
    assert "is about 1h behind the server's" in shown["clock"].said  # asked all the same: it may be the reason

    other_name = server_context(certificates.ca.issue_cert("elsewhere.example"))
    with RawServer(server(), tls=other_name) as far:
        shown = tried(settings(far.url, tmp_path, ca_file=certificates.ca_file))
        assert "is for another address" in shown["certificate"].said
        shown = tried(settings(far.url, tmp_path, ca_file=str(tmp_path / "none")))
    assert "certificate authorities from ca_file cannot be used" in shown["certificate"].said


def hold(peer: Peer) -> None:
    peer.hold()


def test_what_hangs_is_given_up_at_each_step(tmp_path: Path, certificates: Certificates) -> None:
    listener, port = silent_listener()
    with listener:
        shown = tried(settings(f"wss://127.0.0.1:{port}/", tmp_path, link=SHORT))
    assert "does not answer: a firewall may drop" in shown["connection"].said
    assert "HTTPS_PROXY" in shown["connection"].cure
    with RawServer(hold) as far:
        url = far.url.replace("ws://", "wss://")
        shown = tried(settings(url, tmp_path, link=SHORT, ca_file=certificates.ca_file))
        assert "does not answer the TLS handshake" in shown["certificate"].said
        assert shown["server"].outcome.value == shown["clock"].outcome.value == "skipped"
    patient = replace(LINK, dial_timeout=3.0)  # also for the TLS handshake of a busy machine
    with RawServer(hold, tls=certificates.server) as far:
        shown = tried(settings(far.url, tmp_path, link=patient, ca_file=certificates.ca_file))
    assert "does not answer the WebSocket handshake" in shown["server"].said
    assert shown["clock"].outcome.value == "skipped"


def test_names_and_addresses_that_lead_nowhere(tmp_path: Path) -> None:
    release = threading.Event()

    def never(host: str, port: int) -> Sequence[Any]:
        release.wait(30)
        return ()

    shown = tried(settings("wss://server.example/", tmp_path, link=SHORT), None, never)
    release.set()
    assert "got no answer in time" in shown["name"].said
    assert [shown[name].outcome.value for name in ROWS[2:]] == ["skipped"] * 4
    shown = tried(settings("wss://no-such-host.invalid/", tmp_path))
    assert "no-such-host.invalid" in shown["name"].said
    assert "/etc/resolv.conf" in shown["name"].cure
    shown = tried(settings(f"ws://127.0.0.1:{refused_port()}/", tmp_path))
    assert "refused the connection" in shown["connection"].said


def test_a_proxy_that_is_wrong_or_says_no(tmp_path: Path) -> None:
    there = settings("wss://server.example/", tmp_path, link=replace(LINK, dial_timeout=5.0))
    dead = f"127.0.0.1:{refused_port()}"
    for proxy, row, said in (
        (dead, "connection", f"the proxy {dead} (from HTTPS_PROXY) refused the connection: is the proxy running"),
        ("no-proxy.invalid:3128", "name", "the name of the proxy no-proxy.invalid:3128 (from HTTPS_PROXY) cannot be"),
    ):
        shown = tried(there, {"HTTPS_PROXY": f"http://{proxy}"})
        assert shown[row].said.startswith(said)
        assert shown[row].cure.startswith("correct HTTPS_PROXY")
    shown = tried(there, {"HTTPS_PROXY": "socks5://p:1"})
    assert "HTTPS_PROXY names a socks5:// proxy" in shown["proxy"].said
    assert shown["name"].outcome.value == "skipped"
    answers = {
        b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n": "wants a login (407)",
        b"HTTP/1.1 403 Forbidden\r\n\r\nnot from here": "refused the tunnel (403 Forbidden: not from here)",
        b"SSH-2.0-x\r\n\r\n": "does not speak HTTP",
    }
    for answer, said in answers.items():

        def script(peer: Peer, answer: bytes = answer) -> None:
            peer.read_head()
            peer.send(answer)

        with RawServer(script) as via:
            shown = tried(there, {"https_proxy": f"http://u:p4ssword@{via.place}"})
            assert f"the proxy {via.place} (from https_proxy) " in shown["connection"].said
        assert said in shown["connection"].said
        assert "p4ssword" not in repr(shown)


def test_a_key_in_clear_text_is_a_warning(tmp_path: Path) -> None:
    def look(host: str, port: int) -> Sequence[Any]:
        return [(2, 1, 6, "", ("127.0.0.1", far.port))]

    with RawServer(server()) as far:
        shown = tried(settings(f"ws://server.example:{far.port}/", tmp_path), None, look)
    assert shown["certificate"].outcome.value == "warning"
    assert "clear text" in shown["certificate"].said
    assert shown["server"].outcome.value == "ok"


def test_an_issuer_is_read_from_any_certificate_and_garbage_has_none() -> None:
    der = ssl.PEM_cert_to_DER_cert(trustme.CA(organization_name="Ünï Ltd").cert_pem.bytes().decode())
    assert "O=Ünï Ltd" in issuer_of(der)
    assert issuer_of(b"") == ""
    for cut in range(len(der)):
        assert issuer_of(der[:cut]) == ""
    for _round in range(200):
        issuer_of(os.urandom(64))  # raises nothing
