"""This machine and this installation: the platform, what is asked of a stop, extras and ports that are asked for."""

from __future__ import annotations

import importlib.util
import os
import platform
import socket
import sys
from pathlib import Path
from typing import Mapping

from oz_worker import backends
from oz_worker.checks.places import running
from oz_worker.checks.probe import FILE_SECONDS, Finding, Outcome, Probe
from oz_worker.errors import NotUsable
from oz_worker.observe import exporters, otlp_target, traces
from oz_worker.settings import Settings

_PORT = "OTEL_EXPORTER_PROMETHEUS_PORT"
_MACHINES = ("x86_64", "amd64", "aarch64", "arm64")
_EXPORTERS = {
    "metrics": (exporters.VARIABLE, exporters.KNOWN),
    "traces": (traces.VARIABLE, traces.KNOWN),
}
_PACKAGES = {
    "otel": "opentelemetry.exporter.otlp.proto.http",
    "otel-grpc": "opentelemetry.exporter.otlp.proto.grpc",
}


def probes(settings: Settings, environ: Mapping[str, str]) -> list[Probe]:
    """Of the machine, and of what is installed on it."""
    return [
        Probe("platform", lambda: _platform(settings), cure="run the worker on Linux (amd64 or arm64)"),
        Probe("extras", lambda: _extras(environ)),
        Probe(
            "ports",
            lambda: _ports(settings, environ),
            cure="choose an address of this machine and a port that is free",
            limit=FILE_SECONDS,
        ),
    ]


def _platform(settings: Settings) -> Finding:
    if settings.control_plane != "oz":
        raise NotUsable(f"control_plane {settings.control_plane} is not in this version; use oz")
    backend = backends.make_backend(settings, instance="check", instance_dir=Path(settings.state_dir))
    backends.refuse_shutdown(settings, backend.capabilities)
    here = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    if sys.platform not in ("linux", "darwin"):
        return Finding(f"{here}: only Linux and macOS are known to work", Outcome.WARNING)
    if settings.backend == "direct" and platform.machine().lower() not in _MACHINES:
        return Finding(f"{here}: agents are built for amd64 and arm64 only", Outcome.WARNING)
    return Finding(here + (f", as user {os.getuid()}" if os.getuid() else ", as root"))


def _extras(environ: Mapping[str, str]) -> Finding:
    """What OTEL_* asks for. A worker runs without it, so nothing here is a failure."""
    troubles, cures = [], []
    for signal, (variable, known) in _EXPORTERS.items():
        wanted = exporters.named(environ, variable) or []
        if unknown := [name for name in wanted if name not in known]:
            troubles.append(f"{variable} names {', '.join(unknown)}; known are {', '.join(known)}")
            cures.append(f"correct {variable}")
        extra = "otel" if "console" in wanted and signal == "traces" else ""
        if "otlp" in wanted:
            try:
                target = otlp_target.read(signal, environ)
            except otlp_target.Unusable as error:
                troubles.append(str(error))
                continue
            troubles += target.warnings
            extra = "otel-grpc" if target.protocol == otlp_target.GRPC else "otel"
        if extra and not _installed(_PACKAGES[extra]):
            troubles.append(f"{variable} asks for {' and '.join(wanted)}, which needs the extra {extra}")
            cures.append(f"pip install 'oz-worker[{extra}]'")
    if troubles:
        return Finding("; ".join(troubles), Outcome.WARNING, "; ".join(dict.fromkeys(cures)))
    return Finding("nothing is missing that the environment asks for")


def _ports(settings: Settings, environ: Mapping[str, str]) -> Finding:
    """What the worker listens on can be had; a worker that runs here may have it already."""
    wanted = {"health_listen": settings.health_listen}
    if "prometheus" in (exporters.named(environ, exporters.VARIABLE) or []):
        host = environ.get("OTEL_EXPORTER_PROMETHEUS_HOST", "").strip() or "localhost"
        wanted[_PORT] = f"{host}:{environ.get(_PORT, '').strip() or '9464'}"
    wanted = {name: address for name, address in wanted.items() if address}
    troubles = {name: why for name, address in wanted.items() if (why := _taken(address))}
    said = "; ".join(f"{name}: {wanted[name]} cannot be had ({why})" for name, why in troubles.items())
    if not troubles:
        return Finding(", ".join(wanted.values()) + " can be had" if wanted else "none are asked for")
    if beside := running(settings):
        who = ", ".join(str(worker.pid) for worker in beside)
        return Finding(f"{said}; it may be process {who}, the worker that runs here", Outcome.WARNING)
    return Finding(said, Outcome.FAILED if "health_listen" in troubles else Outcome.WARNING)


def _taken(address: str) -> str:
    """Why nothing can be served on host:port; "" when it can. Nothing is: the port is not listened on."""
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]") or None, int(port), 0, socket.SOCK_STREAM, 0, socket.AI_PASSIVE)
        family, kind, protocol, _, place = found[0]
        with socket.socket(family, kind, protocol) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(place)
    except (OSError, ValueError, OverflowError, UnicodeError) as error:
        return getattr(error, "strerror", None) or str(error)
    return ""


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a package above it is missing
        return False
