"""The backends' programs, engines and directories: missing, too old, hanging, without permission, of another kind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from oz_worker.checks import backend, programs
from oz_worker.checks.probe import Result
from oz_worker.settings import (
    BackendOptions,
    CommandOptions,
    DirectOptions,
    DockerOptions,
    KubernetesOptions,
    Settings,
)
from tests.checks.asked import found
from tests.rig import until


@pytest.fixture
def bin_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory for programs that stand before all others."""
    place = tmp_path / "bin"
    place.mkdir()
    monkeypatch.setenv("PATH", f"{place}:/usr/bin:/bin")
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    return place


def program(place: Path, name: str, script: str) -> Path:
    file = place / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return file


def tried(kind: str, options: BackendOptions, **more: Any) -> dict[str, Result]:
    settings = Settings(worker_id="w", backend=kind, options=options, **more)
    with contextlib.ExitStack() as stack:
        return found(backend.probes(settings, dict(os.environ), stack))


def brief(shown: dict[str, Result]) -> dict[str, str]:
    return {name: result.outcome.value for name, result in shown.items()}


def test_an_agent_that_is_missing_broken_or_hangs(
    tmp_path: Path, bin_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tmp_path / "ws")
    shown = tried("direct", DirectOptions(workspace_root=root, oz_path=str(bin_dir / "none")))
    assert brief(shown) == {"agent": "failed", "workspace": "ok"}
    assert str(bin_dir / "none") in shown["agent"].said
    if not any((Path(directory) / "oz").exists() for directory in os.environ["PATH"].split(":")):
        assert "no program oz on PATH" in tried("direct", DirectOptions(workspace_root=root))["agent"].said
    (bin_dir / "oz").write_bytes(b"\x7fELF of another machine")
    (bin_dir / "oz").chmod(0o755)
    shown = tried("direct", DirectOptions(workspace_root=root))
    assert "cannot be run" in shown["agent"].said
    (bin_dir / "oz").chmod(0o644)
    shown = tried("direct", DirectOptions(workspace_root=root, oz_path=str(bin_dir / "oz")))
    assert shown["agent"].outcome.value == "failed"
    program(bin_dir, "oz", "sleep 300 & wait")
    with monkeypatch.context() as hurry:
        hurry.setattr(programs, "SECONDS", 0.5)
        shown = tried("direct", DirectOptions(workspace_root=root))
    assert (shown["agent"].outcome.value, "did not say its version" in shown["agent"].said) == ("warning", True)
    program(bin_dir, "oz", 'env > "${0%/*}/seen"; echo oz 1.2.3')
    monkeypatch.setenv("WARP_API_KEY", "wk-hidden")
    shown = tried("direct", DirectOptions(workspace_root=root))
    assert shown["agent"].said == f"{bin_dir}/oz 1.2.3"
    assert "wk-hidden" not in (bin_dir / "seen").read_text()


