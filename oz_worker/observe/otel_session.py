"""How the HTTP exporters ask: a session that tells `outage` in plain words why a delivery failed."""

from __future__ import annotations

from typing import Any

import requests

from oz_worker.observe.outage import SPOKEN


class Session(requests.Session):
    """Used by one exporting thread."""

    def request(self, *arguments: Any, **options: Any) -> requests.Response:
        """As in requests, but a redirect is never followed (it could carry the headers elsewhere) and is an error."""
        options["allow_redirects"] = False
        try:
            response = super().request(*arguments, **options)
        except Exception as error:
            SPOKEN.hear(str(error))
            raise
        if response.status_code >= 300:
            SPOKEN.hear(f"{response.status_code} {response.reason}")
        if 300 <= response.status_code < 400:  # a login page, say, which the SDK would take for a delivery
            raise OSError("a redirect, which is not followed")
        return response
