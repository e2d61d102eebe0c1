"""Each standard variable by what a collector receives: exporters in this process, made as the worker makes them."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping

import pytest

from oz_worker import instruments, measuring
from oz_worker.measuring import Observers
from oz_worker.meters import Meters
from oz_worker.observe.otel_settings import BATCH
from oz_worker.redact import Secret
from oz_worker.settings import Settings
from tests.conftest import Certificates
from tests.otlp.receiver import GrpcReceiver, HttpReceiver, Receiver, secured
from tests.rig import until

HOURS = "3600000"
SPANS = 5
Export = Callable[..., None]
Begin = Callable[..., Observers]


@pytest.fixture
def begin(monkeypatch: pytest.MonkeyPatch) -> Begin:
    """Starts to measure under the variables that it is given: one observation, and as many spans as are wanted."""

    def begin(receiver: Receiver, *, spans: int = SPANS, plain: Mapping[str, str] = {}, **variables: str) -> Observers:
        environ = receiver.environ("metrics traces") | dict(plain)
        environ |= {"OTEL_METRIC_EXPORT_INTERVAL": HOURS, "OTEL_BSP_SCHEDULE_DELAY": HOURS}
        environ |= {f"OTEL_{name}": text for name, text in variables.items()}
        monkeypatch.setenv(BATCH, "1")  # so that it is put back, too: a default that does not fit is corrected
        monkeypatch.delenv(BATCH)
        for name, text in environ.items():
            monkeypatch.setenv(name, text)
        meters = Meters(instruments.CATALOGUE)
        observers = measuring.choose(Settings("w", Secret("k"), backend="direct"), "i-1", meters, environ)
        observers.exporters.start()
        assert observers.traces is not None
        observers.traces.start()
        meters.observe("oz_worker_task_duration_seconds", 2.5, result="succeeded")
        for number in range(spans):
            span = observers.tracer.begin(f"task-{number}", f"execution-{number}")
            span.event("task.claimed")
            span.event("task.failed", phase="backend", reason="agent_invocation")
            span.end()
        return observers

    return begin


@pytest.fixture
def export(begin: Begin) -> Export:
    """The same, and all of it delivered."""

    def export(*arguments: Any, **options: Any) -> None:
        end(begin(*arguments, **options))

    return export


def end(observers: Observers) -> None:
    """Not `stop`: its two seconds are a promise to operators, and no limit for a slow machine."""
    assert observers.traces is not None
    observers.traces.finish()
    observers.exporters.stop(60)
    observers.traces.join(60)


def sizes(receiver: Receiver) -> list[int]:
    """How many spans came with each delivery."""
    return [
        sum(len(scope.spans) for each in delivery.message.resource_spans for scope in each.scope_spans)
        for delivery in receiver.deliveries
        if hasattr(delivery.message, "resource_spans")
    ]


def resource(receiver: Receiver) -> dict[str, str]:
    """Of the last delivery of metrics."""
    message = next(each.message for each in receiver.deliveries if hasattr(each.message, "resource_metrics"))
    return {each.key: each.value.string_value for each in message.resource_metrics[0].resource.attributes}


def test_each_signal_goes_its_own_way(export: Export) -> None:
    """Protocol, endpoint, headers, compression and timeout of one signal win over the general ones."""
    general, own = HttpReceiver(), GrpcReceiver()
    export(
        general,
        EXPORTER_OTLP_HEADERS="x-general=1",
        EXPORTER_OTLP_COMPRESSION="gzip",
        EXPORTER_OTLP_TRACES_COMPRESSION="deflate",
        EXPORTER_OTLP_TIMEOUT="1",  # no collector is that fast
        EXPORTER_OTLP_TRACES_TIMEOUT="60000",
        EXPORTER_OTLP_METRICS_TIMEOUT="never",  # minor: the default is used
        EXPORTER_OTLP_METRICS_PROTOCOL="GRPC",
        EXPORTER_OTLP_METRICS_ENDPOINT=own.endpoint.removeprefix("http://"),
        EXPORTER_OTLP_METRICS_INSECURE="True",
        EXPORTER_OTLP_METRICS_HEADERS="X-Own=2%2C3",
        RESOURCE_ATTRIBUTES="service.name=unheard,team=blue",
        SERVICE_NAME="fleet",
    )
    assert [delivery.path for delivery in general.deliveries] == ["/v1/traces"]
    assert sizes(general) == [SPANS]
    assert general.deliveries[0].headers["x-general"] == "1"
    assert general.deliveries[0].headers["content-encoding"] == "deflate"
    assert "oz_worker_task_duration_seconds" in own.metrics()
    assert own.deliveries[0].headers["x-own"] == "2,3"
    assert "x-general" not in own.deliveries[0].headers
    found = resource(own)
    assert (found["service.name"], found["team"], found["service.instance.id"]) == ("fleet", "blue", "i-1")
    assert (found["telemetry.sdk.name"], found["telemetry.sdk.language"]) == ("opentelemetry", "python")
    assert found["telemetry.sdk.version"]
    general.close()
    own.close()


@pytest.mark.parametrize("kind", [HttpReceiver, GrpcReceiver])
def test_a_collector_that_wants_a_certificate_gets_it(
    export: Export, certificates: Certificates, tmp_path: Path, kind: type[Receiver]
) -> None:
    """Key and certificate in one file for metrics, in two for traces."""
    leaf = certificates.ca.issue_cert("worker.example")
    pem, key, both = (tmp_path / name for name in ("client.pem", "client.key", "both.pem"))
    leaf.cert_chain_pems[0].write_to_path(str(pem))
    leaf.private_key_pem.write_to_path(str(key))
    leaf.private_key_and_cert_chain_pem.write_to_path(str(both))
    receiver = secured(kind, certificates, mutual=True)
    export(
        receiver,
        EXPORTER_OTLP_CERTIFICATE=certificates.ca_file,
        EXPORTER_OTLP_CLIENT_CERTIFICATE=str(both),
        EXPORTER_OTLP_TRACES_CLIENT_CERTIFICATE=str(pem),
        EXPORTER_OTLP_TRACES_CLIENT_KEY=str(key),
    )
    assert sizes(receiver) == [SPANS]
    assert receiver.metrics()
    receiver.close()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"TRACES_SAMPLER": "always_off"}, []),
        ({"TRACES_SAMPLER": " TraceIdRatio ", "TRACES_SAMPLER_ARG": "0"}, []),
        ({"TRACES_SAMPLER": "parentbased_traceidratio", "TRACES_SAMPLER_ARG": "2"}, [SPANS]),
        ({"TRACES_SAMPLER": "", "BSP_MAX_EXPORT_BATCH_SIZE": "2"}, [2, 2, 1]),
    ],
)
def test_samplers_and_batches(
    export: Export, http_receiver: Receiver, variables: dict[str, str], expected: list[int]
) -> None:
    export(http_receiver, **variables)
    assert sorted(sizes(http_receiver), reverse=True) == expected
    assert http_receiver.metrics()


def test_spans_wait_in_a_bounded_queue(begin: Begin, http_receiver: Receiver) -> None:
    """While the collector is away; a queue below the default of a batch, which would cost the exporter."""
    http_receiver.behaviour = "hang"
    observers = begin(
        http_receiver, spans=2000, BSP_MAX_QUEUE_SIZE="50", BSP_SCHEDULE_DELAY="50", EXPORTER_OTLP_TRACES_TIMEOUT="2000"
    )
    until(lambda: http_receiver.asked, "an export that hangs")
    http_receiver.behaviour = "ok"
    until(lambda: sizes(http_receiver), "a delivery")
    end(observers)
    assert max(sizes(http_receiver)) <= 50
    assert sum(sizes(http_receiver)) < 1000
    newest = http_receiver.spans()[-1]
    assert newest.attributes[0].value.string_value == "task-1999"


@pytest.mark.parametrize("kind", [HttpReceiver, GrpcReceiver])
def test_time_limits_of_exports(export: Export, caplog: pytest.LogCaptureFixture, kind: type[Receiver]) -> None:
    """Those that the SDK keeps to nowhere."""
    receiver = kind()
    receiver.behaviour = "hang"
    export(receiver, EXPORTER_OTLP_TIMEOUT="600000", METRIC_EXPORT_TIMEOUT="300", BSP_EXPORT_TIMEOUT="400")
    said = [record.getMessage() for record in caplog.records if record.name.startswith("oz_worker")]
    assert [sum(line.startswith(f"{signal} cannot be") for line in said) for signal in ("metrics", "traces")] == [1, 1]
    assert all("no answer in time" in line for line in said), said
    receiver.close()


def test_limits_of_spans_and_the_form_of_histograms(export: Export, http_receiver: Receiver) -> None:
    export(
        http_receiver,
        SPAN_EVENT_COUNT_LIMIT="2",
        EVENT_ATTRIBUTE_COUNT_LIMIT="1",
        ATTRIBUTE_VALUE_LENGTH_LIMIT="6",
        ATTRIBUTE_COUNT_LIMIT="9",
        SPAN_ATTRIBUTE_COUNT_LIMIT="1",
        SPAN_LINK_COUNT_LIMIT="",  # unset, which would be without limit for the SDK
        EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION="BASE2_exponential_bucket_histogram",
        EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE="LowMemory",
        METRICS_EXEMPLAR_FILTER="Always_Off",
    )
    span: Any = http_receiver.spans()[0]
    assert [event.name for event in span.events] == ["task.claimed", "task.failed"]
    assert [len(event.attributes) for event in span.events] == [0, 1]
    assert [(each.key, each.value.string_value) for each in span.attributes] == [("task.execution_id", "execut")]
    duration = http_receiver.metrics()["oz_worker_task_duration_seconds"]
    assert duration.exponential_histogram.data_points[0].count == 1
    assert duration.exponential_histogram.aggregation_temporality == 1  # delta
    assert http_receiver.metrics()["oz_worker_tasks_claimed_total"].sum.aggregation_temporality == 2


@contextlib.contextmanager
def tunnel(port: int, heads: list[bytes]) -> Iterator[str]:
    """A proxy that takes every CONNECT to *port* of this machine; its address with a user."""
    ends: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def copy(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)

    def serve(listening: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listening.accept()
                ends.append(near)
                heads.append(near.recv(65536))
                far = socket.create_connection(("127.0.0.1", port))
                ends.append(far)
                near.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                for pair in ((near, far), (far, near)):
                    threads.append(threading.Thread(target=copy, args=pair, daemon=True))
                    threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threads.append(threading.Thread(target=serve, args=(listening,), daemon=True))
        threads[0].start()
        yield f"http://me:pass@127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
        for end in ends:
            end.close()


@pytest.mark.parametrize("kind", [HttpReceiver, GrpcReceiver])
def test_the_workers_rule_for_proxies(export: Export, certificates: Certificates, kind: type[Receiver]) -> None:
    """The upper-case variable for what is elsewhere, and none for loopback: gRPC alone has it the other way round."""
    receiver, heads = secured(kind, certificates), list[bytes]()
    with tunnel(receiver.port, heads) as address:
        export(
            receiver,
            EXPORTER_OTLP_CERTIFICATE=certificates.ca_file,
            EXPORTER_OTLP_METRICS_ENDPOINT="https://collector.example/v1/metrics",
            plain={"HTTPS_PROXY": address},
        )
    assert [head.split()[:2] for head in heads] == [[b"CONNECT", b"collector.example:443"]]
    assert b"proxy-authorization: basic bwu6cgfzcw==" in heads[0].lower()
    assert receiver.metrics()
    assert sizes(receiver) == [SPANS]
    receiver.close()
