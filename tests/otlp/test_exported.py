"""What a worker sends to a collector: metrics and traces as the existing worker's, over HTTP and gRPC, with TLS."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from opentelemetry.proto.metrics.v1 import metrics_pb2

from oz_worker.instruments import CATALOGUE, PHASES, REASONS, SCOPE
from oz_worker.meters import Instrument, Kind
from tests.conftest import Certificates
from tests.otlp.receiver import GrpcReceiver, HttpReceiver, Receiver, secured
from tests.rig import SAFETY, Rig, until

WAIT = "echo up > $HOME/up; while [ ! -e $HOME/go ]; do sleep 0.05; done"
DELTA, CUMULATIVE = metrics_pb2.AGGREGATION_TEMPORALITY_DELTA, metrics_pb2.AGGREGATION_TEMPORALITY_CUMULATIVE
OFF_BY_LACK = {"oz_worker_slots_free", "oz_worker_image_pull_seconds"}
"""Without a limit of tasks and without pulls there is nothing to say."""


def attributes(owner: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in owner.attributes}


def points(metric: Any) -> list[Any]:
    return list(getattr(metric, metric.WhichOneof("data")).data_points)


def value(metric: Any, **labels: str) -> float:
    """The value of one series."""
    found = [point for point in points(metric) if attributes(point) == labels]
    assert len(found) == 1, (metric.name, labels)
    return float(getattr(found[0], found[0].WhichOneof("value")))


def results(receiver: Receiver) -> set[str]:
    """Of the tasks whose durations have been told."""
    told = [metric for metric in receiver.told() if metric.name == "oz_worker_task_duration_seconds"]
    return {attributes(point)["result"] for metric in told for point in points(metric)}


def check_shape(metric: Any, instrument: Instrument, counters: int) -> None:
    """Kind, unit, help, labels, temporality and kind of number of what is in the catalogue."""
    assert (metric.unit, metric.description) == (instrument.unit, instrument.help)
    kind = metric.WhichOneof("data")
    assert kind == {Kind.GAUGE: "gauge", Kind.HISTOGRAM: "histogram"}.get(instrument.kind, "sum")
    if kind == "sum":
        counting = instrument.kind is Kind.COUNTER
        assert metric.sum.is_monotonic == counting
        assert metric.sum.aggregation_temporality == (counters if counting else CUMULATIVE)
    for point in points(metric):
        assert set(attributes(point)) == set(instrument.labels)
        if kind == "histogram":
            assert tuple(point.explicit_bounds) == instrument.bounds
        else:
            assert point.WhichOneof("value") == ("as_double" if instrument.unit else "as_int")


@pytest.mark.parametrize(
    ("kind", "preference", "counters"), [(HttpReceiver, "cumulative", CUMULATIVE), (GrpcReceiver, "delta", DELTA)]
)
def test_metrics_are_those_of_the_existing_worker(
    rig: Rig, certificates: Certificates, kind: type[Receiver], preference: str, counters: int
) -> None:
    """Over TLS: by HTTP the worker's own `ca_file` is believed, by gRPC the certificate of the variables."""
    receiver = secured(kind, certificates)
    if kind is HttpReceiver:
        rig.config["ca_file"] = certificates.ca_file
        rig.env["REQUESTS_CA_BUNDLE"] = str(rig.place / "config.yaml")  # believed by nobody who was told better
    else:
        rig.env["OTEL_EXPORTER_OTLP_METRICS_CERTIFICATE"] = certificates.ca_file
    rig.secrets.append("s3cret,t0ken")
    rig.env |= receiver.environ() | {
        "OTEL_EXPORTER_OTLP_HEADERS": "x-unused=1",
        "OTEL_EXPORTER_OTLP_METRICS_HEADERS": "Authorization=Bearer s3cret%2Ct0ken, X-Scope = team-a,",
        "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
        "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": preference,
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment=pro%20d,worker.id=by-hand",
    }
    worker = rig.start("--log-level", "debug")
    tasks = [rig.submit("exit 0"), rig.submit("exit 3")]
    rig.plane.wait_acknowledged(*tasks)
    until(lambda: results(receiver) == {"succeeded", "failed"}, "both tasks in the histogram")
    assert worker.stop() == 0
    newest = receiver.deliveries[-1]
    metrics = receiver.metrics()
    scope = newest.message.resource_metrics[0].scope_metrics[0].scope
    assert (scope.name, scope.version) == (SCOPE, "")
    assert set(metrics) == {each.name for each in CATALOGUE} - OFF_BY_LACK
    for each in CATALOGUE:
        if each.name in metrics:
            check_shape(metrics[each.name], each, counters)
    failures = metrics["oz_worker_task_failures_total"]
    assert {tuple(sorted(attributes(point).items())) for point in points(failures)} == {
        (("phase", phase), ("reason", reason)) for phase in PHASES for reason in REASONS
    }
    told = [metric for metric in receiver.told() if metric.name == failures.name]
    counted = [value(metric, reason="agent_invocation", phase="backend") for metric in told]
    assert (sum(counted) if counters == DELTA else counted[-1]) == 1
    assert value(metrics["oz_worker_connected"]) in (0, 1)
    assert value(metrics["oz_worker_info"], version="0.1.0", backend="direct", worker_id="rig-worker") == 1
    resource = attributes(newest.message.resource_metrics[0].resource)
    assert {name: text for name, text in resource.items() if not name.startswith("telemetry.")} == {
        "service.name": "oz-agent-worker",
        "service.version": "0.1.0",
        "service.instance.id": rig.instance_dirs()[0].name,
        "worker.id": "by-hand",
        "worker.backend": "direct",
        "deployment.environment": "pro d",
    }
    assert newest.headers["authorization"] == "Bearer s3cret,t0ken"
    assert newest.headers["x-scope"] == "team-a"
    assert "x-unused" not in newest.headers
    if kind is HttpReceiver:
        assert (newest.path, newest.headers["content-encoding"]) == ("/v1/metrics", "gzip")
    receiver.close()
    rig.audit()


