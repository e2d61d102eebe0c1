"""How the HTTP exporters ask: a session that bounds the answer and tells `outage` why a delivery failed."""

from __future__ import annotations

import io
from typing import Any

import requests

from oz_worker.observe.outage import SPOKEN
from oz_worker.timing import Deadline

MOST_BYTES = 64 * 1024
"""Of an answer; a collector's has a few. Whatever else the endpoint belongs to must not fill the memory."""
PIECE = 64
"""So many bytes may each take as long as the time limit."""


class Session(requests.Session):
    """Used by one exporting thread. *seconds*: how long an answer may take to come in once it has begun."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    def request(self, *arguments: Any, **options: Any) -> requests.Response:
        """As in requests, but a redirect is never followed (it could carry the headers elsewhere) and is an error."""
        options.update(allow_redirects=False, stream=True)
        try:
            response = super().request(*arguments, **options)
            body = self._body(response)
        except Exception as error:
            SPOKEN.hear(str(error))
            raise
        response.raw = io.BytesIO(body)  # for whoever reads the answer again
        if response.status_code >= 300:
            SPOKEN.hear(f"{response.status_code} {response.reason}")
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
