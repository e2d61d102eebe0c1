"""The SDK's OTLP exporters, told everything by `otlp_target`. Imported on the threads of `otel_thread` only."""

from __future__ import annotations

import contextlib
import logging
import os
import ssl
from typing import Any, Iterator, Mapping

from opentelemetry.sdk.resources import Resource

from oz_worker.observe import otel_settings, otlp_target
from oz_worker.observe.exporters import Source
from oz_worker.observe.otlp_target import GRPC, Target, Unusable
from oz_worker.observe.outage import SPOKEN, Outage
from oz_worker.redact import Secret
from oz_worker.trust import Trust

COMPONENTS = {"metrics": ("metric_exporter", "OTLPMetricExporter"), "traces": ("trace_exporter", "OTLPSpanExporter")}
"""Module and class of a signal, the same below both protocols' packages."""


def resource_of(attributes: Mapping[str, str], instance: str) -> Resource:
    """Who sends; what the detectors of OTEL_EXPERIMENTAL_RESOURCE_DETECTORS find stands below it.

    Of what the SDK reads of the environment itself only its own name is taken: *attributes* has the rest, checked.
    The SDK's own `service.instance.id` is drawn anew at each start, which would begin every series anew; without one
    the series of two workers would be one.
    """
    found = Resource.create({}).attributes
    if not os.environ.get("OTEL_EXPERIMENTAL_RESOURCE_DETECTORS"):
        found = {name: value for name, value in found.items() if name.startswith("telemetry.")}
    return Resource({**found, "service.instance.id": instance, **attributes})


def otlp(signal: str, source: Source) -> tuple[Any, Outage]:
    """An exporter of *signal*, whose failures are said once for each outage. Raises Unusable."""
    environ = source.environ
    target = otlp_target.read(signal, environ)
    for warning in target.warnings:
        source.warn(warning)
    target = target._replace(timeout=min(target.timeout, otel_settings.export_limit(signal, environ)))
    authority = (target.certificates.authority or _authority(environ, source.ca_file)) if target.secure else ""
    exporter = _grpc(target, authority, environ) if target.protocol == GRPC else _http(target, authority, environ)
    outage = Outage(signal, target.shown, target.timeout)
    # On the object: its caller finds it there, and it is the same for all four classes.
    exporter.export = outage.watching(exporter.export)
    return exporter, outage


def _authority(environ: Mapping[str, str], ca_file: str) -> str:
    """The file or directory by the worker's one rule of whom to believe; "" leaves it to the library."""
    roots = Trust(ca_file, environ).roots()
    system = ssl.get_default_verify_paths()
    return roots.file or roots.directory or system.cafile or system.capath or ""


def _http(target: Target, authority: str, environ: Mapping[str, str]) -> Any:
    from opentelemetry.exporter.otlp.proto.http import Compression

    from oz_worker.observe.otel_session import Session

    session = Session(target.timeout)
    # Else .netrc would replace the header with the key, and REQUESTS_CA_BUNDLE the certificate that was asked for.
    session.trust_env = False
    session.proxies.update(_proxies(target, environ))
    certificates = target.certificates
    return _exporter("http", target)(
        endpoint=target.endpoint,
        certificate_file=authority or None,
        client_certificate_file=certificates.client or None,
        client_key_file=certificates.client_key or None,
        headers=_revealed(target.headers),
        timeout=target.timeout,
        compression={"gzip": Compression.Gzip, "deflate": Compression.Deflate}.get(
            target.compressed, Compression.NoCompression
        ),
        session=session,
    )


def _proxies(target: Target, environ: Mapping[str, str]) -> dict[str, str]:
    """By the worker's one rule for proxies. Raises Unusable."""
    address = otlp_target.proxy_for(target, environ)
    return {target.endpoint.partition("://")[0]: address} if address else {}


def _grpc(target: Target, authority: str, environ: Mapping[str, str]) -> Any:
    with _quiet_grpc():
        try:
            import grpc
        except ImportError:
            raise Unusable(
                "the protocol grpc needs the extra otel-grpc (pip install 'oz-worker[otel-grpc]'); or set"
                " OTEL_EXPORTER_OTLP_PROTOCOL to http/protobuf"
            ) from None
        certificates = target.certificates
        credentials = None
        if target.secure:
            credentials = grpc.ssl_channel_credentials(
                _contents(authority) or None,
                _contents(certificates.client_key or certificates.client) or None,
                _contents(certificates.client) or None,
            )
        # It reads its own spelling of the variables else.
        address = otlp_target.proxy_for(target, environ)
        options = (("grpc.http_proxy", address),) if address else (("grpc.enable_http_proxy", 0),)
        if (variable := f"{otlp_target.GENERAL}{target.signal.upper()}_TIMEOUT") in os.environ:
            os.environ[variable] = f"{target.timeout:g}"  # read whatever it is told, and an error where it is no number
        made = _exporter("grpc", target)
        said = logging.getLogger("opentelemetry.exporter.otlp.proto.grpc.exporter")
        for each in list(said.filters):  # it drops what repeats within 20 s, and with it the reason of a second outage
            said.removeFilter(each)
        exporter = made(
            endpoint=target.endpoint,
            insecure=not target.secure,
            credentials=credentials,
            headers=tuple(_revealed(target.headers).items()),
            timeout=target.timeout,
            compression=grpc.Compression.Gzip if target.compressed else grpc.Compression.NoCompression,
            channel_options=options,
        )
        stub = exporter._stub  # it makes a new one whenever it connects anew
        exporter._stub = lambda channel: _Listening(stub(channel), target.signal)
        exporter._client = _Listening(exporter._client, target.signal)
        return exporter


class _Listening:
    """A gRPC stub whose answers are looked at, which the SDK does not: a part may have been refused."""

    def __init__(self, stub: Any, signal: str) -> None:
        self._stub = stub
        self._refused = "rejected_spans" if signal == "traces" else "rejected_data_points"

    def Export(self, *arguments: Any, **options: Any) -> Any:
        answer = self._stub.Export(*arguments, **options)
        partly = answer.partial_success
        SPOKEN.hear_partly(getattr(partly, self._refused), partly.error_message)
        return answer


@contextlib.contextmanager
def _quiet_grpc() -> Iterator[None]:
    """gRPC's core writes to stderr itself, past our log, unless this is set when it starts; children do not get it."""
    name = "GRPC_VERBOSITY"
    if name in os.environ:
        yield
        return
    os.environ[name] = "NONE"
    try:
        yield
    finally:
        os.environ.pop(name, None)


def _contents(path: str) -> bytes:
    """Of a file; of a directory nothing, since gRPC takes none."""
    if not path or os.path.isdir(path):
        return b""
    with open(path, "rb") as file:
        return file.read()


def _exporter(protocol: str, target: Target) -> Any:
    import importlib

    module, name = COMPONENTS[target.signal]
    return getattr(importlib.import_module(f"opentelemetry.exporter.otlp.proto.{protocol}.{module}"), name)


def _revealed(headers: tuple[tuple[str, Secret], ...]) -> dict[str, str]:
    return {name: value.reveal() for name, value in headers}
