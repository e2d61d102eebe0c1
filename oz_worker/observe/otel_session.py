"""How the HTTP exporters ask: a session that bounds the answer and tells `outage` why a delivery failed."""

from __future__ import annotations

import contextlib
import io
import time
from typing import Any

import requests
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from oz_worker.observe.outage import SPOKEN
from oz_worker.timing import Deadline

MOST_BYTES = 64 * 1024
"""Of an answer; a collector's has a few. Whatever else the endpoint belongs to must not fill the memory."""
PIECE = 64
"""So many bytes may each take as long as the time limit."""
LONGEST_WAIT = 300.0
"""Of what a `Retry-After` asks for: more than that is not meant."""


class Session(requests.Session):
    """Used by one exporting thread. *seconds*: how long an answer may take to come in once it has begun."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds
        self._not_before = 0.0
        self._told = ""

    def request(self, *arguments: Any, **options: Any) -> requests.Response:
        """As in requests, but a redirect is never followed (it could carry the headers elsewhere) and is an error.

        So is asking again before the time that `Retry-After` gave.
        """
        if time.monotonic() < self._not_before:
            SPOKEN.hear(self._told)
            raise OSError("the collector asked for a pause")
        options.update(allow_redirects=False, stream=True)
        try:
            response = super().request(*arguments, **options)
            body = self._body(response)
        except Exception as error:
            SPOKEN.hear(str(error))
            raise
        response.raw = io.BytesIO(body)  # for whoever reads the answer again
        if response.status_code >= 300:
            self._told = f"{response.status_code} {response.reason}"
            SPOKEN.hear(self._told)
            self._pause(response)
        elif body:
            _look_for_refused(body)
        if 300 <= response.status_code < 400:  # a login page, say, which the SDK would take for a delivery
            raise OSError("a redirect, which is not followed")
        return response

    def _body(self, response: requests.Response) -> bytes:
        """In small pieces: the library's own time limit begins anew with each byte. Raises OSError."""
        body, deadline = bytearray(), Deadline(self._seconds)
        while piece := response.raw.read(PIECE, decode_content=True):
            body += piece
            if len(body) > MOST_BYTES:
                response.close()
                raise OSError("it answers without end; is that a collector?")
            if deadline.passed():
                response.close()
                raise OSError("its answer timed out")
        return bytes(body)

    def _pause(self, response: requests.Response) -> None:
        """What the collector asks for, in seconds; the SDK keeps to it within one export only, and so may to a date."""
        wanted = response.headers.get("Retry-After", "").strip()
        if response.status_code in (429, 503) and wanted.isascii() and wanted.isdigit():
            # The SDK waits for it too; it must not come back a moment before.
            self._not_before = time.monotonic() + min(float(wanted), LONGEST_WAIT) - 0.1


def _look_for_refused(body: bytes) -> None:
    """Whether a part was refused; the answers for both signals have the same form."""
    with contextlib.suppress(DecodeError):
        partly = ExportTraceServiceResponse.FromString(body).partial_success
        SPOKEN.hear_partly(partly.rejected_spans, partly.error_message)
