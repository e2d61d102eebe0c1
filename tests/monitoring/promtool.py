"""Prometheus' own `promtool`, and the series that workers would export, made from the product's catalogue.

A series that no worker has cannot be made here: names, labels and label values are those of `oz_worker.instruments`.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Iterable, Mapping, NamedTuple

from oz_worker.instruments import CATALOGUE, SCOPE
from oz_worker.meters import Kind

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "deploy" / "monitoring"
RULES = MONITORING / "oz-worker.rules.yml"

NOT_PRIMED = {
    "oz_worker_backend_up": "1",
    "oz_worker_last_frame_age_seconds": "5",
    "oz_worker_last_pong_age_seconds": "5",
}
"""Gauges that a worker sets once it knows; the value here is that of a healthy one."""


class Series(NamedTuple):
    """One line of a scrape: metric, labels, and its values in promtool's notation, one a minute."""

    metric: str
    labels: Mapping[str, str]
    values: str

    def entry(self) -> dict[str, str]:
        """As `input_series` has it."""
        inside = ",".join(f'{name}="{value}"' for name, value in sorted(self.labels.items()))
        return {"series": f"{self.metric}{{{inside}}}", "values": self.values}


def worker(
    name: str,
    instance: str = "",
    *,
    backend: str = "docker",
    limit: int = 4,
    minutes: int = 120,
    version: str = "0.1.0",
    silent: str = "",
    given: Mapping[str, str] | None = None,
    **changed: str,
) -> list[Series]:
    """All series of one healthy idle worker, with those of *given* and *changed* instead.

    Their keys are a metric's name without `oz_worker_` and label values behind it, with `__` before each:
    `tasks_rejected_total__disk="0x30 1x90"`. *silent* is put before the values of everything: minutes in which the
    worker did not exist yet, like `_x30`.
    """
    target = {"job": "oz-worker", "instance": instance or f"{name}:9464"}
    scope = {"otel_scope_name": SCOPE, "otel_scope_version": "", "otel_scope_schema_url": ""}
    made: list[Series] = []

    def add(metric: str, labels: Mapping[str, str], values: str) -> None:
        made.append(Series(metric, {**target, **scope, **labels}, f"{silent} {values}".strip()))

    wanted = {**(given or {}), **changed}
    healthy = {**NOT_PRIMED, "oz_worker_connected": "1", "oz_worker_tasks_max_concurrent": str(limit)}
    for each in CATALOGUE:
        if each.kind is Kind.HISTOGRAM:
            continue
        for marked in each.primed or ([()] if each.name in NOT_PRIMED else []):
            key = "__".join((each.name.removeprefix("oz_worker_"), *marked))
            values = wanted.pop(key, f"{healthy.get(each.name, '0')}x{minutes}")
            add(each.name, dict(zip(each.labels, marked, strict=True)), values)
    info = wanted.pop("info", f"1x{minutes}")
    add("oz_worker_info", {"version": version, "backend": backend, "worker_id": name}, info)
    made.append(Series("up", target, wanted.pop("up", f"1x{minutes}")))
    assert not wanted, f"no worker exports {sorted(wanted)}"
    return made


def histogram(name: str, instance: str, minutes: int, **labels: str) -> list[Series]:
    """A histogram of a worker that observes one thing a minute, always in its third bucket."""
    each = next(instrument for instrument in CATALOGUE if instrument.name == name)
    assert tuple(labels) == each.labels
    target = {"job": "oz-worker", "instance": instance, **labels}
    buckets = [
        Series(
            f"{name}_bucket", {**target, "le": f"{bound:g}".replace("inf", "+Inf")}, f"0+{int(place >= 2)}x{minutes}"
        )
        for place, bound in enumerate((*each.bounds, float("inf")))
    ]
    return [
        *buckets,
        Series(f"{name}_sum", target, f"0+{each.bounds[2]}x{minutes}"),
        Series(f"{name}_count", target, f"0+1x{minutes}"),
    ]


def promtool(*arguments: str) -> None:
    """Run it; what it says is the failure."""
    done = subprocess.run(
        ["promtool", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def check_series(series: Iterable[Series], expected: Mapping[str, Mapping[int, Mapping[str, float]]], at: Path) -> None:
    """Evaluate the shipped rules over *series*, and hold each query against its samples at each minute.

    *expected* is query -> minute -> series -> value. *at* is a directory for the test file.
    """
    document = {
        "rule_files": [str(RULES)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [each.entry() for each in series],
                "promql_expr_test": [
                    {
                        "expr": query,
                        "eval_time": f"{minute}m",
                        "exp_samples": [{"labels": labels, "value": value} for labels, value in samples.items()],
                    }
                    for query, moments in expected.items()
                    for minute, samples in moments.items()
                ],
            }
        ],
    }
    path = at / "series.test.yml"
    path.write_text(json.dumps(document))  # JSON is YAML, and written a hundred times faster
    promtool("test", "rules", str(path))