def test_workspaces_that_cannot_be(tmp_path: Path) -> None:
    oz: dict[str, Any] = {"oz_path": "/bin/true"}
    (tmp_path / "file").touch()
    shown = tried("direct", DirectOptions(workspace_root=str(tmp_path / "file" / "ws"), **oz))
    assert "cannot be made: Not a directory" in shown["workspace"].said
    shown = tried("direct", DirectOptions(workspace_root=str(tmp_path / "file"), **oz))
    assert shown["workspace"].outcome.value == "failed"
    shown = tried("direct", DirectOptions(workspace_root="/proc/ws", **oz))
    assert shown["workspace"].outcome.value == "failed"
    shown = tried("direct", DirectOptions(target_dir=str(tmp_path / "none"), **oz))
    assert "target_dir" in shown["workspace"].said
    shown = tried("direct", DirectOptions(harness_config_dirs={"claude": str(tmp_path / "none")}, **oz))
    assert "harness_config_dirs.claude" in shown["workspace"].said
    shown = tried("direct", DirectOptions(workspace_root=str(tmp_path / "new" / "ws"), **oz))
    assert shown["workspace"].said == f"{tmp_path}/new/ws will be made"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_engines_that_are_missing_old_silent_closed_or_of_another_kind(
    bin_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = tried("docker", DockerOptions(engine_path=str(bin_dir / "none")))
    assert brief(shown) == {"program": "failed", "engine": "skipped"}
    assert shown["program"].cure.startswith("install docker")

    away = 'echo "Cannot connect to the Docker daemon at unix:///x. Is the docker daemon running?" >&2; exit 1'
    info = 'case "$1" in --version) echo "Docker version %s, build 1";; *) %s;; esac'
    program(bin_dir, "docker", info % ("19.03.1", away))
    shown = tried("docker", DockerOptions())
    assert brief(shown) == {"program": "warning", "engine": "failed"}
    assert "19.3.1 is older than 20.10" in shown["program"].said
    assert shown["program"].cure == "upgrade it, or name a newer one with backend.docker.engine_path"
    assert "Start the engine" in shown["engine"].said

    denied = 'echo "permission denied while trying to connect to the Docker daemon socket" >&2; exit 1'
    program(bin_dir, "docker", info % ("28.0.1", denied))
    shown = tried("docker", DockerOptions())
    assert brief(shown) == {"program": "ok", "engine": "failed"}
    assert "by its group (docker)" in shown["engine"].said

    program(bin_dir, "docker", info % ("28.0.1", "sleep 300 & wait"))
    shown = tried("docker", DockerOptions(command_timeout=1.0))
    assert "did not answer within 1s" in shown["engine"].said

    windows = '{"OSType": "windows", "Architecture": "x86_64", "SystemTime": "2026-01-01T00:00:00Z"}'
    program(bin_dir, "docker", info % ("28.0.1", f"echo '{windows}'"))
    assert "runs windows/amd64 containers" in tried("docker", DockerOptions())["engine"].said
    program(bin_dir, "docker", info % ("28.0.1", f"echo '{windows.replace('windows', 'linux')}'"))
    assert tried("docker", DockerOptions(platform="linux/amd64"))["engine"].said == (
        "docker , linux/amd64, docker of this host"
    )
    foreign = tried("docker", DockerOptions(platform="linux/arm64/v8"))["engine"]
    assert (foreign.outcome.value, "linux/arm64/v8, which it runs only by emulation" in foreign.said) == (
        "warning",
        True,
    )

    program(bin_dir, "docker", "sleep 300 & wait")
    monkeypatch.setattr(programs, "SECONDS", 0.5)
    assert brief(tried("docker", DockerOptions())) == {"program": "failed", "engine": "skipped"}


def test_a_real_docker_program_without_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    shown = tried("docker", DockerOptions())
    assert brief(shown) == {"program": "ok", "engine": "failed"}
    assert f"DOCKER_HOST is unix://{tmp_path}/none.sock" in shown["engine"].said


def test_a_kubectl_that_is_missing_or_old(bin_dir: Path) -> None:
    shown = tried("kubernetes", KubernetesOptions(kubectl_path=str(bin_dir / "none")))
    assert brief(shown) == dict.fromkeys(("cluster", "permissions", "image"), "skipped") | {"program": "failed"}
    assert shown["program"].cure.startswith("install kubectl")
    program(bin_dir, "kubectl", 'echo \'Client Version: version.Info{Major:"1", Minor:"18", GitVersion:"v1.18.20"}\'')
    shown = tried("kubernetes", KubernetesOptions(), instance_id="i")
    assert "1.18.20 is older than 1.20" in shown["program"].said
    assert shown["program"].cure == "upgrade it, or name a newer one with backend.kubernetes.kubectl_path"


def test_dispatch_commands_whose_program_is_missing_and_those_that_only_look_so(bin_dir: Path) -> None:
    program(bin_dir, "launcher", "touch ran")
    good = (
        "launcher --now",
        f"{bin_dir}/launcher",
        "cat >/dev/null",
        "A=b C='d e' launcher; x",
        "cd / && ./launcher",
        "if true; then launcher; fi",
        "(launcher)",
        '"$HOME/launcher" x',
        "exec launcher",
        "~/launcher",
        "# a comment\nlauncher",
        "PATH=/opt/elsewhere/bin:$PATH launcher-of-elsewhere",
    )
    for command in good:
        shown = tried("command", CommandOptions(dispatch_command=command, cancel_command="true"))
        assert brief(shown) == {"dispatcher": "ok", "canceller": "ok"}, (command, shown)
    for command, said in (
        ("luncher --now", "begins with luncher, which is no program"),
        (f"{bin_dir}/luncher", "luncher, which is no program"),
        ("./launcher", "./launcher, which is no program"),
        ("if true; then", "/bin/sh cannot read dispatch_command"),
        ("echo 'open", "/bin/sh cannot read dispatch_command"),
        (" ", "needs dispatch_command"),
    ):
        shown = tried("command", CommandOptions(dispatch_command=command))
        assert (shown["dispatcher"].outcome.value, said in shown["dispatcher"].said) == ("failed", True), shown
    assert not (bin_dir / "ran").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_check_that_is_told_to_stop_or_loses_its_terminal_leaves_nothing_behind(
    bin_dir: Path, tmp_path: Path, number: signal.Signals
) -> None:
    program(bin_dir, "kubectl", f"echo $$ > {tmp_path}/pid; exec sleep 600")
    words = ["--worker-id", "w", "--backend", "kubernetes", "--state-dir", str(tmp_path / "state")]
    environ = {
        **os.environ,
        "PATH": f"{bin_dir}:/usr/bin:/bin",
        "TMPDIR": str(tmp_path),
        "WARP_API_KEY": "wk-check-key",
    }
    with subprocess.Popen(
        [sys.executable, "-m", "oz_worker", "check", *words], env=environ, stdout=subprocess.DEVNULL
    ) as check:
        until((tmp_path / "pid").exists, "the program")
        until((tmp_path / "pid").read_text, "its number")
        check.send_signal(number)
        assert check.wait(60) == 128 + number
    assert not list(tmp_path.glob("oz-worker-check-*"))
    child = int((tmp_path / "pid").read_text())
    until(lambda: not Path(f"/proc/{child}").exists(), "the end of the program")
