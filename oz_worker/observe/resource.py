"""What every exporter says about who measures: the attributes of OpenTelemetry's resource."""

from __future__ import annotations

import re
from typing import Mapping
from urllib.parse import unquote

from oz_worker import __version__

SERVICE = "oz-agent-worker"
SDK = {"telemetry.sdk.language": "python", "telemetry.sdk.name": "oz-worker", "telemetry.sdk.version": __version__}
"""Who measures where OpenTelemetry's SDK does not, lowest of all: its own name is reserved for it. OTLP has its own."""
_KEY = re.compile(r"[\x21-\x2b\x2d-\x3c\x3e-\x7e]+")
"""Printable ASCII without blanks, comma and `=`."""


def attributes(
    environ: Mapping[str, str], *, version: str, worker_id: str, backend: str
) -> tuple[dict[str, str], list[str]]:
    """The attributes, and a warning for what could not be used of the environment.

    Lowest first: the worker's own (service.name, service.version, worker.id, worker.backend), OTEL_RESOURCE_ATTRIBUTES,
    OTEL_SERVICE_NAME: whoever sets a variable means it. One bad pair makes all of OTEL_RESOURCE_ATTRIBUTES void, as
    OpenTelemetry's specification has it: half of a set of labels would put the series in the wrong place.
    """
    found = {"service.name": SERVICE, "service.version": version, "worker.id": worker_id, "worker.backend": backend}
    warnings: list[str] = []
    try:
        found.update(_pairs(environ.get("OTEL_RESOURCE_ATTRIBUTES", "")))
    except ValueError as error:
        warnings.append(
            f"OTEL_RESOURCE_ATTRIBUTES is not used: {error}; write key=value,key=value with commas, equals signs and"
            " blanks in a value as %2C, %3D and %20"
        )
    if name := environ.get("OTEL_SERVICE_NAME", "").strip():
        found["service.name"] = name
    return found, warnings


def _pairs(text: str) -> dict[str, str]:
    """Raises ValueError, naming the place and no value: somebody may keep a secret there."""
    pairs: dict[str, str] = {}
    for number, part in enumerate(text.split(","), start=1):
        if not part.strip():
            continue  # a comma too many at the end
        key, equals, value = part.partition("=")
        key = unquote(key.strip())
        if not equals:
            raise ValueError(f"part {number} has no equals sign")
        if not _KEY.fullmatch(key):
            raise ValueError(f"part {number} has no proper key")
        try:
            pairs[key] = unquote(value.strip(), errors="strict")
        except UnicodeDecodeError:
            raise ValueError(f"the value of {key} is not UTF-8 behind its percent signs") from None
    return pairs
