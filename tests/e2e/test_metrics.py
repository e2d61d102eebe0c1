"""What nobody may do to a worker by reading its metrics, and what an environment that asks for odd ones does.

What the metrics say, as a real Prometheus reads them: `tests/monitoring`.
"""

from __future__ import annotations

import json
import re
import socket
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from oz_worker import instruments
from oz_worker.meters import Meters
from oz_worker.observe import console, exporters
from oz_worker.observe.exporters import Source
from tests.prometheus import SERVED, address, page, value
from tests.rig import SAFETY, Rig, until


def test_hanging_scrapes_and_five_hundred_at_once_touch_neither_tasks_nor_link(rig: Rig) -> None:
    worker = rig.start(env=SERVED)
    where = address(worker)
    hanging = [socket.create_connection(where, timeout=SAFETY) for _ in range(250)]
    for number, connection in enumerate(hanging):
        connection.sendall((b"", b"GET /metr", b"GET /metrics HTTP/1.1\r\n\r\n")[number % 3])  # none is ever read
    crowd = [socket.create_connection(where, timeout=SAFETY) for _ in range(500)]
    for connection in crowd:
        connection.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
    tasks = [rig.submit("exit 0") for _ in range(10)]
    for task in tasks:
        rig.plane.wait_acknowledged(task)
    for connection in crowd:
        with connection, connection.makefile("rb") as answer:
            assert value(answer.read().decode(), "connected") == 1
    assert [task.state for task in tasks] == ["completed"] * 10
    assert len(rig.plane.connections) == 1
    until(lambda: value(page(worker), "tasks_completed_total", result="succeeded") == 10, "the count of their ends")
    for connection in hanging[::2]:
        connection.close()
    assert worker.stop() == 0  # with half of them still open
    for connection in hanging[1::2]:
        connection.close()
    rig.audit()


def test_the_console_gets_a_line_at_each_interval_and_one_at_the_end(rig: Rig) -> None:
    """stdout and stderr of the rig's worker are one file, so its lines stand among those of the log."""
    worker = rig.start(env={"OTEL_METRICS_EXPORTER": "console", "OTEL_METRIC_EXPORT_INTERVAL": "200"})
    task = rig.submit("exit 0")
    rig.plane.wait_acknowledged(task)

    def documents() -> list[dict[str, Any]]:
        return [json.loads(line) for line in worker.log.splitlines() if line.startswith('{"time"')]

    until(lambda: len(documents()) > 2, "three lines")
    assert worker.stop() == 0
    last = documents()[-1]
    assert last["resource"]["service.name"] == "oz-agent-worker"
    metrics = {metric["name"]: metric for metric in last["metrics"]}
    assert metrics["oz_worker_connected"]["points"] == [{"labels": {}, "value": 0}]  # written after the close
    duration = metrics["oz_worker_task_duration_seconds"]
    assert (duration["kind"], duration["unit"]) == ("histogram", "s")
    assert duration["points"][0]["labels"] == {"result": "succeeded"}
    assert duration["points"][0]["count"] == sum(duration["points"][0]["buckets"]) == 1
    rig.audit()