def span_of(receiver: Receiver, task: Any) -> tuple[dict[str, Any], list[str], Any]:
    """The one span of a task: attributes, names of its events, the span."""
    found = until(lambda: [each for each in receiver.spans() if attributes(each)["task.id"] == task.task_id], "a span")
    assert len(found) == 1
    assert found[0].name == "oz_worker.task"
    assert not found[0].parent_span_id
    return attributes(found[0]), [event.name for event in found[0].events], found[0]


BEGUN = ["task.assigned", "task.claimed", "task.started", "backend.started"]


def test_each_assignment_is_one_span(rig: Rig, receiver: Receiver) -> None:
    """One for each way that an assignment can go, and one line for an exporter that nobody knows."""
    rig.config["max_concurrent_tasks"] = 1
    rig.config["backend"]["direct"]["teardown_command"] = "test ! -e $HOME/broken"
    rig.env |= receiver.environ("traces") | {"OTEL_TRACES_EXPORTER": "console,zipkin,otlp"}
    worker = rig.start()
    assert len(worker.wait_log("OTEL_TRACES_EXPORTER names 'zipkin', which")) > 0
    good = rig.submit("exit 0", task_extra={"title": "Mend the roof"})
    rig.plane.wait_acknowledged(good)
    bad = rig.submit("touch $HOME/broken; exit 3")
    rig.plane.wait_acknowledged(bad)
    slow = rig.submit(f"rm $HOME/broken; {WAIT}")
    running = f"SELECT count(*) FROM tasks WHERE task_id = '{slow.task_id}' AND state = 'running'"
    until(lambda: rig.query(running) == [(1,)], "the row")
    refused = rig.submit("exit 0", requeue=False)
    rig.plane.wait_for(lambda: refused.state == "rejected", SAFETY, "the refusal")
    rig.plane.redeliver(slow)  # no assignment of its own
    rig.plane.cancel(slow)
    rig.plane.wait_acknowledged(slow)
    broken = rig.submit(env_vars={"FINE": "no\0t at all"})
    rig.plane.wait_acknowledged(broken)

    about, events, span = span_of(receiver, good)
    expected = {"task.id": good.task_id, "task.execution_id": good.execution_id, "task.title": "Mend the roof"}
    assert (about, events) == (expected, [*BEGUN, "task.completed"])
    assert span.start_time_unix_nano < span.events[-1].time_unix_nano <= span.end_time_unix_nano
    about, events, span = span_of(receiver, bad)
    assert events == [*BEGUN, "cleanup.failed", "task.failed"]
    assert attributes(span.events[-2]) == {"phase": "cleanup", "reason": "teardown_command"}
    assert attributes(span.events[-1]) == {"phase": "backend", "reason": "agent_invocation", "exit_code": 3}
    assert (span.status.code, span.status.message) == (2, "agent_invocation")
    assert span_of(receiver, slow)[1] == [*BEGUN, "task.cancellation_requested", "task.cancelled"]
    about, events, span = span_of(receiver, refused)
    assert (events, attributes(span.events[-1])) == (["task.assigned", "task.rejected"], {"reason": "at_capacity"})
    about, events, span = span_of(receiver, broken)
    assert (events, attributes(span.events[-1])["phase"]) == (["task.assigned", "task.failed"], "assignment")
    assert worker.stop() == 0
    assert worker.log.count('"name": "oz_worker.task"') == len(receiver.spans()) == 5
    rig.audit()


