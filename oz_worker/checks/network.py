"""The way to the server, step by step: proxy, name, connection, certificate, handshake, clock.

Everything is dialled by the worker's own parts and said in the link's own sentences.
"""

from __future__ import annotations

import email.utils
import math
import ssl
import time
from typing import Mapping, Sequence

from oz_worker import reply
from oz_worker.checks import places
from oz_worker.checks.der import issuer_of
from oz_worker.checks.probe import Finding, Outcome, Probe
from oz_worker.dial import USER_AGENT, DialError, Dialler, Look, Target, target
from oz_worker.link import refusals
from oz_worker.link.loop import Link
from oz_worker.link.traffic import Directive, Phase
from oz_worker.link.wire import HANDSHAKE_BYTES, Wire
from oz_worker.observe.explain import of_link
from oz_worker.proxy import is_loopback
from oz_worker.pulse import Pulse
from oz_worker.resolver import Resolver
from oz_worker.settings import Settings
from oz_worker.threads import Waker
from oz_worker.timing import Deadline, format_duration
from oz_worker.trust import Trust

CLOCK_SECONDS = 60.0
"""A clock that is further off than this is said to be wrong."""
DATE_SECONDS = 5.0
"""A server has so long for an answer from which nothing but the time is wanted."""

_NAME = "check the host in web_socket_url, /etc/resolv.conf and the VPN; where only a proxy gets out, set HTTPS_PROXY"
_WAY_OUT = (
    "open the way to the server's port in the firewall, or name the proxy that leads out in HTTPS_PROXY"
    " (http://host:port); hosts that need none go into NO_PROXY"
)
_CERTIFICATE = "see whether web_socket_url has the right port, and what stands between this machine and the server"
_AUTHORITY = (
    "put the certificate of the authority that issued it, in PEM form, into a file and name that with ca_file"
    " (or SSL_CERT_FILE); a proxy that opens TLS has an authority of its own"
)


