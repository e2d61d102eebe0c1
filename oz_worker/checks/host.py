"""This machine and this installation: the platform, what is asked of a stop, extras and ports that are asked for."""

from __future__ import annotations

import errno
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
from oz_worker.observe import exporters, health, otel_settings, otlp_target, prometheus, resource, traces
from oz_worker.observe.http import bound
from oz_worker.settings import Settings

_MACHINES = ("x86_64", "amd64", "aarch64", "arm64")
_METRICS = "the page of metrics"
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
    """What OTEL_* asks for, in the worker's own words. It runs without what is wrong here, so nothing is a failure."""
    troubles, cures = list[str](), list[str]()
    settled = otel_settings.judge(environ)
    _, about_resource = resource.attributes(environ, version="", worker_id="", backend="")
    for signal, variable, choice in (
        ("metrics", exporters.VARIABLE, exporters.chosen(environ)),
        ("traces", traces.VARIABLE, exporters.chosen(environ, traces.VARIABLE, traces.KNOWN, default="")),
    ):
        troubles += choice.warnings
        names = choice.names if choice.asked or _installed(_PACKAGES["otel"]) else ()
        troubles += about_resource if names else ()
        if "otlp" in names or "console" in names:
            troubles += settled.warnings.get("interval" if signal == "metrics" else "traces", ())
        extra = "otel" if "console" in names and signal == "traces" else ""
        if "otlp" in names:
            troubles += settled.warnings.get(signal, ())
            try:
                target = otlp_target.read(signal, environ)
                troubles += target.warnings
                otlp_target.proxy_for(target, environ)
            except otlp_target.Unusable as error:
                troubles.append(str(error))
                continue
            extra = "otel-grpc" if target.protocol == otlp_target.GRPC else "otel"
        if extra and not _installed(_PACKAGES[extra]):
            troubles.append(f"{variable} asks for {' and '.join(names)}, which needs the extra {extra}")
            cures.append(f"pip install 'oz-worker[{extra}]'")
    if troubles:
        cures += ["correct the variables that are named"] if len(troubles) > len(cures) else []
        return Finding("; ".join(dict.fromkeys(troubles)), Outcome.WARNING, "; ".join(dict.fromkeys(cures)))
    return Finding("nothing is missing that the environment asks for")


def _ports(settings: Settings, environ: Mapping[str, str]) -> Finding:
    """What the worker listens on can be had; a worker that runs here may have it already."""
    wanted, troubles = dict[str, tuple[str, int]](), list[str]()
    if settings.health_listen:
        wanted["health_listen"] = health.place_of(settings.health_listen)
    if "prometheus" in (exporters.named(environ, exporters.VARIABLE) or []):
        try:
            wanted[_METRICS] = prometheus.where(environ)
        except ValueError as error:
            troubles.append(str(error))
    shown = {name: f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for name, (host, port) in wanted.items()}
    taken = {name: why for name, place in wanted.items() if (why := _taken(*place)) is not None}
    for name, why in taken.items():
        of_host = isinstance(why, socket.gaierror) or why.errno == errno.EADDRNOTAVAIL
        variable = (prometheus.HOST if of_host else prometheus.PORT) if name == _METRICS else name
        troubles.append(f"{variable}: {shown[name]} cannot be had ({why.strerror or why})")
    said = "; ".join(troubles)
    if not troubles:
        return Finding(", ".join(shown.values()) + " can be had" if wanted else "none are asked for")
    try:
        beside = running(settings) if taken else []
    except NotUsable as error:
        return Finding(f"{said}; whether by a worker of ours cannot be seen ({error})", Outcome.WARNING)
    if beside:
        who = ", ".join(str(worker.pid) for worker in beside)
        return Finding(f"{said}; it may be process {who}, the worker that runs here", Outcome.WARNING)
    return Finding(said, Outcome.FAILED if "health_listen" in taken else Outcome.WARNING)


def _taken(host: str, port: int) -> OSError | None:
    """Why nothing can be served there; None when it can. Nothing is: the port is not listened on."""
    try:
        bound(host, port).close()
    except OSError as error:
        return error
    return None


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a package above it is missing
        return False
