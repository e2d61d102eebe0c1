"""Why a dial failed, in words for people: the thing, the place, the cure. Pure."""

from __future__ import annotations

import email.utils
import errno
import math
import socket
import ssl
import time
from typing import Callable, NamedTuple

import websocket

from oz_worker.dial import DialError, Step
from oz_worker.link.wire import TooBig
from oz_worker.reply import Reply, printable

RETRY_AFTER_MOST = 300.0


class Refusal(NamedTuple):
    """`refused`: the server said no and will say so again (400, 401, 403, 404): retried slowly, and what
    `exit_on_refusal` ends. `delay`: at least so many seconds before the next try. `of_key`: it is the key that the
    server does not want."""

    sentence: str
    refused: bool = False
    delay: float = 0.0
    of_key: bool = False


def explain(error: DialError) -> Refusal:
    """The sentence for *error*, whether it is the server's no, and the wait that it asks for."""
    return _BY_STEP[error.step](error)


def _key(error: DialError) -> Refusal:
    if isinstance(error.cause, OSError):
        return Refusal(
            f"the API key file {error.place} cannot be read ({_reason(error.cause)}): make it readable for the worker"
        )
    return Refusal(f"no usable API key: {error.cause}")


def _trust(error: DialError) -> Refusal:
    return Refusal(
        f"the certificate authorities from {error.place} cannot be used ({_reason(error.cause)}): "
        f"point {error.place} at a readable PEM file"
    )


def _proxy_setting(error: DialError) -> Refusal:
    return Refusal(str(error.cause))


def _look_up(error: DialError) -> Refusal:
    host = error.place
    if isinstance(error.cause, TimeoutError):
        return Refusal(f"the look-up of {host} got no answer in time: check this machine's DNS servers")
    if isinstance(error.cause, socket.gaierror) and error.cause.errno == socket.EAI_AGAIN:
        return Refusal(f"the look-up of {host} failed for now ({_reason(error.cause)}): check this machine's network")
    return Refusal(f"the name of {host} cannot be resolved ({_reason(error.cause)}): check the URL and DNS")


def _connect(error: DialError) -> Refusal:
    cause = error.cause
    number = getattr(cause, "errno", None)
    if isinstance(cause, ConnectionRefusedError):
        return Refusal(
            f"{error.place} refused the connection{_addresses(cause)}: is the server running, is the port right?"
        )
    if number in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL, errno.ENETDOWN):
        return Refusal(f"no route to {error.place} ({_reason(cause)}): check this machine's network")
    if isinstance(cause, TimeoutError):
        return Refusal(
            f"{error.place} does not answer{_addresses(cause)}: a firewall may drop the connection, or a proxy may be "
            f"needed (HTTPS_PROXY)"
        )
    return Refusal(f"connecting to {error.place} failed ({_reason(cause)}): check the network and the URL")


def _proxy(error: DialError) -> Refusal:
    said = error.reply
    if said is None:
        if isinstance(error.cause, TimeoutError):
            return Refusal(f"the proxy {error.place} does not answer: check HTTPS_PROXY and the proxy")
        return Refusal(
            f"the proxy {error.place} is not usable ({_reason(error.cause)}): check HTTPS_PROXY and the proxy"
        )
    if said.status == 407:
        return Refusal(
            f"the proxy {error.place} wants a login (407): put user and password into HTTPS_PROXY "
            f"(http://user:password@host:port); only Basic is known"
        )
    return Refusal(
        f"the proxy {error.place} refused the tunnel ({_status(said)}): allow the server there, or add it to NO_PROXY",
        delay=_retry_after(said),
    )


_CERTIFICATE = {
    10: "has expired: have it renewed, and check this machine's clock",
    9: "is not valid yet: check this machine's clock",
    18: "is self-signed: put it, or the authority that signed it, into ca_file",
    19: "comes from an authority that is not trusted here: put that authority into ca_file",
    20: "comes from an authority that is not trusted here: put that authority into ca_file",
    21: "comes without its chain, or from an authority that is not trusted here: put that authority into ca_file",
    62: "is for another name: check the host in the URL",
    64: "is for another address: check the host in the URL",
}
"""OpenSSL's verify codes (X509_V_ERR_*) that people meet."""


