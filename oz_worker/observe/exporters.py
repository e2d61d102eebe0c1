"""Who gets the metrics: `OTEL_METRICS_EXPORTER`, and a start that nothing can make fail.

| value        | what follows                                                                        |
|--------------|-------------------------------------------------------------------------------------|
| unset, empty | `otlp` when the extra is there, as the existing worker does; else one line at debug  |
| `otlp`       | pushed to a collector; one clear line when the extra is missing                      |
| `prometheus` | served over HTTP                                                                    |
| `console`    | a line of JSON on stdout at each interval                                           |
| `none`       | nothing, whatever else is in the list                                               |
| a,b          | each of them                                                                        |

`OTEL_SDK_DISABLED=true` is the same as `none`. Nothing in here raises: what is broken in observation hurts no task.
"""

from __future__ import annotations

import logging
from typing import Callable, Mapping, NamedTuple, Protocol, Sequence

from oz_worker.meters import Meters
from oz_worker.timing import Deadline

logger = logging.getLogger(__name__)

VARIABLE = "OTEL_METRICS_EXPORTER"
KNOWN = ("prometheus", "console", "otlp", "none")
"""In the order in which they start and stop: the one that may need time to stop is the last."""


class Exporter(Protocol):
    """One way out for the metrics, with a thread of its own."""

    def start(self) -> None:
        """Begin. Returns at once, whatever a network or a disk does. RuntimeError when no thread can be had."""

    def stop(self, seconds: float) -> None:
        """Send what is still to be sent and end; at most *seconds*, then leave it behind. Raises nothing."""


class Source(NamedTuple):
    """What an exporter is made from."""

    meters: Meters
    resource: Mapping[str, str]
    """The resource's attributes (`oz_worker.observe.resource`)."""
    environ: Mapping[str, str]
    instance: str = ""
    """The instance's id, which tells two workers of one worker id apart."""
    ca_file: str = ""
    """The configuration's."""


class Exporters:
    """Those that were asked for, as one. Main thread only."""

    def __init__(self, exporters: list[Exporter]) -> None:
        self._exporters = exporters

    def start(self) -> None:
        """Start them all."""
        for exporter in self._exporters:
            try:
                exporter.start()
            except RuntimeError as error:  # the limit of threads
                logger.warning("metrics are not exported by %s: %s; the worker runs on", type(exporter).__name__, error)

    def stop(self, seconds: float) -> None:
        """Stop them all, within *seconds* together."""
        deadline = Deadline(seconds)
        for exporter in self._exporters:
            exporter.stop(deadline.left())


def make(source: Source, warnings: Sequence[str] = ()) -> Exporters:
    """The exporters that the environment asks for; one warning for each that cannot be had.

    *warnings* about the resource are said when there is an exporter that was asked for, to whom it matters.
    """
    names, asked = chosen(source.environ)
    for warning in warnings if asked and names else ():
        logger.warning("%s", warning)
    made = []
    for name in names:
        try:
            exporter = _MAKERS[name](source, asked)
        except Exception as error:  # the door to foreign code: an SDK, a module that is half installed
            logger.warning("the metrics exporter %s is not used: %s; the worker runs without it", name, error)
            continue
        if exporter is not None:
            made.append(exporter)
    return Exporters(made)


def chosen(
    environ: Mapping[str, str], variable: str = VARIABLE, known: Sequence[str] = KNOWN, default: str = "otlp"
) -> tuple[tuple[str, ...], bool]:
    """The exporters wanted, each once, and whether they were asked for or are the default. Warns of unknown ones."""
    words = named(environ, variable)
    if words is None:
        return (default,) if default else (), False
    for word in words:
        if word not in known:
            logger.warning(
                "%s names %r, which this worker does not know; use a comma list of %s; the others are used",
                variable,
                word,
                ", ".join(known),
            )
    return tuple(word for word in known if word in words), True


def named(environ: Mapping[str, str], variable: str) -> list[str] | None:
    """What *variable* lists: nothing where that, or another one, switches everything off; None where it is unset."""
    words = [word.strip().lower() for word in environ.get(variable, "").split(",") if word.strip()]
    if "none" in words or environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return []
    return words or None


def _otlp(source: Source, asked: bool) -> Exporter | None:
    from oz_worker.observe.otlp import OtlpExporter

    return OtlpExporter(source, asked=asked)


def _prometheus(source: Source, _asked: bool) -> Exporter | None:
    from oz_worker.observe.prometheus import PrometheusExporter

    return PrometheusExporter.of(source.meters, source.resource, source.environ)


def _console(source: Source, _asked: bool) -> Exporter | None:
    from oz_worker.observe.console import ConsoleExporter

    return ConsoleExporter.of(source.meters, source.resource, source.environ)


_MAKERS: dict[str, Callable[[Source, bool], Exporter | None]] = {
    "otlp": _otlp,
    "prometheus": _prometheus,
    "console": _console,
}
