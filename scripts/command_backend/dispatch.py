"""Example `dispatch_command` of the command backend: hands each run to your own runtime over HTTP.

    backend:
      command:
        dispatch_command: python3 /opt/oz/dispatch.py
        cancel_command: python3 /opt/oz/cancel.py

The payload (version 1) comes on stdin; `transform` makes of it what your runtime wants: change that function. Only the
standard library. Nothing is written to disk and nothing of the payload is printed: it holds the run's credentials.

Environment: OZ_DISPATCH_URL where to POST; OZ_DISPATCH_AUTH_HEADER the value of `Authorization`, if one is needed;
OZ_DISPATCH_TIMEOUT_SECS (30). Exit: 0 taken over, 1 the payload or the runtime was at fault, 2 OZ_DISPATCH_URL missing.

What the runtime owes: run `command` with `env` inside `image` with the sidecars mounted, and afterwards
`oz harness-support --run-id RUN_ID report-shutdown`, which ends the run for the server.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from typing import Any


def transform(payload: dict[str, Any]) -> dict[str, Any]:
    """What is sent to the runtime. Change this to its liking."""
    task = payload.get("task") or {}
    definition = task.get("task_definition") or {}
    return {
        "run": {
            "run_id": payload["run_id"],
            "execution_id": payload.get("execution_id", ""),
            "image": payload.get("docker_image", ""),
            "command": payload["base_args"],
            "env": payload.get("env") or {},
            "sidecars": [
                {"image": one["image"], "path": one["mount_path"], "read_write": one.get("read_write", False)}
                for one in payload.get("sidecars") or []
            ],
        },
        "metadata": {
            "worker_id": payload.get("worker_id", ""),
            "server_root_url": payload.get("server_root_url", ""),
            "title": task.get("title", ""),
            "prompt": definition.get("prompt", ""),
        },
    }


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the run's credentials to wherever it points."""

    def redirect_request(self, *_: Any) -> None:
        return None


def post(url: str, run_id: str, content: dict[str, Any]) -> str:
    """POST *content* as JSON; "" when it was taken (any 2xx), else one sentence without anything secret in it."""
    headers = {"Content-Type": "application/json", "X-Oz-Run-Id": urllib.parse.quote(run_id)}
    authorization = os.environ.get("OZ_DISPATCH_AUTH_HEADER", "")
    if authorization:
        headers["Authorization"] = authorization
    where = urllib.parse.urlsplit(url)
    place = f"{where.scheme}://{where.hostname}{where.path}"  # a password in the URL stays out of the message
    if where.scheme not in ("http", "https"):
        return f"{place} is no http or https URL"
    try:
        timeout = float(os.environ.get("OZ_DISPATCH_TIMEOUT_SECS") or 30)
        request = urllib.request.Request(url, json.dumps(content).encode(), headers, method="POST")
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=timeout):
            return ""
    except urllib.error.HTTPError as error:
        return f"{place} answered {error.code}"
    except (OSError, ValueError) as error:
        return f"{place} cannot be used: {getattr(error, 'reason', error)}"


def main() -> int:
    """Read, transform, send."""
    url = os.environ.get("OZ_DISPATCH_URL", "")
    if not url:
        print("OZ_DISPATCH_URL is not set: give it the address of your runtime", file=sys.stderr)
        return 2
    try:
        payload = json.load(sys.stdin)
        content = transform(payload)
        run_id = str(payload["run_id"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        print(f"the payload on stdin is not one of version 1 ({type(error).__name__})", file=sys.stderr)
        return 1
    problem = post(url, run_id, content)
    if problem:
        print(f"dispatch of {run_id}: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
