"""Where OTLP goes: the `OTEL_EXPORTER_OTLP_*` variables of one signal, read and proven before anything is built.

The rules are those of OpenTelemetry's specification of its exporters: the signal's own variable wins over the general
one, an empty one is unset, times are milliseconds, a general HTTP endpoint gets the signal's path behind it. The SDK
for Python differs in some (it takes times for seconds), so it is told everything and reads none of them itself.
"""

from __future__ import annotations

import base64
import re
import ssl
from typing import Callable, Mapping, NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from oz_worker import proxy
from oz_worker.observe.otel_settings import whole
from oz_worker.redact import Secret, without_credentials

GENERAL = "OTEL_EXPORTER_OTLP_"
GRPC, HTTP = "grpc", "http/protobuf"
TIMEOUT_SECONDS = 10.0
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # a header's name by RFC 9110
_PLACE = re.compile(r"(\[[\w:.%]+\]|[\w-]{1,63}(\.[\w-]{1,63})*\.?)(:[0-9]*)?")
_OPEN = re.compile(r"(\w+://[\w.-]*(:[0-9]*)?|[\w.-]+:[0-9]+)/?")  # an address in which no secret can hide
_PRINTABLE = re.compile(r"[\x20-\x7e]*")  # what a header's value can carry in both protocols


class Unusable(ValueError):
    """What the environment asks for cannot be had; one sentence that names the variable and the cure, no value."""


class Certificates(NamedTuple):
    """Paths, each empty when not set: an authority, and what the worker shows of itself."""

    authority: str = ""
    client: str = ""
    client_key: str = ""


class Target(NamedTuple):
    """A collector for one signal. `endpoint` is a whole URL for HTTP, host:port for gRPC, without user and password."""

    signal: str
    protocol: str
    endpoint: str
    secure: bool
    headers: tuple[tuple[str, Secret], ...]
    timeout: float  # seconds
    compressed: str  # "" | gzip | deflate
    certificates: Certificates
    warnings: tuple[str, ...] = ()  # what was put aside in favour of a default

    @property
    def shown(self) -> str:
        """The endpoint for the log."""
        return without_credentials(self.endpoint)


class _Variables:
    """The variables of one signal."""

    def __init__(self, signal: str, environ: Mapping[str, str]) -> None:
        self.signal = signal
        self._environ = environ

    def get(self, what: str) -> tuple[str, str]:
        """The name that counts, and its value; the general name and "" when neither is set."""
        for name in (f"{GENERAL}{self.signal.upper()}_{what}", GENERAL + what):
            if value := self._environ.get(name, "").strip():
                return name, value
        return GENERAL + what, ""


def read(signal: str, environ: Mapping[str, str]) -> Target:
    """The target of *signal* (metrics or traces). Reads certificate files. Raises Unusable."""
    variables = _Variables(signal, environ)
    name, protocol = variables.get("PROTOCOL")
    protocol = protocol.lower() or HTTP
    if protocol not in (GRPC, HTTP):
        raise Unusable(f"{name} is {protocol!r}, which this worker does not speak; use {HTTP} or {GRPC}")
    warnings: list[str] = []
    endpoint, secure, authorization = _grpc(variables, warnings) if protocol == GRPC else _http(variables)
    headers = _headers(variables)
    if authorization and "authorization" not in dict(headers):
        headers += (("authorization", Secret(authorization)),)
    return Target(
        signal,
        protocol,
        endpoint,
        secure,
        headers,
        _timeout(variables, warnings),
        _compression(variables, protocol, warnings),
        _certificates(variables) if secure else Certificates(),
        tuple(warnings),
    )


def proxy_for(target: Target, environ: Mapping[str, str]) -> str:
    """The URL of the proxy for *target* by the worker's one rule, "" for none. Raises Unusable."""
    place = urlsplit("//" + target.endpoint.rpartition("://")[2])
    port = place.port or (443 if target.secure else 80)
    try:
        chosen = proxy.choose(target.secure, place.hostname or "", port, environ)
    except ValueError as error:
        raise Unusable(str(error)) from None
    if chosen is None:
        return ""
    address = environ[chosen.variable].strip()
    return address if "://" in address else f"http://{address}"


def _insecure(variables: _Variables, warnings: list[str]) -> bool:
    name, text = variables.get("INSECURE")
    if text.lower() not in ("", "true", "false"):
        warnings.append(f"{name} is {text!r}; set it to true or false. false is used")
    return text.lower() == "true"


