"""`python -m oz_worker dev` as people call it: the real worker, the real control plane, the sample agent."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any, Iterator, Mapping

import pytest


class Dev:
    """One call of dev, whose temporary files go where the test can count them."""

    def __init__(self, place: Path, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        self.place = place
        self.process = subprocess.Popen(
            [sys.executable, "-m", "oz_worker", "dev", *arguments],
            env={**os.environ, **(env or {}), "TMPDIR": str(place)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def line(self, pattern: str) -> re.Match[str]:
        """The first line from here on that has *pattern* in it."""
        assert self.process.stdout is not None
        seen = []
        for line in self.process.stdout:
            seen.append(line)
            found = re.search(pattern, line)
            if found:
                return found
        raise AssertionError(f"no line with {pattern!r} in:\n{''.join(seen)}")

    def end(self) -> tuple[int, str]:
        out, _ = self.process.communicate(timeout=100)
        return self.process.returncode, out


@pytest.fixture
def dev(tmp_path: Path) -> Iterator[Any]:
    calls: list[Dev] = []

    def called(*arguments: str, env: Mapping[str, str] | None = None) -> Dev:
        calls.append(Dev(tmp_path, *arguments, env=env))
        return calls[-1]

    yield called
    for call in calls:
        if call.process.poll() is None:
            call.process.send_signal(signal.SIGTERM)
            call.process.communicate(timeout=60)


def nothing_left(place: Path) -> bool:
    """No directory, and no process that was started from it."""
    return list(place.iterdir()) == [] and nobody_left(place)


def nobody_left(place: Path) -> bool:
    """No living process that was told of *place*, but the test itself."""
    for told in Path("/proc").glob("[0-9]*/environ"):
        try:
            assert told.parent.name == str(os.getpid()) or str(place).encode() not in told.read_bytes(), told
        except OSError:
            continue
    return True


def test_a_script_runs_in_an_empty_workspace_of_its_own(dev: Any, tmp_path: Path) -> None:
    code, out = dev("--", "git init -q . && echo hi > a && git add a && git status --short").end()
    assert code == 0, out
    assert [line.partition(" | ")[2] for line in out.splitlines() if " | " in line] == ["A  a"]
    assert nothing_left(tmp_path)


def test_a_script_that_fails_is_exit_1_with_its_code_in_sight(dev: Any, tmp_path: Path) -> None:
    code, out = dev("--", "exit 3").end()
    assert code == 1
    assert "exit code 3" in out
    assert nothing_left(tmp_path)


def test_many_tasks_and_their_cancel(dev: Any, tmp_path: Path) -> None:
    code, out = dev("--count", "5", "--cancel-after", "100ms", "--", "sleep 100").end()
    assert code == 0, out
    assert out.count("execution closed") == 5
    assert nothing_left(tmp_path)


def test_the_command_backend_hands_over_and_cancels(dev: Any, tmp_path: Path) -> None:
    code, out = dev("--backend", "command", "--", "echo handed over").end()
    assert (code, "| handed over" in out) == (0, True), out
    code, out = dev("--backend", "command", "--cancel-after", "100ms", "--", "sleep 100").end()
    assert code == 0, out
    assert nothing_left(tmp_path)


def test_an_agent_that_is_cancelled_before_its_first_word_has_ended_as_asked(dev: Any, tmp_path: Path) -> None:
    oz = tmp_path / "oz"
    oz.write_text("#!/bin/sh\nexec sleep 100\n")
    oz.chmod(0o700)
    call = dev("--backend", "command", "--cancel-after", "100ms", "--oz-path", str(oz), "--", "true")
    code, out = call.end()
    assert (code, "done" in out, "agent ended" in out) == (0, True, False), out
    oz.unlink()
    assert nothing_left(tmp_path)


def test_an_interrupt_leaves_nothing_behind(dev: Any, tmp_path: Path) -> None:
    call = dev("--", "echo up; sleep 100")
    call.line(r"\| up")
    call.process.send_signal(signal.SIGINT)
    assert call.end()[0] == 130
    assert nothing_left(tmp_path)


def test_a_worker_that_ends_early_is_shown_with_its_log(dev: Any, tmp_path: Path) -> None:
    call = dev("--keep", "--", "sleep 100")
    call.line("agent started")
    [directory] = tmp_path.iterdir()
    [lock] = (directory / "state").glob("*/lock")
    os.kill(json.loads(lock.read_text())["pid"], signal.SIGKILL)
    code, out = call.end()
    assert code == 1
    assert "ended by itself with exit code -9" in out
    assert "Listening for tasks" in out
    assert nobody_left(tmp_path)


def test_serve_takes_lists_and_cancels_over_http(dev: Any, tmp_path: Path) -> None:
    call = dev("--serve")
    root = call.line(r"control plane on (http://\S+),")[1]
    call.line("connected")

    def ask(path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(root + path, data, timeout=30) as answer:
            return json.load(answer)

    [task] = ask("/tasks", {"script": "echo up; sleep 100"})["tasks"]
    call.line(r"\| up")
    ask(f"/tasks/{task['task_id']}/cancel", {})
    call.line("execution closed")
    shown = ask(f"/tasks/{task['task_id']}")
    assert (shown["state"], shown["closed"], shown["output"]) == ("cancelled", True, "up\n")
    call.process.send_signal(signal.SIGTERM)
    assert call.end()[0] == 0
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("name", ["half-open", "cut", "refuse", "garbage", "slow"])
def test_scenarios_pass(dev: Any, tmp_path: Path, name: str) -> None:
    code, out = dev("--scenario", name).end()
    assert (code, "scenario passed" in out) == (0, True), out
    assert nothing_left(tmp_path)
