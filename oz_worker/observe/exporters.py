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
import threading
from typing import Callable, Mapping, NamedTuple, Protocol, Sequence

from oz_worker.meters import Meters
from oz_worker.observe import resource
from oz_worker.timing import Deadline

logger = logging.getLogger(__name__)

VARIABLE = "OTEL_METRICS_EXPORTER"
DISABLED = "OTEL_SDK_DISABLED"
KNOWN = ("prometheus", "console", "otlp", "none")
"""In the order in which they start and stop: the one that may need time to stop is the last."""


class Exporter(Protocol):
    """One way out for the metrics, with a thread of its own."""

    def start(self) -> None:
        """Begin. Returns at once, whatever a network or a disk does. RuntimeError when no thread can be had."""

    def stop(self, seconds: float) -> None:
        """Send what is still to be sent and end; at most *seconds*, then leave it behind. Raises nothing."""


def _warn(sentence: str) -> None:
    logger.warning("%s", sentence)


def once() -> Callable[[str], None]:
    """A voice that says each sentence once: one variable may be bad news for metrics and for traces. Any thread."""
    lock = threading.Lock()  # guards `said`
    said: set[str] = set()

    def warn(sentence: str) -> None:
        with lock:
            fresh = sentence not in said
            said.add(sentence)
        if fresh:
            _warn(sentence)

    return warn


class Source(NamedTuple):
    """What an exporter is made from."""

    meters: Meters
    resource: Mapping[str, str]
    """The resource's attributes (`oz_worker.observe.resource`)."""
    environ: Mapping[str, str]
    """As `otel_settings` has corrected it."""
    instance: str = ""
    """The instance's id, which tells two workers of one worker id apart."""
    ca_file: str = ""
    """The configuration's."""
    warnings: Mapping[str, Sequence[str]] = {}
    """Those of `otel_settings`, and `resource`: to be said by whom they concern."""
    warn: Callable[[str], None] = _warn

    def warn_of(self, *concerns: str) -> None:
        """Say what there is to say about them."""
        for concern in concerns:
            for sentence in self.warnings.get(concern, ()):
                self.warn(sentence)


class Choice(NamedTuple):
    """What a variable chooses."""

    names: tuple[str, ...]
    """Each once, in the order of those that are known."""
    asked: bool
    """Whether it was asked for or is the default."""
    warnings: tuple[str, ...]


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


def make(source: Source) -> Exporters:
    """The exporters that the environment asks for; one warning for each that cannot be had."""
    names, asked, warnings = chosen(source.environ)
    for warning in warnings:
        source.warn(warning)
    if asked and names:
        source.warn_of("resource")
    made = []
    for name in names:
        try:
            exporter = _MAKERS[name](source, asked)
        except Exception as error:  # the door to foreign code: an SDK, a module that is half installed
            source.warn(f"the metrics exporter {name} is not used: {error}; the worker runs without it")
            continue
        if exporter is not None:
            made.append(exporter)
    return Exporters(made)


def chosen(
    environ: Mapping[str, str], variable: str = VARIABLE, known: Sequence[str] = KNOWN, default: str = "otlp"
) -> Choice:
    """The exporters that *variable* wants, *default* where it is unset."""
    disabled = environ.get(DISABLED, "").strip()
    words = named(environ, variable)
    doubts = []
    if (words or (words is None and default)) and disabled.lower() not in ("", "true", "false"):
        doubts.append(f"{DISABLED} is {disabled!r}; set it to true or false. false is used")
    if words is None:
        return Choice((default,) if default else (), False, tuple(doubts))
    doubts += [
        f"{variable} names {word!r}, which this worker does not know; use a comma list of {', '.join(known)}. It runs"
        " without that one"
        for word in dict.fromkeys(words)
        if word not in known
    ]
    return Choice(tuple(word for word in known if word in words), True, tuple(doubts))


def named(environ: Mapping[str, str], variable: str) -> list[str] | None:
    """What *variable* lists: nothing where that, or another one, switches everything off; None where it is unset."""
    words = [word.strip().lower() for word in environ.get(variable, "").split(",") if word.strip()]
    if "none" in words or environ.get(DISABLED, "").strip().lower() == "true":
        return []
    return words or None


def _otlp(source: Source, asked: bool) -> Exporter | None:
    from oz_worker.observe.otlp import OtlpExporter

    return OtlpExporter(source, asked=asked)


def _prometheus(source: Source, _asked: bool) -> Exporter | None:
    from oz_worker.observe.prometheus import PrometheusExporter, where

    try:
        host, port = where(source.environ)
    except ValueError as error:
        source.warn(f"{error}; the worker runs without prometheus")
        return None
    return PrometheusExporter(source.meters, {**resource.SDK, **source.resource}, host, port)


def _console(source: Source, _asked: bool) -> Exporter | None:
    from oz_worker.observe.console import ConsoleExporter, interval

    source.warn_of("interval")
    return ConsoleExporter(source.meters, {**resource.SDK, **source.resource}, interval(source.environ))


_MAKERS: dict[str, Callable[[Source, bool], Exporter | None]] = {
    "otlp": _otlp,
    "prometheus": _prometheus,
    "console": _console,
}