def test_a_hand_over_ends_the_span(rig: Rig, http_receiver: Receiver) -> None:
    rig.env |= http_receiver.environ("traces")
    rig.config["backend"] = {"command": {"dispatch_command": "cat >/dev/null"}}
    worker = rig.start()
    task = rig.submit()
    assert span_of(http_receiver, task)[1] == [*BEGUN, "task.dispatched"]
    assert worker.stop() == 0
    rig.audit()


def test_a_cancel_command_that_fails_for_a_hand_over_that_was_cut_short_is_counted_and_traced(
    rig: Rig, http_receiver: Receiver
) -> None:
    """Nobody knows whether a late dispatcher has started the agent; and a server may cancel while the worker stops."""
    rig.env |= http_receiver.environ("metrics traces")
    dispatch = f"cat >/dev/null; [ $OZ_RUN_ID = late ] && exec sleep 1000; {WAIT}"
    command = {"dispatch_command": dispatch, "cancel_command": "echo no way to $OZ_RUN_ID; exit 7"}
    rig.config["backend"] = {"command": {**command, "dispatch_timeout": "6s"}}
    worker = rig.start()
    late = rig.submit(task_id="late")
    rig.plane.wait_acknowledged(late)
    assert late.terminal.reason == "dispatch_timeout"
    assert "cancel_command ended with exit code 7: no way to late" in late.terminal.message
    stopped = rig.submit(task_id="stopped")
    until((rig.place / "up").exists, "the dispatcher")
    worker.send(signal.SIGTERM)
    worker.wait_log("TERM: taking no new tasks")
    rig.plane.cancel(stopped)
    until(lambda: rig.query("SELECT 1 FROM tasks WHERE state = 'cancelling'"), "the cancel")
    worker.wait_stacks(r"^dispatch-")  # it looked once more whether it can leave, and does not
    (rig.place / "go").touch()
    assert worker.exit_code() == 0
    assert stopped.state == "cancelled"
    for task, end in ((late, "task.failed"), (stopped, "task.cancelled")):
        _about, events, span = span_of(http_receiver, task)
        assert [name for name in events if name.startswith("cancel.")] == ["cancel.failed"]
        assert events[-1] == end
        failed = span.events[events.index("cancel.failed")]
        assert attributes(failed) == {"phase": "cleanup", "reason": "cancel_command"}
    failures = [each for each in http_receiver.told() if each.name == "oz_worker_task_failures_total"]
    assert value(failures[-1], phase="cleanup", reason="cancel_command") == 2
    rig.audit()


def test_a_task_that_outlives_its_worker_has_one_span(rig: Rig, http_receiver: Receiver) -> None:
    """Sent through a proxy, by the worker's rule for proxies."""
    elsewhere = "http://collector.invalid:4318/v1/traces"
    rig.env |= http_receiver.environ("traces") | {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": elsewhere}
    rig.env["http_proxy"] = http_receiver.endpoint
    worker = rig.start()
    task = rig.submit(f"{WAIT}; exit 3", task_extra={"title": "Mend the roof"})
    until((rig.place / "up").exists, "the agent")
    until(lambda: rig.query("SELECT state FROM tasks") == [("running",)], "the row")
    accepted = rig.query("SELECT accepted_at FROM tasks")[0][0]
    worker.send(signal.SIGKILL)
    worker.exit_code()
    worker = rig.start()
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(task)
    about, events, span = span_of(http_receiver, task)
    assert about == {"task.id": task.task_id, "task.execution_id": task.execution_id, "task.reattached": True}
    assert events == ["task.assigned", "task.failed"]
    assert abs(span.start_time_unix_nano / 1e9 - accepted) < 0.001
    assert worker.stop() == 0
    assert len(http_receiver.spans()) == 1
    assert http_receiver.deliveries[0].path == elsewhere
    rig.audit()
