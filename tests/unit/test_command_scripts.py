from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, Iterator

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts" / "command_backend"
SECRET = "task-key-never-shown"
PAYLOAD = {
    "version": 1,
    "run_id": "run-1",
    "execution_id": "exec-1",
    "server_root_url": "https://example.org",
    "worker_id": "w",
    "docker_image": "debian:12",
    "base_args": ["agent", "run", "--task-id", "run-1"],
    "env": {"WARP_API_KEY": SECRET},
    "sidecars": [{"image": "side:1", "mount_path": "/agent", "read_write": False}],
    "task": {"id": "run-1", "title": "a title", "task_definition": {"prompt": "do it"}},
}


class Runtime(HTTPServer):
    """A runtime that takes runs over, or answers as told."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status = 202
        self.seen: list[tuple[dict[str, str], Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/runs"


class _Handler(BaseHTTPRequestHandler):
    server: Runtime

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append((dict(self.headers), json.loads(body)))
        self.send_response(self.server.status)
        if self.server.status == 302:
            self.send_header("Location", self.server.url)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    with Runtime() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join(10)


def run(script: str, stdin: str = "", **environment: str) -> tuple[int, str]:
    ended = subprocess.run(
        [sys.executable, str(SCRIPTS / script)],
        input=stdin,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in ended.stderr
    assert SECRET not in ended.stdout + ended.stderr
    return ended.returncode, ended.stderr


def test_a_run_is_posted_as_the_runtime_wants_it(runtime: Runtime) -> None:
    code, _ = run(
        "dispatch.py", json.dumps(PAYLOAD), OZ_DISPATCH_URL=runtime.url, OZ_DISPATCH_AUTH_HEADER="Bearer runtime"
    )
    assert code == 0
    [(headers, body)] = runtime.seen
    assert (headers["Authorization"], headers["X-Oz-Run-Id"]) == ("Bearer runtime", "run-1")
    assert body["run"]["command"] == PAYLOAD["base_args"]
    assert body["run"]["sidecars"] == [{"image": "side:1", "path": "/agent", "read_write": False}]
    assert body["run"]["env"] == {"WARP_API_KEY": SECRET}
    assert body["metadata"] == {
        "worker_id": "w",
        "server_root_url": "https://example.org",
        "title": "a title",
        "prompt": "do it",
    }


def test_no_sidecars_and_no_task_are_no_fault(runtime: Runtime) -> None:
    bare = {**PAYLOAD, "sidecars": None, "task": None}
    assert run("dispatch.py", json.dumps(bare), OZ_DISPATCH_URL=runtime.url)[0] == 0


@pytest.mark.parametrize("status", [302, 401, 500])
def test_what_is_not_taken_over_is_a_failure_that_names_the_answer(runtime: Runtime, status: int) -> None:
    runtime.status = status
    code, said = run("dispatch.py", json.dumps(PAYLOAD), OZ_DISPATCH_URL=runtime.url)
    assert (code, str(status) in said) == (1, True)
    assert len(runtime.seen) == 1


@pytest.mark.parametrize("payload", ["", "{", "[]", "{}", '{"run_id": "r"}'])
def test_what_is_no_payload_is_a_failure(runtime: Runtime, payload: str) -> None:
    assert run("dispatch.py", payload, OZ_DISPATCH_URL=runtime.url)[0] == 1
    assert not runtime.seen


def test_an_unreachable_runtime_is_a_failure_that_keeps_the_password() -> None:
    code, said = run("dispatch.py", json.dumps(PAYLOAD), OZ_DISPATCH_URL="http://u:hunter22@127.0.0.1:9/x")
    assert (code, "hunter22" in said) == (1, False)


@pytest.mark.parametrize(("script", "name"), [("dispatch.py", "OZ_DISPATCH_URL"), ("cancel.py", "OZ_CANCEL_URL")])
def test_a_missing_address_is_named(script: str, name: str) -> None:
    code, said = run(script, json.dumps(PAYLOAD))
    assert (code, name in said) == (2, True)


def test_a_cancel_names_the_run(runtime: Runtime) -> None:
    code, _ = run("cancel.py", OZ_CANCEL_URL=runtime.url, OZ_RUN_ID="run-1", OZ_EXECUTION_ID="exec-1")
    assert code == 0
    assert runtime.seen[0][1] == {"run_id": "run-1", "execution_id": "exec-1"}


def test_nothing_is_left_on_disk(runtime: Runtime, tmp_path: Path) -> None:
    run("dispatch.py", json.dumps(PAYLOAD), OZ_DISPATCH_URL=runtime.url, TMPDIR=str(tmp_path), HOME=str(tmp_path))
    assert list(tmp_path.iterdir()) == []
