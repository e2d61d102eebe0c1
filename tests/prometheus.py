"""What a worker serves: one scrape by hand, and a real Prometheus server that scrapes it twice a second.

What `sees` and `Prometheus.saw` are told to look for is collected by `tests/monitoring/test_everything_is_seen.py`.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from tests.rig import SAFETY, Worker, until

SERVED = {"OTEL_METRICS_EXPORTER": "prometheus", "OTEL_EXPORTER_PROMETHEUS_PORT": "0"}
"""A worker's environment in which it serves its metrics, on a port of the kernel's choice."""

_CONFIG = """
global: {{scrape_interval: 500ms, scrape_timeout: 500ms, evaluation_interval: 1s}}
scrape_configs:
  - job_name: worker
    static_configs: [{{targets: ["{target}"]}}]
"""


def address(worker: Worker) -> tuple[str, int]:
    """Where it serves its metrics, by its own word."""
    worker.wait_log(r"metrics are served on http://[^/]+/metrics")
    host, port = re.findall(r"metrics are served on http://([\d.]+):(\d+)/metrics", worker.log)[-1]
    return host, int(port)


def page(worker: Worker) -> str:
    """One scrape."""
    host, port = address(worker)
    with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=SAFETY) as response:
        assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        return str(response.read().decode())


def value(text: str, name: str, **labels: str) -> float | None:
    """The value of one series on a page; None when it is not there."""
    for line in text.splitlines():
        if line.startswith(f"oz_worker_{name}{{") and all(f'{k}="{v}"' in line for k, v in labels.items()):
            return float(line.rpartition(" ")[2])
    return None


def sees(worker: Worker, *series: str) -> None:
    """Block until the worker's own page has each of *series* (`name{label="value"}`) above 0."""

    def above(name: str, labels: dict[str, str]) -> bool:
        return (value(page(worker), name, **labels) or 0) > 0

    for each in series:
        until(lambda: above(*named(each)), f"{each} above 0")  # noqa: B023 (called at once)


def named(series: str) -> tuple[str, dict[str, str]]:
    """The name, without the prefix that all have, and the labels of `name{label="value"}`."""
    found = re.fullmatch(r"oz_worker_(\w+)(?:\{(.*)\})?", series)
    assert found, f"{series} is no series of a worker"
    return found[1], dict(re.findall(r'(\w+)="([^"]*)"', found[2] or ""))


class Prometheus:
    """The server as a process with its data in *place*, which is a directory of the test. A context manager."""

    def __init__(self, place: Path, target: str) -> None:
        place.mkdir()
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        configuration = place / "prometheus.yml"
        configuration.write_text(_CONFIG.format(target=target))
        self._log = (place / "log").open("wb")
        self._process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={configuration}",
                f"--storage.tsdb.path={place / 'data'}",
                f"--web.listen-address={self.address}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            cwd=place,
        )

    def __enter__(self) -> Prometheus:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait(SAFETY)
        self._log.close()

    def query(self, expression: str) -> dict[frozenset[tuple[str, str]], float]:
        """The values of *expression* just now, by their labels without those that all of them have."""
        answer = until(lambda: self._at_a_good_moment(expression), "a scrape that succeeded")
        common = ("__name__", "instance", "job", "otel_scope_name", "otel_scope_schema_url", "otel_scope_version")
        return {
            frozenset((name, value) for name, value in each["metric"].items() if name not in common): float(
                each["value"][1]
            )
            for each in answer["result"]
        }

    def one(self, expression: str) -> float | None:
        """The one value of *expression*, None when there is none."""
        values = list(self.query(expression).values())
        assert len(values) < 2, values
        return values[0] if values else None

    def wait_for(self, expression: str, value: float) -> None:
        """Block until a scrape has brought that value."""
        until(lambda: self.one(expression) == value, f"{expression} == {value}")

    def saw(self, *series: str) -> None:
        """Block until each of *series* has been above 0 at some scrape."""
        for each in series:
            until(lambda: (self.one(f"max(max_over_time({each}[1h]))") or 0) > 0, f"{each} above 0")  # noqa: B023

    def kinds(self) -> dict[str, str]:
        """The type of each metric, as it was announced."""
        return {name: entries[0]["type"] for name, entries in self._get("metadata").items()}

    def trouble(self) -> str:
        """Why the last scrape failed; "" when it did not."""
        return str(self._get("targets")["activeTargets"][0]["lastError"])

    def _at_a_good_moment(self, expression: str) -> Any:
        """None where the last scrape was too slow for Prometheus: everything counts as gone then."""
        at = str(time.time())
        up = self._get("query", query="up", time=at)["result"]
        return self._get("query", query=expression, time=at) if up and up[0]["value"][1] == "1" else None

    def _get(self, what: str, **parameters: str) -> Any:
        url = f"http://{self.address}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"

        def asked() -> Any:
            try:
                with urllib.request.urlopen(url, timeout=SAFETY) as response:
                    return json.load(response)
            except OSError:  # it is starting
                assert self._process.poll() is None, "Prometheus has left"
                return None

        return until(asked, f"{url}")["data"]
