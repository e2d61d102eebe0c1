"""The variables that OpenTelemetry's SDK reads by itself, judged before it does.

A value that cannot be used would cost a whole exporter there, or be put aside without the variable's name. Here it
costs one sentence and the default is used; an empty one is unset, as the specification has it. The worker and `check`
judge by this module; nothing of the SDK is imported.
"""

from __future__ import annotations

import threading
from typing import Callable, Mapping, NamedTuple

INTERVAL = "OTEL_METRIC_EXPORT_INTERVAL"
QUEUE, BATCH = "OTEL_BSP_MAX_QUEUE_SIZE", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE"
MOST = int(threading.TIMEOUT_MAX)
"""Of every number: as milliseconds it is still a time that can be waited for."""


EXPORT_TIMEOUTS = {"metrics": "OTEL_METRIC_EXPORT_TIMEOUT", "traces": "OTEL_BSP_EXPORT_TIMEOUT"}
"""By signal; the SDK reads them and passes them to nobody who keeps to them."""


class Settled(NamedTuple):
    """What to read in the place of what is set, and sentences about it by whom they concern.

    `interval` concerns every exporter that pushes metrics, `metrics` and `traces` those of the SDK.
    """

    corrected: dict[str, str]
    warnings: dict[str, tuple[str, ...]]


class _Rule(NamedTuple):
    concerns: str
    default: str  # "" for no limit
    wanted: str
    read: Callable[[str], str]  # the value as the SDK understands it, "" when it is none


def whole(text: str, least: int = 1) -> int | None:
    """A whole number from *least* on that is no more than `MOST`; None for anything else."""
    if not (text.isascii() and text.isdigit() and len(text) <= 12):
        return None
    return int(text) if least <= int(text) <= MOST else None


def export_limit(signal: str, environ: Mapping[str, str]) -> float:
    """Seconds for one export, whatever the exporter's own time limit is, from an environment that is corrected."""
    name = EXPORT_TIMEOUTS[signal]
    return int(environ.get(name) or _RULES[name].default) / 1000


def _number(concerns: str, default: str, least: int = 1, unit: str = "") -> _Rule:
    def read(text: str) -> str:
        return "" if whole(text, least) is None else str(int(text))

    return _Rule(concerns, default, f"a whole number{unit} from {least} on", read)


def _word(concerns: str, default: str, *others: str) -> _Rule:
    known = (default, *others)
    return _Rule(
        concerns,
        default,
        f"one of {', '.join(known)}",
        lambda text: text.lower() if text.lower() in known else "",
    )


def _share(text: str) -> str:
    try:
        return text if 0 <= float(text) <= 1 else ""
    except ValueError:
        return ""


_TIME = " of milliseconds"
_GENERAL = {"COUNT": "OTEL_ATTRIBUTE_COUNT_LIMIT", "LENGTH": "OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT"}
_SAMPLER, _SHARE = "OTEL_TRACES_SAMPLER", "OTEL_TRACES_SAMPLER_ARG"
_RULES = {
    INTERVAL: _number("interval", "60000", unit=_TIME),
    EXPORT_TIMEOUTS["metrics"]: _number("metrics", "30000", unit=_TIME),
    "OTEL_METRICS_EXEMPLAR_FILTER": _word("metrics", "trace_based", "always_on", "always_off"),
    "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": _word("metrics", "cumulative", "delta", "lowmemory"),
    "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION": _word(
        "metrics", "explicit_bucket_histogram", "base2_exponential_bucket_histogram"
    ),
    "OTEL_BSP_SCHEDULE_DELAY": _number("traces", "5000", unit=_TIME),
    EXPORT_TIMEOUTS["traces"]: _number("traces", "30000", unit=_TIME),
    QUEUE: _number("traces", "2048"),
    BATCH: _number("traces", "512"),
    _SAMPLER: _word(
        "traces",
        "parentbased_always_on",
        "parentbased_always_off",
        "parentbased_traceidratio",
        "always_on",
        "always_off",
        "traceidratio",
    ),
    _SHARE: _Rule("traces", "1.0", "a number from 0 to 1", _share),
    _GENERAL["COUNT"]: _number("traces", "128", 0),
    _GENERAL["LENGTH"]: _number("traces", "", 0),
    "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": _number("traces", "128", 0),
    "OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT": _number("traces", "", 0),
    "OTEL_SPAN_EVENT_COUNT_LIMIT": _number("traces", "128", 0),
    "OTEL_SPAN_LINK_COUNT_LIMIT": _number("traces", "128", 0),
    "OTEL_EVENT_ATTRIBUTE_COUNT_LIMIT": _number("traces", "128", 0),
    "OTEL_LINK_ATTRIBUTE_COUNT_LIMIT": _number("traces", "128", 0),
}


def judge(environ: Mapping[str, str]) -> Settled:
    """Each of the variables that is set in *environ*."""
    corrected: dict[str, str] = {}
    warnings: dict[str, tuple[str, ...]] = {}

    def told(name: str) -> str:
        return corrected.get(name, environ.get(name, ""))

    def warn(concerns: str, sentence: str) -> None:
        warnings[concerns] = (*warnings.get(concerns, ()), sentence)

    for name, rule in _RULES.items():
        if name not in environ:
            continue
        value = environ[name].strip()
        if not (read := rule.read(value)):
            kind = next((kind for kind in _GENERAL if name.endswith(f"_ATTRIBUTE_{kind}_LIMIT")), "")
            kind = "LENGTH" if name.endswith("_VALUE_LENGTH_LIMIT") else kind
            read = (told(_GENERAL[kind]) if kind and name != _GENERAL[kind] else "") or rule.default
            if value and not (name == _SHARE and not told(_SAMPLER).endswith("traceidratio")):
                warn(rule.concerns, f"{name} is {value!r}; set it to {rule.wanted}. {read or 'No limit'} is used")
        if read != environ[name]:
            corrected[name] = read
    queue = int(told(QUEUE) or _RULES[QUEUE].default)
    if int(told(BATCH) or _RULES[BATCH].default) > queue:
        if told(BATCH):
            warn("traces", f"{BATCH} is {told(BATCH)}; set it to no more than {QUEUE}. {queue} is used")
        corrected[BATCH] = str(queue)  # also a default that does not fit would cost the exporter
    return Settled(corrected, warnings)
