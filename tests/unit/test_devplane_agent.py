from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, Iterator
from urllib.parse import urlsplit

import pytest

from oz_worker.devplane import agent as sample
from oz_worker.devplane.server import ControlPlane
from oz_worker.devplane.tasks import Task

STRICT_OZ = Path(__file__).parents[1] / "bin" / "oz"
AGENT = [sys.executable, "-I", "-S", str(sample.__file__)]

ACCEPTED = [
    "--task-id t --sandboxed --server-root-url http://x --computer-use --idle-on-complete",
    "--task-id t --idle-on-complete --session-sharing-server-url u",
    "--share team:edit --share public:view --share --task-id t --no-computer-use --harness claude",
    "--task-id t --idle-on-complete 45m --skip-initial-turn",
    "--task-id t --snapshot-upload-timeout 90s --snapshot-script-timeout 1h30m --no-snapshot",
    "--task-id t --bedrock-inference-role r --bedrock-role-region eu",
    '--task-id t --mcp {"a":{}} --mcp {"b":{}} --model m --profile p --skill s -e env',
    "--task-id=t --server-root-url=",
    "--prompt hello",
    "--task-id t --idle-on-complete 0s --share someone@example.org:view",
]
REFUSED = [
    "",
    "--sandboxed",
    "--task-id",
    "--task-id --sandboxed",
    "--task-id t --task-id u",
    "--task-id t --prompt p",
    "--task-id t --file f",
    "--task-id t --unknown",
    "--task-id t stray",
    "--task-id t --sandboxed=yes",
    "--task-id t --computer-use --no-computer-use",
    "--task-id t --bedrock-inference-role r",
    "--task-id t --bedrock-role-region r",
    "--task-id t --idle-on-complete 1.5h",
    "--task-id t --idle-on-complete 45",
    "--task-id t --snapshot-upload-timeout 5parsecs",
    "--task-id t --harness Oz",
    "--task-id t --share team:admin",
    "--task-id t --share everyone",
    "--task-id t --skip-initial-turn",
    "--task-id t --mcp=",
]