def test_what_cannot_be_exported_costs_one_warning_each_and_no_task(rig: Rig) -> None:
    """An unknown exporter, a port in use, an endpoint, an interval and attributes that are none: the worker runs."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        worker = rig.start(
            env={
                "OTEL_METRICS_EXPORTER": "prometheus, zipkin ,console,otlp",
                "OTEL_EXPORTER_OTLP_ENDPOINT": "collector:somewhere",
                "OTEL_EXPORTER_PROMETHEUS_PORT": str(port),
                "OTEL_EXPORTER_PROMETHEUS_HOST": "127.0.0.1",
                "OTEL_METRIC_EXPORT_INTERVAL": "soon",
                "OTEL_RESOURCE_ATTRIBUTES": "team",
            }
        )
        task = rig.submit("exit 0")
        rig.plane.wait_acknowledged(task)
        worker.wait_log("metrics cannot be served")
        worker.wait_log("is not a collector's address")
    assert task.state == "completed"
    assert worker.stop() == 0
    warnings = [line.partition("WARNING ")[2] for line in worker.log.splitlines() if " WARNING " in line]
    expected = (
        "OTEL_RESOURCE_ATTRIBUTES is not used: part 1 has no equals sign; ",
        "OTEL_METRICS_EXPORTER names 'zipkin', which this worker does not know; ",
        "OTEL_EXPORTER_OTLP_ENDPOINT is not a collector's address; write it like ",
        "OTEL_METRIC_EXPORT_INTERVAL is 'soon'; set it to a whole number of milliseconds from 1 on. 60000 is used",
        f"metrics cannot be served on 127.0.0.1 port {port}: Address already in use; "
        "set OTEL_EXPORTER_PROMETHEUS_PORT to a free port",
    )
    for sentence in expected:
        assert len([warning for warning in warnings if warning.startswith(sentence)]) == 1, (sentence, warnings)
    assert len(warnings) == len(expected), warnings
    rig.audit()


@pytest.mark.parametrize("port", ["http", "70000", "-1", "9464.0", "٣"])
def test_a_port_that_is_none_is_told_and_nothing_is_served(port: str, caplog: pytest.LogCaptureFixture) -> None:
    environ = {"OTEL_METRICS_EXPORTER": "prometheus", "OTEL_EXPORTER_PROMETHEUS_PORT": port}
    made = exporters.make(Source(Meters(instruments.CATALOGUE), {}, environ))
    made.start()
    made.stop(0)
    assert [record.getMessage() for record in caplog.records] == [
        f"OTEL_EXPORTER_PROMETHEUS_PORT is {port!r}, which is no port up to 65535; set it to one, such as 9464;"
        " the worker runs without prometheus"
    ]


@pytest.mark.parametrize("host", ["[::1]", "::1"])
def test_an_address_of_ipv6_is_served_with_or_without_brackets(host: str, caplog: pytest.LogCaptureFixture) -> None:
    """Where this machine has none, the warning names it as it does any address that is not to be had."""
    caplog.set_level("INFO")
    environ = {"OTEL_METRICS_EXPORTER": "prometheus", "OTEL_EXPORTER_PROMETHEUS_PORT": "0"}
    made = exporters.make(Source(Meters(instruments.CATALOGUE), {}, {**environ, "OTEL_EXPORTER_PROMETHEUS_HOST": host}))
    made.start()
    said = until(lambda: [record.getMessage() for record in caplog.records], "a word about it")[0]
    served = re.fullmatch(r"metrics are served on (http://\[::1\]:\d+/metrics)", said)
    if served:
        with urllib.request.urlopen(served[1], timeout=SAFETY) as answer:
            assert b"# TYPE oz_worker_connected gauge" in answer.read()
    made.stop(SAFETY)
    addresses = Path("/proc/net/if_inet6")
    if addresses.exists() and f"{1:032x}" in addresses.read_text():
        assert served, said
    else:
        assert said.startswith("metrics cannot be served on ::1 port 0: ")


@pytest.mark.parametrize(("text", "seconds"), [("1", 0.001), ("9" * 5000, 60), ("0", 60), ("-5", 60), ("\udcff", 60)])
def test_an_interval_that_is_none_is_the_default(text: str, seconds: float) -> None:
    assert console.interval({"OTEL_METRIC_EXPORT_INTERVAL": text}) == seconds


def test_which_exporters_are_meant(caplog: pytest.LogCaptureFixture) -> None:
    meant = {
        "": (("otlp",), False),
        " , ": (("otlp",), False),
        "none": ((), True),
        "console,none": ((), True),
        "OTLP, prometheus,otlp": (("prometheus", "otlp"), True),
    }
    for text, expected in meant.items():
        assert exporters.chosen({"OTEL_METRICS_EXPORTER": text})[:2] == expected
    assert exporters.chosen({})[:2] == (("otlp",), False)
    assert exporters.chosen({"OTEL_METRICS_EXPORTER": "prometheus", "OTEL_SDK_DISABLED": "True"}) == ((), True, ())
    assert caplog.records == []
