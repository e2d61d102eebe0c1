"""The proxy rule, and the tunnel through a proxy that is a real little program."""

from __future__ import annotations

import base64
import logging
import select
import socket
import ssl
import threading

import pytest
import trustme

from oz_worker import proxy
from oz_worker.dial import Target
from oz_worker.redact import Secret
from tests.link.book import PATIENCE, Running
from tests.rawserver import Peer, RawServer, Script

PLAIN = {"http_proxy": "http://p.example:1"}


@pytest.mark.parametrize(
    ("environ", "secure", "place"),
    [
        ({}, True, None),
        ({"HTTPS_PROXY": "http://p.example:3128"}, True, "p.example:3128"),
        ({"HTTPS_PROXY": "http://p.example:3128"}, False, None),
        ({"HTTP_PROXY": "http://p.example:3128"}, True, None),
        ({"HTTP_PROXY": "http://p.example:3128"}, False, "p.example:3128"),
        ({"https_proxy": "http://low:1", "HTTPS_PROXY": "http://up:2"}, True, "low:1"),
        ({"https_proxy": "", "HTTPS_PROXY": "http://up:2"}, True, None),
        ({"HTTPS_PROXY": "p.example:3128"}, True, "p.example:3128"),
        ({"HTTPS_PROXY": "http://p.example"}, True, "p.example:80"),
        ({"HTTPS_PROXY": "http://[2001:db8::1]:3128/"}, True, "[2001:db8::1]:3128"),
        ({"ALL_PROXY": "http://p.example:3128"}, True, None),
    ],
)
def test_the_environment_chooses_the_proxy(environ: dict[str, str], secure: bool, place: str | None) -> None:
    chosen = proxy.choose(secure, "server.example", 443, environ)
    assert (chosen.place if chosen else None) == place


@pytest.mark.parametrize("value", ["socks5://p.example:1080", "socks5h://p:1", "https://p.example:443", "ftp://p"])
def test_proxies_of_other_kinds_are_refused_by_name(value: str) -> None:
    with pytest.raises(ValueError, match=r"https_proxy names a .*:// proxy, which this worker cannot use"):
        proxy.choose(True, "server.example", 443, {"https_proxy": value})


@pytest.mark.parametrize("value", ["http://", "http://p.example:port", "http://:3128", "http://[::1"])
def test_an_address_that_is_none_is_refused_without_showing_it(value: str) -> None:
    with pytest.raises(ValueError, match="HTTPS_PROXY is not a proxy's address"):
        proxy.choose(True, "server.example", 443, {"HTTPS_PROXY": value})


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST.", "a.localhost", "127.0.0.1", "127.9.9.9", "::1"])
def test_loopback_is_never_proxied(host: str) -> None:
    assert proxy.choose(False, host, 80, PLAIN) is None


@pytest.mark.parametrize(
    ("entry", "host", "port", "direct"),
    [
        ("*", "any.example", 443, True),
        ("example.com", "example.com", 443, True),
        ("example.com", "EXAMPLE.com.", 443, True),
        ("Example.COM", "sub.example.com", 443, True),
        ("example.com", "badexample.com", 443, False),
        (".example.com", "badexample.com", 443, False),
        (".example.com", "sub.example.com", 443, True),
        (".example.com", "example.com", 443, False),
        ("*.example.com", "sub.example.com", 443, True),
        ("*.example.com", "example.com", 443, False),
        ("example.com:443", "example.com", 443, True),
        ("example.com:8443", "example.com", 443, False),
        ("10.0.0.0/8", "10.1.2.3", 443, True),
        ("10.0.0.0/8", "11.1.2.3", 443, False),
        ("10.1.2.3:443", "10.1.2.3", 443, True),
        ("2001:db8::/32", "2001:db8::5", 443, True),
        ("[2001:db8::5]:443", "2001:db8::5", 443, True),
        ("2001:db8::5", "2001:db8::6", 443, False),
        ("a.example, b.example c.example", "c.example", 443, True),
        ("", "example.com", 443, False),
        (",.,", "example.com", 443, False),
    ],
)
def test_no_proxy_takes_out_what_it_names_and_nothing_else(entry: str, host: str, port: int, direct: bool) -> None:
    assert proxy.exempt(host, port, entry) is direct
    chosen = proxy.choose(True, host, port, {"https_proxy": "http://p.example:1", "no_proxy": entry})
    assert (chosen is None) is direct