@pytest.mark.parametrize("arguments", ACCEPTED)
def test_the_strict_oz_and_the_sample_agent_take_what_the_real_one_takes(arguments: str) -> None:
    argv = ["agent", "run", *arguments.split()]
    sample.parse(argv)
    ended = subprocess.run([STRICT_OZ, *argv], env={"FAKE_OZ_SCRIPT": "echo ran; exit 7"}, capture_output=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (7, b"ran\n", b"")


@pytest.mark.parametrize("arguments", REFUSED)
def test_they_refuse_what_the_real_one_refuses(arguments: str) -> None:
    argv = ["agent", "run", *arguments.split()]
    with pytest.raises(sample.Usage):
        sample.parse(argv)
    ended = subprocess.run([STRICT_OZ, *argv], env={"FAKE_OZ_SCRIPT": "echo ran"}, capture_output=True)
    assert (ended.returncode, ended.stdout) == (2, b"")
    assert ended.stderr.startswith(b"error: ")


def test_a_duration_may_have_blanks() -> None:
    argv = ["agent", "run", "--task-id", "t", "--idle-on-complete", "1h 30m"]
    sample.parse(argv)
    assert subprocess.run([STRICT_OZ, *argv]).returncode == 0


def test_the_strict_oz_notes_its_arguments(tmp_path: Path) -> None:
    notes = tmp_path / "argv"
    subprocess.run([STRICT_OZ, "agent", "run", "--task-id", "a b"], env={"FAKE_OZ_ARGV": str(notes)}, check=True)
    assert notes.read_text() == "agent\nrun\n--task-id\na b\n\n"


@pytest.fixture
def plane() -> Iterator[ControlPlane]:
    with ControlPlane() as running:
        yield running


def claimed(plane: ControlPlane, script: str) -> Task:
    """A task that the rules take for running, without a worker: these tests are about the agent alone."""
    task = plane.submit(script)
    task.ledger.assigned()
    return task


def start(plane: ControlPlane, task: Task, place: Path, *, key: str | None = None) -> subprocess.Popen[bytes]:
    argv = ["agent", "run", "--task-id", task.task_id, "--sandboxed", "--server-root-url", plane.root_url]
    environment = {"WARP_API_KEY": key or task.secret, "PATH": os.environ["PATH"]}
    return subprocess.Popen([*AGENT, *argv], cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_the_agent_runs_its_prompt_here_and_streams_what_it_prints(plane: ControlPlane, tmp_path: Path) -> None:
    task = claimed(plane, "pwd; echo hi > file; echo oops >&2; ls -A; exit 3")
    out, err = start(plane, task, tmp_path).communicate(timeout=30)
    assert out.decode() == f"{tmp_path}\noops\nfile\n"
    assert err == b""
    assert bytes(task.output) == out
    assert task.agent_code == 3
    plane.check()


def test_the_agent_streams_while_the_script_runs(plane: ControlPlane, tmp_path: Path) -> None:
    task = claimed(plane, "echo one; while [ ! -e go ]; do sleep 0.02; done; echo two")
    agent = start(plane, task, tmp_path)
    plane.wait_for(lambda: bytes(task.output) == b"one\n")
    (tmp_path / "go").touch()
    assert agent.communicate(timeout=30)[0] == b"one\ntwo\n"
    assert agent.returncode == 0


def test_term_ends_script_and_agent_with_the_code_of_the_signal(plane: ControlPlane, tmp_path: Path) -> None:
    task = claimed(plane, "echo up; exec sleep 100")
    agent = start(plane, task, tmp_path)
    plane.wait_for(lambda: bytes(task.output) == b"up\n")
    agent.send_signal(signal.SIGTERM)
    agent.communicate(timeout=30)
    assert agent.returncode == 128 + signal.SIGTERM
    assert task.agent_code == 128 + signal.SIGTERM


def test_something_left_in_the_background_does_not_hold_the_agent(plane: ControlPlane, tmp_path: Path) -> None:
    task = claimed(plane, "sleep 60 & echo $!")
    agent = start(plane, task, tmp_path)
    assert agent.stdout is not None
    left = int(agent.stdout.readline())
    assert agent.wait(30) == 0
    os.kill(left, signal.SIGKILL)
    agent.communicate()


def test_the_agent_says_why_it_got_no_prompt(plane: ControlPlane, tmp_path: Path) -> None:
    task = claimed(plane, "echo never")
    agent = start(plane, task, tmp_path, key="wrong")
    out, err = agent.communicate(timeout=30)
    assert (agent.returncode, out) == (1, b"")
    assert b"401" in err


def test_a_second_agent_of_one_attempt_is_a_violation(plane: ControlPlane, tmp_path: Path) -> None:
    task = claimed(plane, "true")
    for _ in range(2):
        start(plane, task, tmp_path).communicate(timeout=30)
    assert any("ran twice" in sentence for sentence in plane.violations)


def ask(plane: ControlPlane, method: str, path: str, body: object = None, **headers: str) -> tuple[int, Any]:
    connection = HTTPConnection(urlsplit(plane.root_url).netloc, timeout=20)
    data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
    connection.request(method, path, data, {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, json.loads(content) if content else None


def test_people_submit_list_and_show_tasks(plane: ControlPlane) -> None:
    status, made = ask(plane, "POST", "/tasks", {"script": "echo hi", "count": 2})
    assert status == 201
    ids = [entry["task_id"] for entry in made["tasks"]]
    assert ids == [task.task_id for task in plane.tasks.values()]
    assert [entry["state"] for entry in ask(plane, "GET", "/tasks")[1]["tasks"]] == ["queued", "queued"]
    status, shown = ask(plane, "GET", f"/tasks/{ids[0]}")
    assert (status, shown["task_id"], shown["output"], shown["frames"]) == (200, ids[0], "", [])


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "words"),
    [
        ("GET", "/nowhere", None, 404, "/tasks"),
        ("GET", "/tasks/none", None, 404, "no task none"),
        ("POST", "/tasks", b"{", 400, "not JSON"),
        ("POST", "/tasks", b"[" * 100_000, 400, "not JSON"),
        ("POST", "/tasks", [], 400, "object"),
        ("POST", "/tasks", {}, 400, "script"),
        ("POST", "/tasks", {"script": 7}, 400, "script"),
        ("POST", "/tasks", {"script": "x", "colour": "red"}, 400, "colour"),
        ("POST", "/tasks", {"script": "x", "count": 0}, 400, "count"),
        ("POST", "/tasks", {"script": "x", "count": True}, 400, "count"),
        ("POST", "/tasks", {"script": "x", "env_vars": {"A": 1}}, 400, "env_vars"),
        ("POST", "/tasks", b"x" * (1024 * 1024 + 1), 413, "at most"),
        ("POST", "/tasks/none/cancel", {}, 404, "none"),
        ("GET", "/agent/tasks/none/prompt", None, 401, "WARP_API_KEY"),
    ],
)
def test_mistakes_are_answered_in_a_sentence(
    plane: ControlPlane, method: str, path: str, body: object, status: int, words: str
) -> None:
    got, answer = ask(plane, method, path, body)
    assert (got, words in answer["error"]) == (status, True), answer


def test_a_cancel_without_a_worker_is_refused(plane: ControlPlane) -> None:
    task = plane.submit("echo")
    status, answer = ask(plane, "POST", f"/tasks/{task.task_id}/cancel", {})
    assert (status, "no worker" in answer["error"]) == (409, True)


@pytest.mark.parametrize("headers", [{"Host": "evil.example:80"}, {"Origin": "http://127.0.0.1:1"}])
def test_a_web_page_cannot_submit(plane: ControlPlane, headers: dict[str, str]) -> None:
    assert ask(plane, "POST", "/tasks", {"script": "echo"}, **headers)[0] == 403
    assert not plane.tasks


@pytest.mark.skipif(not sys.platform.startswith("linux") or os.getuid() != 0, reason="needs to become another user")
def test_another_user_of_the_machine_cannot_submit(plane: ControlPlane) -> None:
    code = """if True:
        import http.client, os, sys
        def ask():
            connection = http.client.HTTPConnection(sys.argv[1])
            connection.request("POST", "/tasks", '{"script": "id"}')
            return connection.getresponse().status
        mine = ask()
        os.setuid(65534)
        print(mine, ask())
    """
    netloc = urlsplit(plane.root_url).netloc
    ended = subprocess.run([sys.executable, "-c", code, netloc], capture_output=True, timeout=30)
    assert ended.stdout == b"201 403\n"
    assert len(plane.tasks) == 1