def _tls(error: DialError) -> Refusal:
    cause = error.cause
    if isinstance(cause, ssl.SSLCertVerificationError):
        text = _CERTIFICATE.get(cause.verify_code)
        if text is None:
            text = f"is not acceptable ({printable(cause.verify_message)}): check the server's certificate and ca_file"
        return Refusal(f"the certificate of {error.place} {text}")
    if isinstance(cause, TimeoutError):
        return Refusal(
            f"{error.place} does not answer the TLS handshake: a firewall may hold it, or it does not speak TLS"
        )
    if isinstance(cause, ssl.SSLError) and not isinstance(cause, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
        return Refusal(
            f"TLS with {error.place} failed ({_reason(cause)}): does the server speak TLS on this port (wss or ws)?"
        )
    return Refusal(f"{error.place} closed the connection during the TLS handshake: check port, firewall and server")


def _handshake(error: DialError) -> Refusal:
    if error.reply is not None and error.reply.status != 101:
        return _status_refusal(error, error.reply)
    if isinstance(error.cause, TooBig):
        return Refusal(f"{error.place} sends endless headers: it is no WebSocket server; check the URL")
    if isinstance(error.cause, (TimeoutError, websocket.WebSocketTimeoutException)):
        return Refusal(f"{error.place} does not answer the WebSocket handshake: check the URL and the server")
    if error.reply is not None:
        return Refusal(
            f"{error.place} accepts but breaks the WebSocket handshake ({_reason(error.cause)}): check the URL"
        )
    if isinstance(error.cause, (OSError, websocket.WebSocketConnectionClosedException)):
        return Refusal(
            f"{error.place} closed the connection during the WebSocket handshake: check the URL and the server"
        )
    return Refusal(
        f"{error.place} does not speak HTTP or WebSocket ({_reason(error.cause)}): check the URL and its port"
    )


def _status_refusal(error: DialError, said: Reply) -> Refusal:
    place, status = error.place, _status(said)
    if said.status == 401:
        text = f"{place} does not know the API key ({status}): it is wrong, expired or revoked; make a new one"
        return Refusal(text, refused=True, delay=_retry_after(said), of_key=True)
    if said.status == 403:
        text = f"{place} does not allow this API key ({status}): it needs team scope and the right to run workers"
        return Refusal(text, refused=True, delay=_retry_after(said), of_key=True)
    if said.status in (400, 404):
        text = f"{place} has no worker end point at this URL ({status}): check web_socket_url and worker_id"
        return Refusal(text, refused=True, delay=_retry_after(said))
    if said.status == 409:
        text = f"{place} says that another worker uses this worker id ({status}): give each worker its own worker_id"
    elif said.status in (429, 503):
        text = f"{place} is too busy or being maintained ({status}); trying again later"
    elif 300 <= said.status < 400:
        where = printable(said.headers.get("location", "nowhere"))
        text = (
            f"{place} redirects to {where} ({status}), which is not followed with a key: put the right web_socket_url"
        )
    elif said.status == 200:
        text = f"{place} answers as a web page and not as a WebSocket ({status}): check web_socket_url, and any proxy"
    elif said.status >= 500:
        text = f"{place} has a fault of its own ({status}); trying again later"
    else:
        text = f"{place} refused the connection ({status}): check web_socket_url"
    return Refusal(text, delay=_retry_after(said))


def _status(said: Reply) -> str:
    """`403 Forbidden, code X: excerpt of the body`, printable and bounded."""
    code = printable(said.headers.get("x-warp-error-code", ""))
    parts = [f"{said.status} {said.phrase}".strip(), f", code {code}" if code else ""]
    excerpt = said.excerpt()
    return "".join(parts) + (f": {excerpt}" if excerpt else "")


def _retry_after(said: Reply) -> float:
    """Seconds or an HTTP date, at most five minutes; 0 when it is absent or nonsense."""
    value = said.headers.get("retry-after", "")
    try:
        seconds = float(value) if value.isascii() and value.isdigit() else _until(value)
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return max(0.0, min(seconds, RETRY_AFTER_MOST)) if math.isfinite(seconds) else RETRY_AFTER_MOST


def _until(date: str) -> float:
    return email.utils.parsedate_to_datetime(date).timestamp() - time.time()


def _reason(error: BaseException) -> str:
    if isinstance(error, ssl.SSLError) and error.reason:
        return printable(error.reason.replace("_", " ").lower())
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return printable(" ".join(str(text).split()))


def _addresses(error: BaseException) -> str:
    """Every address's own failure, when there were several."""
    text = getattr(error, "strerror", None) or ""
    return f" ({printable(text)})" if ";" in text else ""


_BY_STEP: dict[Step, Callable[[DialError], Refusal]] = {
    Step.KEY: _key,
    Step.TRUST: _trust,
    Step.PROXY_SETTING: _proxy_setting,
    Step.LOOK_UP: _look_up,
    Step.CONNECT: _connect,
    Step.PROXY: _proxy,
    Step.TLS: _tls,
    Step.HANDSHAKE: _handshake,
}
