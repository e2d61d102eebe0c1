"""The one proxy rule, for the WebSocket and for HTTP, and the CONNECT that opens a tunnel."""

from __future__ import annotations

import base64
import ipaddress
import os
from typing import Mapping, NamedTuple
from urllib.parse import unquote, urlsplit

from oz_worker.redact import Secret

REPLY_BYTES = 16 * 1024
"""More than this before the end of a proxy's headers is not a proxy."""


class Proxy(NamedTuple):
    """An HTTP proxy, and the variable that named it."""

    host: str
    port: int
    authorization: Secret
    variable: str

    @property
    def place(self) -> str:
        """host:port, as people write it."""
        return bracketed(self.host, self.port)


def bracketed(host: str, port: int) -> str:
    """host:port with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def choose(secure: bool, host: str, port: int, environ: Mapping[str, str] | None = None) -> Proxy | None:
    """The proxy for host:port, None for a direct connection; ValueError with a sentence for one that cannot be used.

    HTTPS_PROXY counts for wss and https, HTTP_PROXY for ws and http; the lower-case spelling wins, and set to nothing
    it switches the proxy off. Loopback is never proxied. ALL_PROXY is not read, as in the existing worker.
    """
    environ = os.environ if environ is None else environ
    name = "https_proxy" if secure else "http_proxy"
    variable = name if name in environ else name.upper()
    value = environ.get(variable, "").strip()
    if not value or is_loopback(host) or exempt(host, port, environ.get("no_proxy", environ.get("NO_PROXY", ""))):
        return None
    return _parse(value, variable)


def _parse(value: str, variable: str) -> Proxy:
    scheme, found, _ = value.partition("://")
    if found and scheme.lower() != "http":
        raise ValueError(
            f"{variable} names a {scheme.lower()}:// proxy, which this worker cannot use; give the address of an HTTP "
            f"proxy (http://host:port), or name the server in NO_PROXY"
        )
    try:
        parts = urlsplit(value if found else f"http://{value}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host:
        raise ValueError(f"{variable} is not a proxy's address; write it like http://proxy.example:3128")
    return Proxy(host, port or 80, _basic(parts.username, parts.password), variable)


def _basic(user: str | None, password: str | None) -> Secret:
    if not user and not password:
        return Secret("")
    pair = f"{unquote(user or '')}:{unquote(password or '')}"
    return Secret("Basic " + base64.b64encode(pair.encode()).decode())


def is_loopback(host: str) -> bool:
    """Whether *host* is this machine by definition, without a look-up."""
    name = host.lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    address = _address(name)
    return address is not None and address.is_loopback


def exempt(host: str, port: int, no_proxy: str) -> bool:
    """Whether NO_PROXY takes host:port out. Entries, separated by commas or blanks:

    `*` everything; an address or a network (10.0.0.0/8); `example.com` the name and all below it; `.example.com` and
    `*.example.com` only what is below it; each also with `:port`. Case does not matter; `badexample.com` is neither.
    """
    name = host.lower().rstrip(".")
    return any(_matches(name, port, entry) for entry in no_proxy.lower().replace(",", " ").split())


def _matches(name: str, port: int, entry: str) -> bool:
    if entry == "*":
        return True
    address = _address(name)
    pattern, wanted = _split_port(entry)
    if wanted is not None and wanted != port:
        return False
    if address is not None:
        try:
            return address in ipaddress.ip_network(pattern.strip("[]"), strict=False)
        except ValueError:
            return False
    pattern = pattern.rstrip(".")
    if pattern.startswith("*."):
        pattern = pattern[1:]
    if pattern.startswith("."):
        return name.endswith(pattern) and len(name) > len(pattern)
    return bool(pattern) and (name == pattern or name.endswith("." + pattern))


def _split_port(entry: str) -> tuple[str, int | None]:
    """`host:8080` -> (host, 8080); a bare IPv6 address has colons and no port."""
    head, colon, tail = entry.rpartition(":")
    if colon and tail.isdigit() and (":" not in head or head.startswith("[")):
        return head, int(tail)
    return entry, None


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def connect_request(proxy: Proxy, host: str, port: int, agent: str) -> bytes:
    """The CONNECT for host:port, with brackets around an IPv6 address."""
    place = bracketed(host, port)
    lines = [f"CONNECT {place} HTTP/1.1", f"Host: {place}", f"User-Agent: {agent}"]
    if proxy.authorization:
        lines.append(f"Proxy-Authorization: {proxy.authorization.reveal()}")
    return "\r\n".join([*lines, "", ""]).encode("ascii")
