"""A collector that misbehaves, is away, comes back: two lines for each outage, and nothing else notices."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading

import pytest

from oz_worker.observe import otel_thread
from oz_worker.observe.otel_session import Session
from oz_worker.observe.otel_thread import OtelThread
from oz_worker.observe.outage import SPOKEN, plain
from tests.conftest import Certificates
from tests.otlp.receiver import GrpcReceiver, HttpReceiver, Receiver, secured
from tests.rig import Rig, Worker, until

AWAY = "metrics cannot be delivered to"
BACK = "metrics are delivered to"
REASONS = {
    HttpReceiver.protocol: {
        "503": "503 Service Unavailable",
        "401": "correct OTEL_EXPORTER_OTLP_HEADERS",
        "500": "500 Internal Server Error",
        "302": "302 Found",
        "endless": "it answers without end",
        "reset": "Connection reset by peer",
        "hang": "no answer in time",
    },
    GrpcReceiver.protocol: {"503": "told to answer 503", "404": "told to answer 404", "hang": "no answer in time"},
}


def lines(worker: Worker, text: str) -> list[str]:
    """The lines of the log with *text* in them."""
    return [line for line in worker.log.splitlines() if text in line]


def wait_lines(worker: Worker, text: str, count: int) -> None:
    until(lambda: len(lines(worker, text)) == count, f"line {count} with {text!r}; the log:\n{worker.log}")


def wait_ready(worker: Worker) -> None:
    """The SDK is imported, which may take longer than the two seconds of a stop on a slow machine."""
    for name in ("otel-metrics", "otel-traces"):
        worker.wait_log(f"{name} is ready to deliver")


def wait_asked(receiver: Receiver, count: int) -> None:
    until(lambda: receiver.asked >= count, "another try")


def test_each_outage_costs_two_lines_and_no_task(rig: Rig, receiver: Receiver) -> None:
    """Every kind of misbehaviour, one after the other; then nobody listens, and somebody does again.

    At debug level, at which the SDK says more, and none of it may be taken for the reason.
    """
    rig.config["log_level"] = "debug"
    rig.secrets.append("t0ken-of-the-collector")
    rig.env |= receiver.environ() | {"OTEL_EXPORTER_OTLP_TIMEOUT": "700"}
    rig.env["OTEL_EXPORTER_OTLP_HEADERS"] = "x-key=t0ken-of-the-collector"
    worker = rig.start()
    kinds = REASONS[receiver.protocol]
    for number, (behaviour, reason) in enumerate(kinds.items(), start=1):
        receiver.behaviour = behaviour
        wait_lines(worker, AWAY, number)
        assert reason in lines(worker, AWAY)[-1], worker.log
        wait_asked(receiver, receiver.asked + 2)  # and tries on, silently
        rig.plane.wait_acknowledged(rig.submit("exit 0"))
        receiver.behaviour = "ok"
        wait_lines(worker, BACK, number)
    receiver.close()
    wait_lines(worker, AWAY, len(kinds) + 1)
    again = type(receiver)(receiver.port)
    wait_lines(worker, BACK, len(kinds) + 1)
    assert again.metrics()["oz_worker_tasks_completed_total"]
    assert worker.stop() == 0
    again.close()
    assert [line for line in lines(worker, "OpenTelemetry") if " DEBUG " not in line] == []
    assert len(lines(worker, "WARNING")) == len(kinds) + 1
    rig.audit()


@pytest.mark.parametrize("kind", [HttpReceiver, GrpcReceiver])
def test_a_certificate_that_is_not_trusted_is_an_outage_with_its_cure(
    rig: Rig, certificates: Certificates, kind: type[Receiver]
) -> None:
    receiver = secured(kind, certificates)
    rig.env |= receiver.environ("traces") | {"OTEL_EXPORTER_OTLP_TIMEOUT": "500"}
    worker = rig.start()
    rig.plane.wait_acknowledged(rig.submit("exit 0"))
    line = worker.wait_log("traces cannot be delivered.*")
    assert "set OTEL_EXPORTER_OTLP_CERTIFICATE to its authority" in line
    assert worker.stop() == 0
    receiver.close()
    rig.audit()


def test_what_is_refused_in_part_is_told_once(rig: Rig, receiver: Receiver) -> None:
    rig.env |= receiver.environ()
    receiver.behaviour = "partly"
    worker = rig.start()
    wait_lines(worker, "which does not take all of them (3 refused: over quota)", 1)
    wait_asked(receiver, receiver.asked + 2)
    receiver.behaviour = "ok"
    wait_lines(worker, "takes all metrics again", 1)
    assert worker.stop() == 0
    assert len(lines(worker, "WARNING")) == 1
    rig.audit()


def test_a_collector_that_asks_for_a_pause_gets_it(rig: Rig, http_receiver: Receiver) -> None:
    """Over the intervals, where the SDK would ask again at the next one."""
    rig.env |= http_receiver.environ() | {"OTEL_EXPORTER_OTLP_TIMEOUT": "1000"}
    http_receiver.behaviour, http_receiver.retry_after = "429", "3600"
    worker = rig.start("--log-level", "debug")
    wait_lines(worker, AWAY, 1)
    assert "429 Too Many Requests" in lines(worker, AWAY)[0]
    until(lambda: len(lines(worker, "the collector asked for a pause")) > 2, "exports that are not sent")
    assert worker.stop() == 0
    assert http_receiver.asked == 1
    rig.audit()


@pytest.mark.parametrize("behaviour", ["drip head", "drip body"])
def test_an_answer_that_comes_byte_by_byte_is_an_outage(rig: Rig, http_receiver: Receiver, behaviour: str) -> None:
    """The libraries' time limits begin anew with each byte: for them it would be well for ever."""
    rig.env |= http_receiver.environ("metrics traces") | {"OTEL_EXPORTER_OTLP_TIMEOUT": "500"}
    http_receiver.behaviour = behaviour
    worker = rig.start()
    rig.plane.wait_acknowledged(rig.submit("exit 0"))
    for signal_ in ("metrics", "traces"):
        wait_lines(worker, f"{signal_} cannot be delivered", 1)
        assert "no answer in time" in lines(worker, f"{signal_} cannot be delivered")[0]
    http_receiver.behaviour = "ok"
    wait_lines(worker, BACK, 1)
    assert worker.stop() == 0
    rig.audit()