def tunnel(to: int, seen: list[bytes]) -> Script:
    """A CONNECT proxy that leads everything to the port *to* on loopback."""

    def script(peer: Peer) -> None:
        seen.append(peer.read_head())
        with socket.create_connection(("127.0.0.1", to)) as onward:
            peer.send(b"HTTP/1.0 200 Connection established\r\nVia: test\r\n\r\n")
            while True:
                readable, _, _ = select.select([peer.sock, onward], [], [], PATIENCE)
                for here in readable:
                    data = here.recv(65536)
                    if not data:
                        return
                    (onward if here is peer.sock else peer.sock).sendall(data)

    return script


@pytest.mark.parametrize("scheme", ["ws", "wss"])
def test_a_tunnel_carries_the_connection_and_the_name_is_left_to_the_proxy(
    scheme: str, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """And at debug level every step of it is told, without the login."""
    caplog.set_level(logging.DEBUG)
    seen: list[bytes] = []
    ca = trustme.CA()
    ca_file = str(tmp_path_factory.mktemp("ca") / "ca.pem")
    ca.cert_pem.write_to_path(ca_file)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("server.example").configure_cert(context)

    def script(peer: Peer) -> None:
        peer.accept()
        peer.serve()

    with (
        RawServer(script, tls=context if scheme == "wss" else None) as server,
        RawServer(tunnel(server.port, seen)) as via,
    ):
        environ = dict.fromkeys(("http_proxy", "https_proxy"), f"http://us%40er:pa%3Ass@{via.place}")
        with Running(f"{scheme}://server.example:8443/", environ=environ, ca_file=ca_file) as run:
            run.book.post("through the tunnel")
            assert server.texts.get(timeout=PATIENCE) == "through the tunnel"
            run.book.expect("acknowledged")
    login = base64.b64encode(b"us@er:pa:ss")
    assert seen[0].startswith(b"CONNECT server.example:8443 HTTP/1.1\r\nHost: server.example:8443\r\n")
    assert b"Proxy-Authorization: Basic " + login in seen[0]
    assert b"Bearer" not in seen[0]
    told, variable = caplog.text, "https_proxy" if scheme == "wss" else "http_proxy"
    steps = [f"dialling server.example:8443 through the proxy {via.place}, which {variable} names"]
    steps += [f"{via.place} answers at 127.0.0.1 after", "opened the way to server.example:8443"]
    steps += ["TLS with server.example:8443: TLSv1.3, "] if scheme == "wss" else []
    places = [told.find(step) for step in steps]
    assert -1 not in places, told
    assert places == sorted(places)
    assert "us@er" not in told
    assert "pa:ss" not in told


def test_an_ipv6_address_stands_in_brackets() -> None:
    via = proxy.Proxy("p", 1, Secret(""), "https_proxy")
    where = Target(True, "2001:db8::1", 443, "/")
    assert proxy.connect_request(via, where.host, where.port, "a").startswith(b"CONNECT [2001:db8::1]:443 HTTP/1.1\r\n")
    assert where.origin == "wss://[2001:db8::1]:443"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic\r\n\r\n", "wants a login (407)"),
        (b"HTTP/1.1 403 Forbidden\r\n\r\n<h1>not from here</h1>", "refused the tunnel (403 Forbidden"),
        (b"", "closed the connection instead of answering"),
        (b"SSH-2.0-x\r\n\r\n", "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 4000, "longer than"),
        (b"HTTP/1.1 200 OK\r\n\r\nunasked", "by itself"),
    ],
)
def test_a_proxy_that_does_not_open_the_tunnel_is_named_with_its_answer(answer: bytes, said: str) -> None:
    def script(peer: Peer) -> None:
        peer.read_head()
        peer.send(answer)

    with RawServer(script) as via:
        environ = {"https_proxy": f"http://user:hush-hush@{via.place}"}
        with Running("wss://server.example/", environ=environ) as run:
            _, sentence, refused, _ = run.book.expect("failed")
    assert said in sentence
    assert via.place in sentence
    assert "hush" not in sentence
    assert not refused


def test_a_proxy_that_closes_behind_its_yes_is_named_as_a_tls_failure() -> None:
    def script(peer: Peer) -> None:
        peer.read_head()
        peer.send(b"HTTP/1.1 200 OK\r\n\r\n")

    with (
        RawServer(script) as via,
        Running("wss://server.example/", environ={"https_proxy": f"http://{via.place}"}) as run,
    ):
        assert "closed the connection during the TLS handshake" in run.book.expect("failed")[1]


def test_a_proxy_that_cannot_be_used_is_a_failed_dial_and_not_a_direct_one() -> None:
    reached = threading.Event()
    with RawServer(lambda peer: reached.set()) as server:
        environ = {"http_proxy": "socks5://127.0.0.1:9"}
        look = lambda host, port: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", server.port))]  # noqa: E731
        with Running("ws://server.example/", environ=environ, look=look) as run:
            assert "socks5" in run.book.expect("failed")[1]
    assert not reached.is_set()
