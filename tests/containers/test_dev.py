"""`python -m oz_worker dev --backend docker` against a real engine, which is afterwards as it was before."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Iterator

import pytest

from tests.e2e.test_dev import dev, nobody_left, nothing_left
from tests.engines.census import audit_back_to, census
from tests.engines.client import Client

__all__ = ["dev"]


@pytest.fixture
def clean(engine: Client) -> Iterator[Client]:
    """The engine, which must hold at the end what it held before."""
    yield from unchanged(engine)


@pytest.fixture
def clean_podman(podman: Client) -> Iterator[Client]:
    """The same of Podman."""
    yield from unchanged(podman)


def unchanged(engine: Client) -> Iterator[Client]:
    """Lend an engine and count, images included, before and after."""
    before, images = census(engine), engine.ids("images", "--all", "--quiet", "--no-trunc")
    yield engine
    audit_back_to(engine, before)
    assert engine.ids("images", "--all", "--quiet", "--no-trunc") == images


def printed(out: str) -> list[str]:
    """What the tasks printed."""
    return re.findall(r"^[0-9:]{8} task-\S+ \| (.*)", out, re.MULTILINE)


def test_a_task_runs_in_a_container_made_of_this_machine(dev: Any, clean: Client, tmp_path: Path) -> None:
    script = "ls /.dockerenv; pwd; ls -A; python3 -c 'import json, ssl, sys; print(sys.version.split()[0])'"
    code, out = dev("--backend", "docker", "--keep", "--", script, env=clean.env).end()
    assert code == 0, out
    assert printed(out) == ["/.dockerenv", "/workspace", sys.version.split()[0]]
    [mark] = re.findall(r"loaded into docker \S+ as oz-worker-dev/task:([0-9a-f]{8}), \d+ MB in", out)
    assert len(clean.ids("images", "--quiet", "--filter", f"label=oz-worker.worker=dev-{mark}")) == 2
    [removal] = re.findall(r"kept: the images.*to remove it: (.*)", out)
    env = {**clean.env, "PATH": f"{Path(clean.program).parent}:{clean.env['PATH']}"}
    subprocess.run(["/bin/sh", "-c", removal], env=env, stdout=subprocess.DEVNULL, check=True, timeout=60)
    assert nobody_left(tmp_path)


def test_a_script_that_fails_in_podman_is_exit_1(dev: Any, clean_podman: Client, tmp_path: Path) -> None:
    options = ("--backend", "docker", "--engine", "podman")
    code, out = dev(*options, "--", "echo so far; exit 3", env=clean_podman.env).end()
    assert (code, printed(out)) == (1, ["so far"])
    assert "exit code 3" in out
    assert "removed from podman" in out
    assert nothing_left(tmp_path)


def test_cancelled_tasks_are_as_asked(dev: Any, clean: Client, tmp_path: Path) -> None:
    options = ("--backend", "docker", "--count", "2", "--cancel-after", "100ms")
    code, out = dev(*options, "--", "sleep 100", env=clean.env).end()
    assert (code, out.count("execution closed")) == (0, 2), out
    assert nothing_left(tmp_path)


def test_an_interrupt_leaves_nothing_behind(dev: Any, clean: Client, tmp_path: Path) -> None:
    call = dev("--backend", "docker", "--", "echo up; sleep 100", env=clean.env)
    call.line(r"\| up")
    call.process.send_signal(signal.SIGINT)
    assert call.end()[0] == 130
    assert nothing_left(tmp_path)


def test_a_terminal_that_is_closed_while_the_image_is_made(dev: Any, clean: Client, tmp_path: Path) -> None:
    call = dev("--backend", "docker", env=clean.env)
    call.line("making an image")
    call.process.send_signal(signal.SIGHUP)
    code, out = call.end()
    assert (code, "connected" in out) == (129, False)
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("moment", ["claimed", r"\| up"])
def test_a_killed_worker_leaves_nothing_behind(dev: Any, clean: Client, tmp_path: Path, moment: str) -> None:
    """Neither a container that runs, nor what its programs were making just then."""
    call = dev("--backend", "docker", "--", "echo up; sleep 100", env=clean.env)
    call.line(moment)
    [lock] = tmp_path.glob("oz-dev-*/state/*/lock")
    os.kill(json.loads(lock.read_text())["pid"], signal.SIGKILL)
    code, out = call.end()
    assert (code, "ended by itself with exit code -9" in out) == (1, True), out
    assert nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"DOCKER_HOST": "unix:///nonexistent/docker.sock"}, "the docker engine cannot be used"),
        ({"DOCKER_HOST": "ssh://somebody@192.0.2.1"}, "DOCKER_HOST names an engine on another machine"),
        ({"PATH": "/nonexistent"}, "no program docker on PATH; install it"),
    ],
)
def test_without_an_engine_one_sentence_says_so(
    dev: Any, engine: Client, tmp_path: Path, env: dict[str, str], words: str
) -> None:
    code, out = dev("--backend", "docker", env={**engine.env, **env}).end()
    said = [line for line in out.splitlines() if "control plane on" not in line]
    assert (code, len(said), words in out) == (3, 1, True), out
    assert nothing_left(tmp_path)


def test_containers_that_do_not_reach_this_machine_are_noticed(dev: Any, clean: Client, tmp_path: Path) -> None:
    """As in a virtual machine: there the host's network is another one."""
    odd = tmp_path / "bin" / "docker"
    odd.parent.mkdir()
    refused = 'echo "ConnectionRefusedError: [Errno 111] Connection refused" >&2; exit 1'
    odd.write_text(
        f'#!/bin/sh\ncase $1 in run) {refused};; load) exec cat >/dev/null;; esac\nexec {clean.program} "$@"\n'
    )
    odd.chmod(0o755)
    env = {**clean.env, "PATH": f"{odd.parent}:{clean.env['PATH']}"}
    code, out = dev("--backend", "docker", env=env).end()
    assert (code, "run dev on the machine of the engine itself" in out) == (3, True), out
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]
