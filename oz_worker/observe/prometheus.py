"""Prometheus' text format 0.0.4, to the letter as the existing worker's exporter writes it, and its endpoint.

That exporter is OpenTelemetry's for Go, so: families by name, series by their labels' values, labels by name with the
scope's three among them and `le` last; numbers as Go's shortest form (`5`, `0.25`, `1e+06`); counters keep the `_total`
of their name and an up-down counter is a gauge; `target_info` carries the resource, its keys made into labels.
"""

from __future__ import annotations

import logging
import math
import re
import threading
import time
from decimal import Decimal
from typing import Iterable, Mapping

from oz_worker import threads
from oz_worker.instruments import SCOPE
from oz_worker.meters import Distribution, Family, Kind, Labels, Meters
from oz_worker.observe.http import Listener, Reply

logger = logging.getLogger(__name__)

HOST, PORT = "OTEL_EXPORTER_PROMETHEUS_HOST", "OTEL_EXPORTER_PROMETHEUS_PORT"
DEFAULT_HOST, DEFAULT_PORT = "localhost", 9464
PATH = "/metrics"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FRESH_SECONDS = 0.05
"""One page serves all scrapes of this time: a crowd of scrapers costs the tasks no more than one."""

_SCOPE: Labels = (("otel_scope_name", SCOPE), ("otel_scope_schema_url", ""), ("otel_scope_version", ""))
_TYPES = {Kind.COUNTER: "counter", Kind.GAUGE: "gauge", Kind.UP_DOWN: "gauge", Kind.HISTOGRAM: "histogram"}
_NO_LABEL = re.compile(r"[^a-zA-Z0-9_]")


def exposition(families: Iterable[Family], resource: Mapping[str, str]) -> str:
    """The whole page; families without a value are left out."""
    blocks = {family.instrument.name: "".join(_lines(family)) for family in families}
    blocks["target_info"] = "".join(_target_info(resource))
    return "".join(blocks[name] for name in sorted(blocks))


def _lines(family: Family) -> Iterable[str]:
    instrument = family.instrument
    if not (family.points or family.distributions):
        return
    yield from _heading(instrument.name, instrument.help, _TYPES[instrument.kind])
    points = [(_labels(point.labels), point.value) for point in family.points]
    for labels, value in sorted(points, key=_by_values):
        yield f"{instrument.name}{{{_written(labels)}}} {number(value)}\n"
    distributions = [(_labels(each.labels), each) for each in family.distributions]
    for labels, each in sorted(distributions, key=_by_values):
        yield from _histogram(instrument.name, instrument.bounds, labels, each)


def _heading(name: str, text: str, kind: str) -> Iterable[str]:
    escaped = text.replace("\\", "\\\\").replace("\n", "\\n")
    yield f"# HELP {name} {escaped}\n# TYPE {name} {kind}\n"


def _histogram(name: str, bounds: tuple[float, ...], labels: Labels, each: Distribution) -> Iterable[str]:
    written, below = _written(labels), 0
    for bound, count in zip((*bounds, math.inf), each.buckets, strict=True):
        below += count
        yield f'{name}_bucket{{{written},le="{number(bound)}"}} {number(below)}\n'
    yield f"{name}_sum{{{written}}} {number(each.total)}\n"
    yield f"{name}_count{{{written}}} {number(each.number)}\n"


def _target_info(resource: Mapping[str, str]) -> Iterable[str]:
    labels: dict[str, str] = {}
    for key in sorted(resource):
        name = label_name(key)
        labels[name] = f"{labels[name]};{resource[key]}" if name in labels else resource[key]
    yield from _heading("target_info", "Target metadata", "gauge")
    yield f"target_info{{{_written(tuple(sorted(labels.items())))}}} 1\n"


def label_name(key: str) -> str:
    """An attribute's key as a label: `service.name` is `service_name`, and no label begins with a digit."""
    name = _NO_LABEL.sub("_", key)
    return f"key_{name}" if name[:1].isdigit() else name


def number(value: float) -> str:
    """A number as Go's shortest form writes it: no `.0`, an exponent from 1e+06 on and below 1e-4."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    shortest = Decimal(repr(float(value))).normalize()
    exponent = shortest.adjusted()
    if shortest and not -4 <= exponent < 6:
        digits = f"{shortest.scaleb(-exponent):f}"
        return f"{digits}e{exponent:+03d}"
    return f"{shortest:f}"


def _labels(labels: Labels) -> Labels:
    return tuple(sorted((*labels, *_SCOPE)))


def _by_values(entry: tuple[Labels, object]) -> list[str]:
    return [value for _, value in entry[0]]


def _written(labels: Labels) -> str:
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in labels)


def _escaped(value: str) -> str:
    clean = value.encode("utf-8", "replace").decode()  # half a character would make the whole page unreadable
    return clean.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def where(environ: Mapping[str, str]) -> tuple[str, int]:
    """Host and port to serve on. Raises ValueError, in words for the operator."""
    host = environ.get(HOST, "").strip() or DEFAULT_HOST
    text = environ.get(PORT, "").strip() or str(DEFAULT_PORT)
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) > 65535:
        raise ValueError(f"{PORT} is {text!r}, which is no port up to 65535; set it to one, such as {DEFAULT_PORT}")
    return host.strip("[]"), int(text)


class PrometheusExporter:
    """The page over HTTP, on a thread `http-metrics`; an Exporter.

    The address is bound on that thread, so that a name server that does not answer delays no start.
    """

    def __init__(self, meters: Meters, resource: Mapping[str, str], host: str, port: int) -> None:
        self._meters = meters
        self._resource = resource
        self._host, self._port = host, port
        self._listener = Listener("http-metrics", host, port, {PATH: self._reply})
        self._page = b""
        self._made = -math.inf
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Bind and serve."""
        self._thread = threads.start("http-metrics", self._serve, _died)

    def stop(self, seconds: float) -> None:
        """Stop serving."""
        self._listener.stop(0)
        if self._thread is not None:
            self._thread.join(seconds)

    def _serve(self) -> None:
        try:
            host, port = self._listener.open()
        except OSError as error:
            logger.warning(
                "metrics cannot be served on %s port %d: %s; set %s to a free port or %s to an address of this machine"
                ", then start again. The worker runs without them",
                self._host, self._port, error.strerror or error, PORT, HOST,
            )  # fmt: skip
            return
        logger.info("metrics are served on http://%s:%d%s", f"[{host}]" if ":" in host else host, port, PATH)
        self._listener.serve()

    def _reply(self) -> Reply:
        now = time.monotonic()
        if now >= self._made + FRESH_SECONDS:
            self._page = exposition(self._meters.snapshot(), self._resource).encode()
            self._made = now
        return Reply(200, self._page, CONTENT_TYPE)


def _died(_name: str, error: BaseException) -> None:
    logger.warning("metrics are not served any more (%s: %s); the worker runs on", type(error).__name__, error)