def _http(variables: _Variables) -> tuple[str, bool, str]:
    name, value = variables.get("ENDPOINT")
    parts, place = _split(name, value or "http://localhost:4318", "http://collector.example:4318")
    path = parts.path or "/"
    if name == GENERAL + "ENDPOINT":
        path = f"{path.rstrip('/')}/v1/{variables.signal}"
    return urlunsplit((parts.scheme, place, path, parts.query, "")), parts.scheme == "https", _basic(parts)


def _grpc(variables: _Variables, warnings: list[str]) -> tuple[str, bool, str]:
    """A scheme says whether it is TLS; without one, OTEL_EXPORTER_OTLP_INSECURE does."""
    name, value = variables.get("ENDPOINT")
    value = value or "http://localhost:4317"
    if "://" in value:
        parts, place = _split(name, value, "http://collector.example:4317")
        return place, parts.scheme == "https", _basic(parts)
    _, place = _split(name, f"https://{value}", "collector.example:4317")
    return place, not _insecure(variables, warnings), ""


def _split(name: str, value: str, example: str) -> tuple[SplitResult, str]:
    """The parts of a URL, and its host:port."""
    shown = f"is {value!r}, which " if _OPEN.fullmatch(value) else ""
    wrong = Unusable(f"{name} {shown}is not a collector's address; write it like {example}")
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError:
        raise wrong from None
    place = parts.netloc.rpartition("@")[2]
    if parts.scheme not in ("http", "https") or not _PLACE.fullmatch(place) or re.search(r"\s", value) or port == 0:
        raise wrong
    return parts, place


def _basic(parts: SplitResult) -> str:
    """What a user and a password in a URL mean; there they would end up in every message that names the URL."""
    if not parts.username and not parts.password:
        return ""
    pair = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
    return "Basic " + base64.b64encode(pair.encode()).decode()


def _headers(variables: _Variables) -> tuple[tuple[str, Secret], ...]:
    """Names are lower case, as gRPC wants them; values may be written with percent signs or as they are."""
    name, text = variables.get("HEADERS")
    found: dict[str, Secret] = {}
    for number, part in enumerate(text.split(","), start=1):
        if not part.strip():
            continue  # a comma too many at the end
        key, equals, value = part.partition("=")
        key, value = unquote(key.strip()).lower(), unquote(value).strip()
        if not equals or not _TOKEN.fullmatch(key) or not _PRINTABLE.fullmatch(value):
            raise Unusable(
                f"{name}: entry {number} is no header; write name=value,name=value, a comma in a value as %2C"
            )
        found[key] = Secret(value)
    return tuple(found.items())


def _timeout(variables: _Variables, warnings: list[str]) -> float:
    name, text = variables.get("TIMEOUT")
    if not text:
        return TIMEOUT_SECONDS
    if (milliseconds := whole(text)) is not None:
        return milliseconds / 1000
    warnings.append(f"{name} is {text!r}; set it to a whole number of milliseconds from 1 on. 10000 is used")
    return TIMEOUT_SECONDS


def _compression(variables: _Variables, protocol: str, warnings: list[str]) -> str:
    name, text = variables.get("COMPRESSION")
    known = ("gzip",) if protocol == GRPC else ("gzip", "deflate")
    if text.lower() in ("", "none", *known):
        return text.lower().removeprefix("none")
    warnings.append(f"{name} is {text!r}, which {protocol} does not have; set it to {' or '.join(known)}. none is used")
    return ""


def _certificates(variables: _Variables) -> Certificates:
    (authority_name, authority), (client_name, client), (key_name, key) = (
        variables.get(what) for what in ("CERTIFICATE", "CLIENT_CERTIFICATE", "CLIENT_KEY")
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if authority:
        _prove(authority_name, authority, lambda: context.load_verify_locations(authority))
    if key and not client:
        raise Unusable(f"{key_name} is set and {client_name} is not; set both or none")
    if client:
        # A password for the key would be asked for on a terminal that nobody watches.
        _prove(client_name, client, lambda: context.load_cert_chain(client, key or None, _no_password))
    return Certificates(authority, client, key)


def _prove(name: str, path: str, load: Callable[[], None]) -> None:
    try:
        load()
    except OSError as error:  # of the file system, or of OpenSSL, whose own text names neither file nor mistake
        if isinstance(error, ssl.SSLError):
            raise Unusable(f"{name}: {path} holds nothing usable in PEM form, or the key does not fit") from None
        raise Unusable(
            f"{name}: {path} cannot be read ({error.strerror}); correct the path or the permissions"
        ) from None
    except ValueError:
        raise Unusable(f"{name}: the key of {path} is locked by a password; give one without") from None


def _no_password() -> str:
    raise ValueError
