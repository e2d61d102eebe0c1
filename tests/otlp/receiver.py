"""A collector for OTLP over HTTP and gRPC on the official messages, which can misbehave on purpose."""

from __future__ import annotations

import gzip
import http.server
import os
import socket
import ssl
import struct
import threading
import time
import zlib
from concurrent import futures
from typing import Any, Callable, Mapping, NamedTuple

import grpc
from google.protobuf.message import Message
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as metrics_pb2
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc as metrics_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as trace_pb2
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as trace_grpc

from tests.conftest import Certificates, server_context

METRICS_ANSWER = metrics_pb2.ExportMetricsServiceResponse
TRACES_ANSWER = trace_pb2.ExportTraceServiceResponse
LONG = 60.0
"""Seconds until something that hangs on purpose gives up, should nobody close the receiver."""


TAKES = ("ok", "partly")
DRIPPING = {
    "drip head": b"HTTP/1.1 200 OK\r\nX-Drip: ",
    "drip body": b"HTTP/1.1 200 OK\r\nContent-Length: 60000\r\n\r\n",
}
"""What comes at once of an answer the rest of which comes byte by byte."""


class Delivery(NamedTuple):
    """One request that was accepted."""

    path: str  # gRPC: "" for both signals
    headers: Mapping[str, str]  # lower-case names
    message: Any
    size: int  # bytes on the wire, HTTP only


class Receiver:
    """`behaviour`: ok | partly | hang | a status such as 503; over HTTP also reset | endless | drip head | drip body.

    `retry_after` goes with a status over HTTP.

    `deliveries` grow; read them at any time.
    """

    protocol = ""
    port: int

    def __init__(self, port: int = 0) -> None:
        """*port*: 0 for a free one."""
        self.behaviour = "ok"
        self.retry_after = ""
        self.deliveries: list[Delivery] = []
        self.asked = 0  # requests begun, whatever became of them
        self._released = threading.Event()
        self._lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        """Where it listens, as OTEL_EXPORTER_OTLP_ENDPOINT has it."""
        raise NotImplementedError

    def environ(self, signals: str = "metrics") -> dict[str, str]:
        """What makes a worker export to it, often."""
        found = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": self.endpoint,
            "OTEL_EXPORTER_OTLP_PROTOCOL": self.protocol,
            "OTEL_METRIC_EXPORT_INTERVAL": "300",
            "OTEL_BSP_SCHEDULE_DELAY": "200",
            "OTEL_EXPORTER_OTLP_TIMEOUT": "3000",
        }
        for signal in ("metrics", "traces"):
            found[f"OTEL_{signal.upper()}_EXPORTER"] = "otlp" if signal in signals else "none"
        return found

    def take(self, delivery: Delivery) -> None:
        """Keep what was delivered."""
        self.deliveries.append(delivery)

    def begun(self) -> str:
        """A request came in; how it is to be met. Hangs here when told to."""
        with self._lock:
            self.asked += 1
        if self.behaviour == "hang":
            self._released.wait(LONG)
        return self.behaviour

    def told(self) -> list[Any]:
        """Every metric of every delivery, oldest first."""
        return [
            metric
            for delivery in list(self.deliveries)
            if isinstance(delivery.message, metrics_pb2.ExportMetricsServiceRequest)
            for resource in delivery.message.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        ]

    def metrics(self) -> dict[str, Any]:
        """Each metric as it was last told, by name; what has nothing new is not told again under `delta`."""
        return {metric.name: metric for metric in self.told()}

    def spans(self) -> list[Any]:
        """All spans so far."""
        return [
            span
            for delivery in list(self.deliveries)
            if isinstance(delivery.message, trace_pb2.ExportTraceServiceRequest)
            for resource in delivery.message.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def close(self) -> None:
        """Let go of who hangs, and of the port."""
        self._released.set()


class HttpReceiver(Receiver):
    """OTLP over HTTP with protobuf bodies."""

    protocol = "http/protobuf"

    def __init__(self, port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(port)
        receiver = self
        self._tls = tls is not None

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                behaviour = receiver.begun()
                if behaviour in ("reset", "hang"):
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    os.close(self.connection.detach())
                    self.close_connection = True
                    return
                if behaviour == "endless":
                    self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
                    while True:  # until the worker has enough, which ends in an error here
                        self.wfile.write(bytes(65536))
                if behaviour.startswith("drip"):
                    self.wfile.write(DRIPPING[behaviour])
                    while receiver.behaviour == behaviour:  # or until the worker has enough, which ends in an error
                        self.wfile.write(b"a")
                        time.sleep(0.02)
                    self.close_connection = True
                    return
                answer = b""
                if behaviour in TAKES:
                    receiver.take(_http_delivery(self.path, dict(self.headers), body))
                    kind = TRACES_ANSWER if "trace" in self.path else METRICS_ANSWER
                    answer = _answered(kind, behaviour).SerializeToString()
                self.send_response(200 if behaviour in TAKES else int(behaviour))
                self.send_header("Content-Length", str(len(answer)))
                if receiver.retry_after:
                    self.send_header("Retry-After", receiver.retry_after)
                if behaviour.startswith("3"):
                    self.send_header("Location", f"{receiver.endpoint}/login")
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_arguments: Any) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True

            def handle_error(self, *_arguments: Any) -> None:
                pass  # a worker that left in the middle is what some tests are about

        self._server = Server(("127.0.0.1", port), Handler)
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        """Where it listens."""
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    def close(self) -> None:
        """Stop listening, and cut the connections that are kept open."""
        self.behaviour = "reset"
        super().close()
        self._server.shutdown()
        self._server.server_close()


def _http_delivery(path: str, headers: Mapping[str, str], body: bytes) -> Delivery:
    lower = {name.lower(): value for name, value in headers.items()}
    unpack: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.decompress, "deflate": zlib.decompress}
    raw = unpack.get(lower.get("content-encoding", ""), bytes)(body)
    kind: type[Message] = (
        trace_pb2.ExportTraceServiceRequest if "trace" in path else metrics_pb2.ExportMetricsServiceRequest
    )
    message = kind()
    message.ParseFromString(raw)
    return Delivery(path, lower, message, len(body))


