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
_LATER = "nothing is wrong here, a worker tries again by itself"


class Refusal(NamedTuple):
    """What happened, and what to do about it. `refused`: the server said no and will say so again (400, 401, 403,
    404): retried slowly, and what `exit_on_refusal` ends. `delay`: at least so many seconds before the next try.
    `of_key`: it is the key that the server does not want."""

    what: str
    cure: str = ""
    refused: bool = False
    delay: float = 0.0
    of_key: bool = False

    @property
    def sentence(self) -> str:
        """Both together."""
        return f"{self.what}: {self.cure}" if self.cure else self.what


def explain(error: DialError) -> Refusal:
    """The sentence for *error*, whether it is the server's no, and the wait that it asks for."""
    return _BY_STEP[error.step](error)


def _key(error: DialError) -> Refusal:
    if isinstance(error.cause, TimeoutError):
        return Refusal("the API key could not be read in time", "see whether the disk of its file answers")
    if isinstance(error.cause, OSError):
        what = f"the API key file {error.place} cannot be read ({_reason(error.cause)})"
        return Refusal(what, "make it readable for the worker")
    return Refusal(f"no usable API key: {error.cause}")


def _trust(error: DialError) -> Refusal:
    if isinstance(error.cause, TimeoutError):
        what = "the certificate authorities could not be read in time"
        return Refusal(what, "see whether the disk that they are on answers")
    what = f"the certificate authorities from {error.place} cannot be used ({_reason(error.cause)})"
    return Refusal(what, f"point {error.place} at a readable PEM file")


def _proxy_setting(error: DialError) -> Refusal:
    return Refusal(str(error.cause))


def _whom(error: DialError) -> str:
    """Whom we tried to reach: who does not know that it was a proxy looks for the fault at the server."""
    return f"the proxy {error.place} (from {error.variable})" if error.variable else error.place


def _look_up(error: DialError) -> Refusal:
    whom, setting = _whom(error), error.variable or "the URL"
    if isinstance(error.cause, TimeoutError):
        return Refusal(f"the look-up of {whom} got no answer in time", "check this machine's DNS servers")
    if isinstance(error.cause, socket.gaierror) and error.cause.errno == socket.EAI_AGAIN:
        return Refusal(f"the look-up of {whom} failed for now ({_reason(error.cause)})", "check this machine's network")
    return Refusal(f"the name of {whom} cannot be resolved ({_reason(error.cause)})", f"check {setting} and DNS")


def _connect(error: DialError) -> Refusal:
    cause, whom, proxy = error.cause, _whom(error), error.variable
    number = getattr(cause, "errno", None)
    if isinstance(cause, ConnectionRefusedError):
        running = f"is the {'proxy' if proxy else 'server'} running, is the port right?"
        return Refusal(f"{whom} refused the connection{_addresses(cause)}", running)
    if number in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL, errno.ENETDOWN):
        return Refusal(f"no route to {whom} ({_reason(cause)})", "check this machine's network")
    if isinstance(cause, TimeoutError):
        needed = f"or {proxy} is wrong" if proxy else "or a proxy may be needed (HTTPS_PROXY)"
        return Refusal(f"{whom} does not answer{_addresses(cause)}", f"a firewall may drop the connection, {needed}")
    return Refusal(f"connecting to {whom} failed ({_reason(cause)})", f"check the network and {proxy or 'the URL'}")


def _proxy(error: DialError) -> Refusal:
    said, whom, variable = error.reply, _whom(error), error.variable
    if said is None:
        silent = isinstance(error.cause, TimeoutError)
        what = f"{whom} does not answer" if silent else f"{whom} is not usable ({_reason(error.cause)})"
        return Refusal(what, f"check {variable} and the proxy")
    if said.status == 407:
        login = f"put user and password into {variable} (http://user:password@host:port); only Basic is known"
        return Refusal(f"{whom} wants a login (407)", login)
    what = f"{whom} refused the tunnel ({_status(said)})"
    return Refusal(what, "allow the server there, or add it to NO_PROXY", delay=_retry_after(said))


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
        unknown = f"is not acceptable ({printable(cause.verify_message)}): check the server's certificate and ca_file"
        what, _, cure = _CERTIFICATE.get(cause.verify_code, unknown).rpartition(": ")
        return Refusal(f"the certificate of {error.place} {what}", cure)
    if isinstance(cause, TimeoutError):
        what = f"{error.place} does not answer the TLS handshake"
        return Refusal(what, "a firewall may hold it, or it does not speak TLS")
    if isinstance(cause, ssl.SSLError) and not isinstance(cause, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
        what = f"TLS with {error.place} failed ({_reason(cause)})"
        return Refusal(what, "does the server speak TLS on this port (wss or ws)?")
    what = f"{error.place} closed the connection during the TLS handshake"
    return Refusal(what, "check port, firewall and server")


def _handshake(error: DialError) -> Refusal:
    place = error.place
    if error.reply is not None and error.reply.status != 101:
        return _status_refusal(error, error.reply)
    if isinstance(error.cause, TooBig):
        return Refusal(f"{place} sends endless headers", "it is no WebSocket server; check the URL")
    if isinstance(error.cause, (TimeoutError, websocket.WebSocketTimeoutException)):
        return Refusal(f"{place} does not answer the WebSocket handshake", "check the URL and the server")
    if error.reply is not None:
        return Refusal(f"{place} accepts but breaks the WebSocket handshake ({_reason(error.cause)})", "check the URL")
    if isinstance(error.cause, (OSError, websocket.WebSocketConnectionClosedException)):
        what = f"{place} closed the connection during the WebSocket handshake"
        return Refusal(what, "check the URL and the server")
    return Refusal(f"{place} does not speak HTTP or WebSocket ({_reason(error.cause)})", "check the URL and its port")


def _status_refusal(error: DialError, said: Reply) -> Refusal:
    place, status = error.place, _status(said)
    refused = said.status in (400, 401, 403, 404)
    if said.status == 401:
        what = f"{place} does not know the API key ({status})"
        cure = "it is wrong, expired or revoked; make a new one"
    elif said.status == 403:
        what = f"{place} does not allow this API key ({status})"
        cure = "it needs team scope and the right to run workers"
    elif said.status in (400, 404):
        what = f"{place} has no worker end point at this URL ({status})"
        cure = "check web_socket_url and worker_id"
    elif said.status == 409:
        what = f"{place} says that another worker uses this worker id ({status})"
        cure = "give each worker its own worker_id"
    elif said.status in (429, 503):
        what, cure = f"{place} is too busy or being maintained ({status})", _LATER
    elif 300 <= said.status < 400:
        where = printable(said.headers.get("location", "nowhere"))
        what = f"{place} redirects to {where} ({status}), which is not followed with a key"
        cure = "put the right web_socket_url"
    elif said.status == 200:
        what = f"{place} answers as a web page and not as a WebSocket ({status})"
        cure = "check web_socket_url, and any proxy"
    elif said.status >= 500:
        what, cure = f"{place} has a fault of its own ({status})", _LATER
    else:
        what, cure = f"{place} refused the connection ({status})", "check web_socket_url"
    return Refusal(what, cure, refused, _retry_after(said), of_key=said.status in (401, 403))


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