def test_a_stop_does_not_wait_for_a_collector(rig: Rig, receiver: Receiver) -> None:
    """It hangs for a minute with both signals, where the SDK would wait for 10 to 60 s; two are allowed."""
    rig.env |= receiver.environ("metrics traces") | {"OTEL_EXPORTER_OTLP_TIMEOUT": "60000"}
    receiver.behaviour = "hang"
    worker = rig.start()
    rig.plane.wait_acknowledged(rig.submit("exit 0"))
    until(lambda: receiver.asked >= 2, "a request of each signal")
    assert worker.stop() == 0  # within the rig's 40 s
    assert lines(worker, AWAY) == []
    assert receiver.deliveries == []
    rig.audit()


@pytest.mark.parametrize("retrying", [False, True])
def test_the_last_export_to_a_collector_that_refuses_is_the_last_attempt(
    rig: Rig, receiver: Receiver, retrying: bool
) -> None:
    """With a minute for retries: it ends before the two seconds are over, or the lines would be missing.

    Before the first export, with nobody there; and in the pause between two attempts of an export.
    """
    rig.env |= receiver.environ("metrics traces")
    rig.env |= {"OTEL_EXPORTER_OTLP_TIMEOUT": "60000", "OTEL_BSP_SCHEDULE_DELAY": "3600000"}
    rig.env["OTEL_METRIC_EXPORT_INTERVAL"] = "100" if retrying else "3600000"
    receiver.behaviour = "503"
    if not retrying:
        receiver.close()
    worker = rig.start("--log-level", "debug")
    wait_ready(worker)
    rig.plane.wait_acknowledged(rig.submit("exit 0"))
    if retrying:
        worker.wait_log("OpenTelemetry: Transient")
    assert worker.stop() == 0
    for signal_ in ("metrics", "traces"):
        assert len(lines(worker, f"{signal_} cannot be delivered")) == 1, worker.log
        assert "The worker leaves without" in lines(worker, f"{signal_} cannot be delivered")[0]
    rig.audit()


def test_the_last_words_are_delivered(rig: Rig, receiver: Receiver) -> None:
    """Without waiting for the next interval; metrics also when nobody has chosen an exporter."""
    rig.env |= receiver.environ("traces")
    del rig.env["OTEL_METRICS_EXPORTER"]
    rig.env |= {"OTEL_METRIC_EXPORT_INTERVAL": "3600000", "OTEL_BSP_SCHEDULE_DELAY": "3600000"}
    worker = rig.start("--log-level", "debug")
    wait_ready(worker)
    rig.plane.wait_acknowledged(rig.submit("exit 0"))
    worker.send(signal.SIGTERM)
    assert worker.exit_code() == 0
    assert "oz_worker_task_duration_seconds" in receiver.metrics()
    assert len(receiver.spans()) == 1
    rig.audit()


def test_a_key_in_the_address_is_not_said_when_a_proxy_refuses() -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listening:

        def refuse() -> None:
            with listening.accept()[0] as connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")

        proxy = threading.Thread(target=refuse)
        proxy.start()
        session = Session(10.0)
        session.trust_env = False
        session.proxies["https"] = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with contextlib.closing(session), pytest.raises(OSError, match="t0ken"):  # or this would prove nothing
            session.post("https://collector.invalid/v1/metrics?key=t0ken", timeout=10)
        proxy.join()
    said = plain(SPOKEN.end().why)
    assert "403 Forbidden" in said
    assert "t0ken" not in said


class Slow:
    """An SDK that takes nothing until it is told to."""

    def __init__(self) -> None:
        self.let = threading.Event()
        self.taken: list[int] = []

    def take(self, item: int) -> None:
        self.taken.append(item)

    def look(self) -> None:
        """Nothing is late."""

    def close(self) -> None:
        self.let.wait(60)

    def silence(self) -> None:
        self.let.set()


@pytest.fixture
def slow() -> Slow:
    """One of it."""
    return Slow()


def test_what_waits_for_the_sdk_is_bounded(
    slow: Slow, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(otel_thread, "MOST_WAITING", 100)
    ready = threading.Event()

    def build() -> Slow:
        ready.wait(60)
        return slow

    thread: OtelThread[int] = OtelThread("otel-test", build, list[str]().append)
    thread.start()
    for number in range(250):
        thread.post(number)
    thread.finish()
    ready.set()
    until(lambda: len(slow.taken) == 100, "what was kept")
    thread.join(0.0)  # `close` hangs, and is left behind
    assert slow.taken == list(range(100))
    assert "150 things were not recorded" in caplog.text