class GrpcReceiver(Receiver):
    """OTLP over gRPC."""

    protocol = "grpc"

    def __init__(self, port: int = 0, credentials: grpc.ServerCredentials | None = None) -> None:
        super().__init__(port)
        self._secure = credentials is not None
        self._server = grpc.server(futures.ThreadPoolExecutor(max_workers=8))
        for add, base, answer in (
            (metrics_grpc.add_MetricsServiceServicer_to_server, metrics_grpc.MetricsServiceServicer, METRICS_ANSWER),
            (trace_grpc.add_TraceServiceServicer_to_server, trace_grpc.TraceServiceServicer, TRACES_ANSWER),
        ):
            add(_servicer(base, self, answer), self._server)  # type: ignore[no-untyped-call]
        place = f"127.0.0.1:{port}"
        self.port = (
            self._server.add_secure_port(place, credentials) if credentials else self._server.add_insecure_port(place)
        )
        self._server.start()

    @property
    def endpoint(self) -> str:
        """Where it listens."""
        return f"{'https' if self._secure else 'http'}://localhost:{self.port}"

    def close(self) -> None:
        """Stop listening."""
        super().close()
        self._server.stop(0).wait(LONG)


def secured(kind: type[Receiver], certificates: Certificates, *, mutual: bool = False) -> Receiver:
    """A receiver of either kind with a certificate of an authority of our own. *mutual*: it wants one of the worker."""
    leaf = certificates.ca.issue_cert("localhost", "127.0.0.1", "collector.example")
    if kind is HttpReceiver:
        context = server_context(leaf)
        if mutual:
            context.verify_mode = ssl.CERT_REQUIRED
            certificates.ca.configure_trust(context)
        return HttpReceiver(tls=context)
    chain = b"".join(blob.bytes() for blob in leaf.cert_chain_pems)
    authority = certificates.ca.cert_pem.bytes() if mutual else None
    pair = (leaf.private_key_pem.bytes(), chain)
    return GrpcReceiver(credentials=grpc.ssl_server_credentials([pair], authority, mutual))


def _servicer(base: type, receiver: Receiver, answer: Callable[[], Message]) -> Any:
    class Servicer(base):  # type: ignore[misc]
        def Export(self, request: Any, context: Any) -> Any:
            behaviour = receiver.begun()
            if behaviour not in TAKES:
                code = {"404": grpc.StatusCode.UNIMPLEMENTED}.get(behaviour, grpc.StatusCode.UNAVAILABLE)
                context.abort(code, f"told to answer {behaviour}")
            receiver.take(Delivery("", dict(context.invocation_metadata()), request, 0))
            return _answered(answer, behaviour)

    return Servicer()


def _answered(kind: Callable[[], Any], behaviour: str) -> Any:
    answer = kind()
    if behaviour == "partly":
        name = "rejected_data_points" if isinstance(answer, METRICS_ANSWER) else "rejected_spans"
        setattr(answer.partial_success, name, 3)
        answer.partial_success.error_message = "over quota"
    return answer
