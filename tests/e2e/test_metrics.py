"""The metrics of a worker that works, read by a real Prometheus; and what nobody may do to it by reading them."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
from typing import Any, Iterator

import pytest

from oz_worker import __version__, instruments
from oz_worker.meters import Meters
from oz_worker.observe import exporters
from oz_worker.observe.exporters import Source
from tests.prometheus import SERVED, Prometheus, address, page, value
from tests.rig import SAFETY, WORKER_ID, Rig, Worker, until

WAIT = "while [ ! -e $HOME/go ]; do sleep 0.05; done"


@pytest.fixture
def scraped(rig: Rig) -> Iterator[tuple[Worker, Prometheus]]:
    rig.config["max_concurrent_tasks"] = 2
    worker = rig.start(env={**SERVED, "OTEL_RESOURCE_ATTRIBUTES": "team=blue", "OTEL_SERVICE_NAME": "fleet"})
    host, port = address(worker)
    with Prometheus(rig.place / "prometheus", f"{host}:{port}") as prometheus:
        yield worker, prometheus


def check_the_start(prometheus: Prometheus) -> None:
    """What stands there before anything has happened."""
    prometheus.wait_for("oz_worker_connected", 1)
    info = {"version": __version__, "backend": "direct", "worker_id": WORKER_ID}
    assert prometheus.query("oz_worker_info") == {frozenset(info.items()): 1}
    target = {"service_name": "fleet", "team": "blue", "worker_id": WORKER_ID, "worker_backend": "direct"}
    target |= {"telemetry_sdk_language": "python", "telemetry_sdk_name": "oz-worker"}
    target["telemetry_sdk_version"] = __version__
    assert prometheus.query("target_info") == {frozenset({**target, "service_version": __version__}.items()): 1}
    assert prometheus.one("oz_worker_tasks_max_concurrent") == prometheus.one("oz_worker_slots_free") == 2
    assert prometheus.one("sum(oz_worker_task_failures_total)") == 0
    assert prometheus.one("count(oz_worker_task_failures_total)") == 90
    assert prometheus.one("oz_worker_backend_up") == 1
    assert prometheus.kinds()["oz_worker_tasks_active"] == "gauge"
    assert "oz_worker_dispatch_seconds" not in prometheus.kinds()  # nothing has been dispatched


def test_a_prometheus_sees_what_becomes_of_the_worker(rig: Rig, scraped: tuple[Worker, Prometheus]) -> None:
    """Claims, a full house, success, a failed agent, a cancel, garbage, an outage that reports wait through, a backend
    that is gone."""
    worker, prometheus = scraped
    check_the_start(prometheus)

    running = [rig.submit(WAIT), rig.submit(f"{WAIT}; exit 3")]
    rig.plane.wait_for(lambda: all(task.claimed for task in running), SAFETY)
    refused = rig.submit("exit 0", requeue=False)
    prometheus.wait_for('oz_worker_tasks_rejected_total{reason="at_capacity"}', 1)
    assert prometheus.one("sum(oz_worker_tasks_rejected_total)") == 1
    assert refused.state == "rejected"
    prometheus.wait_for("oz_worker_tasks_active", 2)
    assert prometheus.one("oz_worker_slots_free") == 0

    rig.plane.down()
    (rig.place / "go").touch()
    prometheus.wait_for("oz_worker_outbox_rows", 2)
    prometheus.wait_for("oz_worker_connected", 0)
    prometheus.wait_for("oz_worker_outbox_oldest_seconds > bool 0", 1)
    prometheus.wait_for("oz_worker_tasks_active", 0)
    prometheus.wait_for('oz_worker_websocket_reconnects_total{reason="dial_failed"} > bool 0', 1)
    rig.plane.up()
    for task in running:
        rig.plane.wait_acknowledged(task)
    prometheus.wait_for("oz_worker_outbox_rows", 0)
    assert prometheus.one('oz_worker_websocket_reconnects_total{reason="remote_close"}') == 1
    assert prometheus.one("oz_worker_last_pong_age_seconds") is not None

    cancelled = rig.submit("echo up > $HOME/up; sleep 600")
    until((rig.place / "up").exists, "the agent")
    rig.plane.cancel(cancelled)
    rig.plane.wait_acknowledged(cancelled)
    invalid = rig.submit(env_vars={"BAD": "nul\0l"})
    rig.plane.wait_acknowledged(invalid)
    for _ in range(3):
        rig.plane.send_text("garbage")

    shutil.move(rig.workspaces, rig.place / "elsewhere")
    prometheus.wait_for("oz_worker_backend_up", 0)
    rig.submit("exit 0", requeue=False)
    prometheus.wait_for('oz_worker_tasks_rejected_total{reason="backend"}', 1)
    shutil.move(rig.place / "elsewhere", rig.workspaces)
    prometheus.wait_for("oz_worker_backend_up", 1)

    prometheus.wait_for('oz_worker_frames_refused_total{kind="not_json"}', 3)
    assert prometheus.one("oz_worker_last_frame_age_seconds") is not None
    assert prometheus.one("oz_worker_log_lines_dropped_total") == 0
    prometheus.wait_for('oz_worker_tasks_completed_total{result="cancelled"}', 1)
    prometheus.wait_for('oz_worker_task_failures_total{phase="assignment",reason="unknown"}', 1)
    assert prometheus.one('oz_worker_task_failures_total{phase="backend",reason="agent_invocation"}') == 1
    assert prometheus.one("sum(oz_worker_task_failures_total)") == 2
    assert prometheus.one("sum(oz_worker_task_sandbox_startup_failures_total)") == 0
    assert prometheus.one("oz_worker_tasks_claimed_total") == 3
    completed = {dict(labels)["result"]: n for labels, n in prometheus.query("oz_worker_tasks_completed_total").items()}
    assert completed == {"succeeded": 1, "failed": 1, "cancelled": 1, "dispatched": 0}
    prometheus.wait_for("sum(oz_worker_task_duration_seconds_count)", 3)
    assert prometheus.one('sum(oz_worker_task_duration_seconds_bucket{le="+Inf"})') == 3
    assert prometheus.one("oz_worker_dispatch_seconds_count") == 3
    assert prometheus.kinds()["oz_worker_task_duration_seconds"] == "histogram"
    until(lambda: prometheus.trouble() == "", "a scrape that succeeded")
    text = page(worker)
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=SAFETY)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert worker.stop() == 0
    rig.audit()


def test_a_sandbox_that_does_not_start_and_a_restart_are_counted_apart(rig: Rig) -> None:
    """A setup that fails is no failure of the agent; a worker killed with tasks on it says what became of them."""
    options = rig.config["backend"]["direct"]
    options["setup_command"] = "test ! -e $HOME/broken"
    worker = rig.start(env=SERVED)
    running = rig.submit(f"echo up > $HOME/up; {WAIT}")
    until((rig.place / "up").exists, "the agent")
    (rig.place / "broken").touch()
    failed = rig.submit("exit 0")
    rig.plane.wait_acknowledged(failed)
    (rig.place / "broken").unlink()
    text = page(worker)
    assert value(text, "tasks_completed_total", result="failed") == 1
    assert value(text, "task_sandbox_startup_failures_total", reason="setup_command") == 1
    assert value(text, "task_failures_total", phase="backend", reason="setup_command") == 1
    assert value(text, "dispatch_seconds_count") == 1
    assert value(text, "tasks_max_concurrent") == 0
    assert value(text, "slots_free") is None
    worker.kill()
    worker = rig.start(env=SERVED)
    until(lambda: len(re.findall("metrics are served on", worker.log)) == 2, "the second worker's metrics")
    text = page(worker)
    assert value(text, "tasks_reattached_total", result="attached") == 1
    assert value(text, "tasks_active") == 1
    assert value(text, "tasks_claimed_total") == 0
    options["setup_command"] = ""
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(running)
    until(lambda: value(page(worker), "tasks_completed_total", result="succeeded") == 1, "the count of its end")
    assert value(page(worker), "tasks_active") == 0
    assert worker.stop() == 0
    rig.audit()


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