class _Anybody(Trust):
    """Believes every certificate. For looks at a server to which nothing is said that anybody may not hear."""

    def context(self) -> ssl.SSLContext:
        """A context that checks nothing."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context


class Road:
    """The way to one server, tried from the thread that calls. Every step is over after `dial_timeout` seconds.

    A context: at its end its descriptors are closed. *look* replaces `getaddrinfo`.
    """

    def __init__(self, settings: Settings, environ: Mapping[str, str], look: Look | None = None) -> None:
        self._settings = settings
        self._environ = environ
        self._look = look
        self._waker = Waker()
        self._pulse = Pulse(self._waker, lambda: math.inf)
        self.where = target(settings.web_socket_url)

    def __enter__(self) -> Road:
        return self

    def __exit__(self, *_raised: object) -> None:
        self._waker.close()

    def probes(self) -> list[Probe]:
        """From here to the server."""
        return [
            Probe("proxy", self._proxy, cure="correct the variable, or take it away"),
            Probe("name", self._name, cure=_NAME, needs=("proxy",)),
            Probe("connection", self._connection, cure=_WAY_OUT, needs=("name",)),
            Probe("certificate", self._certificate, cure=_CERTIFICATE, needs=("connection",)),
            Probe("server", self._server, needs=("key", "state", "certificate")),
            Probe("clock", self._clock, cure="set this machine's clock, and let NTP keep it", needs=("connection",)),
        ]

    def _dialler(self, trust: Trust | None = None) -> Dialler:
        settings = self._settings
        return Dialler(
            Resolver(self._waker),
            self._pulse,
            trust=trust or Trust(settings.ca_file, self._environ),
            dead_after=settings.link.dead_after,
            look=self._look,
            environ=self._environ,
        )

    def _deadline(self) -> Deadline:
        return Deadline(self._settings.link.dial_timeout)

    def _proxy(self) -> Finding:
        try:
            via = self._dialler().via(self.where)
        except DialError as error:
            return _failed(error)
        return Finding(f"{via.place}, from {via.variable}" if via else "none, straight to the server")

    def _name(self) -> Finding:
        dialler, where = self._dialler(), self.where
        try:
            hop = dialler.via(where) or where
            found = dialler.addresses(hop, self._deadline())
        except DialError as error:
            return _failed(error)
        listed = ", ".join(dict.fromkeys(str(entry[4][0]) for entry in found))
        return Finding(f"{'the proxy ' if hop.variable else ''}{hop.host} is {listed}")

    def _connection(self) -> Finding:
        try:
            dialler = self._dialler()
            dialler.reach(self.where, self._deadline()).close()
        except DialError as error:
            return _failed(error)
        via = dialler.via(self.where)
        return Finding(f"{self.where.place} is reached" + (f" through {via.place}" if via else ""))

    def _certificate(self) -> Finding:
        if not self.where.secure:
            if is_loopback(self.where.host):
                return Finding("none: ws:// to this machine")
            text = f"web_socket_url is ws://: the key goes to {self.where.place} in clear text"
            return Finding(text, Outcome.WARNING, "use wss://")
        try:
            with self._dialler().open(self.where, self._deadline()) as sock:
                der = sock.getpeercert(binary_form=True) if isinstance(sock, ssl.SSLSocket) else None
        except DialError as error:
            found = _failed(error)
            if not isinstance(error.cause, ssl.SSLCertVerificationError):
                return found
            issuer = self._issuer()
            said = f"{found.said} (it was issued by {issuer})" if issuer else found.said
            return found._replace(said=said, cure=_AUTHORITY)
        return Finding(f"issued by {issuer_of(der or b'') or 'an authority without a name'}, trusted here")

    def _issuer(self) -> str:
        """Who issued the certificate that is not believed, "" when that cannot be seen."""
        try:
            with self._dialler(_Anybody()).open(self.where, self._deadline()) as sock:
                return issuer_of((isinstance(sock, ssl.SSLSocket) and sock.getpeercert(binary_form=True)) or b"")
        except (DialError, OSError):
            return ""

    def _server(self) -> Finding:
        settings = self._settings
        for beside in places.running(settings):
            if beside.worker_id == settings.worker_id:
                return _of_running(beside)
        visit = Visit(settings.link.dial_timeout)
        link = Link(
            settings.web_socket_url,
            worker_id=settings.worker_id,
            key=places.key_source(settings),
            options=settings.link,
            waker=self._waker,
            traffic=visit,
            ca_file=settings.ca_file,
            look=self._look,
            environ=self._environ,
        )
        link.run()
        if (refusal := link.refusal) is not None:
            return Finding(refusal.what, Outcome.FAILED, refusal.cure)
        return visit.finding

    def _clock(self) -> Finding:
        try:
            asked, answered, date = self._server_time()
            there = email.utils.parsedate_to_datetime(date).timestamp()
        except (DialError, TypeError, ValueError):
            return Finding("the server did not say what time it is", Outcome.SKIPPED)
        # The header is in whole seconds, cut off; the answer was written somewhere between the two moments.
        off = max(asked - there - 1, there - answered, 0.0)
        if off <= CLOCK_SECONDS:
            return Finding("within a minute of the server's")
        way = "ahead of" if asked > there else "behind"
        about = format_duration(round(off / 30) * 30)
        return Finding(f"this machine's clock is about {about} {way} the server's", Outcome.WARNING)

    def _server_time(self) -> tuple[float, float, str]:
        """When we asked, when the answer came (our clock), and the date that the server wrote on it, "" for none.

        A plain request without the key, and whatever the certificate is: a wrong clock may be what is wrong with it.
        """
        wire = Wire(self._dialler(_Anybody()).open(self.where, self._deadline()), self._pulse)
        wire.read_by = wire.write_by = Deadline(min(DATE_SECONDS, self._settings.link.dial_timeout)).at
        asked, data = time.time(), b""
        try:
            _send(wire, _head_request(self.where))
            while b"\r\n\r\n" not in data and len(data) < HANDSHAKE_BYTES and (more := wire.recv(4096)):
                data += more
        except OSError:
            pass  # what has come may be enough
        finally:
            wire.close()
        said = reply.parse(data)
        return asked, time.time(), said.headers.get("date", "") if said else ""


class Visit:
    """A `Traffic` that is over as soon as the server has said yes or no: nothing is sent, nothing is read."""

    def __init__(self, seconds: float) -> None:
        self._directive = Directive(Phase.FLUSH, Deadline(seconds + 1.0).at)
        self._waiting = True  # for the one dial
        self.finding = Finding("the server gave no answer", Outcome.FAILED)

    def on_wake(self) -> Directive:
        """One dial, then leave."""
        return self._directive

    def opened(self, connection: str, origin: str) -> None:
        """It said yes."""
        self._waiting = False
        self.finding = Finding(f"{origin} accepts the key and the worker id")

    def take(self, limit: int) -> Sequence[str]:
        """Nothing is said."""
        return ()

    def acknowledged(self, count: int) -> None:
        """Nothing was said."""

    def unfinished(self) -> bool:
        """Until there is an answer."""
        return self._waiting

    def received(self, text: str) -> bool:
        """Work is not for us."""
        return False

    def closed(self, why: str) -> None:
        """The end of the visit."""

    def dial_failed(self, sentence: str, refused: bool, delay: float) -> None:
        """It said no, or nothing: the link knows more than the sentence."""
        self._waiting = False


def _failed(error: DialError) -> Finding:
    variable = error.variable
    cure = f"correct {variable}, or put the server into NO_PROXY where no proxy is needed" if variable else ""
    return Finding(refusals.explain(error).sentence, Outcome.FAILED, cure)


def _of_running(beside: places.Beside) -> Finding:
    """A second connection under the same id could get a task, or take the other's place: the worker is asked."""
    text = f"not tried beside process {beside.pid}, which runs with this worker id; its own link: "
    outcome = Outcome.FAILED if beside.link.get("why") else Outcome.SKIPPED
    return Finding(text + of_link(beside.link), outcome, "do what its sentence says; it tries again by itself")


def _head_request(where: Target) -> bytes:
    lines = ("HEAD / HTTP/1.1", f"Host: {where.place}", f"User-Agent: {USER_AGENT}", "Connection: close")
    return "\r\n".join([*lines, "", ""]).encode("ascii")


def _send(wire: Wire, data: bytes) -> None:
    while data:
        data = data[wire.send(data) :]
