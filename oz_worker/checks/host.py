"""This machine and this installation: the platform, what is asked of a stop, extras that the environment asks for."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from pathlib import Path
from typing import Mapping

from oz_worker import backends
from oz_worker.checks.probe import Finding, Outcome, Probe
from oz_worker.errors import NotUsable
from oz_worker.settings import Settings

_MACHINES = ("x86_64", "amd64", "aarch64", "arm64")
_SIGNALS = ("METRICS", "TRACES")
_EXPORTERS = {"METRICS": ("otlp", "prometheus", "console", "none"), "TRACES": ("otlp", "console", "none")}
_PACKAGES = {
    "http/protobuf": ("opentelemetry.exporter.otlp.proto.http", "otel"),
    "grpc": ("opentelemetry.exporter.otlp.proto.grpc", "otel-grpc"),
}


def probes(settings: Settings, environ: Mapping[str, str]) -> list[Probe]:
    """Of the machine, and of what is installed on it."""
    return [
        Probe("platform", lambda: _platform(settings), cure="run the worker on Linux (amd64 or arm64)"),
        Probe("extras", lambda: _extras(environ), cure="install the extra, or set the variable to none"),
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
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return Finding("none are needed: OTEL_SDK_DISABLED")
    troubles, cures = [], []
    for signal in _SIGNALS:
        variable = f"OTEL_{signal}_EXPORTER"
        wanted = [name.strip() for name in environ.get(variable, "").split(",") if name.strip()]
        known = _EXPORTERS[signal]
        unknown = [name for name in wanted if name not in known]
        if unknown:
            troubles.append(f"{variable} names {', '.join(unknown)}; known are {', '.join(known)}")
            cures.append(f"correct {variable}")
        if "otlp" in wanted:
            protocol = _protocol(signal, environ)
            if protocol not in _PACKAGES:
                troubles.append(f"the OTLP protocol {protocol} is not known; known are {', '.join(_PACKAGES)}")
                cures.append("correct OTEL_EXPORTER_OTLP_PROTOCOL")
            elif not _installed(_PACKAGES[protocol][0]):
                extra = _PACKAGES[protocol][1]
                troubles.append(f"{variable} asks for otlp ({protocol}), and the extra {extra} is not installed")
                cures.append(f"pip install 'oz-worker[{extra}]'")
    if troubles:
        return Finding("; ".join(troubles), Outcome.WARNING, "; ".join(dict.fromkeys(cures)))
    return Finding("nothing is missing that the environment asks for")


def _protocol(signal: str, environ: Mapping[str, str]) -> str:
    for name in (f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if value := environ.get(name, "").strip():
            return value
    return "http/protobuf"


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a package above it is missing
        return False
