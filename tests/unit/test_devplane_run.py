from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from oz_worker.devplane import handover
from oz_worker.devplane.run import DevOptions, dev_command
from oz_worker.devplane.scenarios import SCENARIOS

PACKAGE_ROOT = Path(handover.__file__).parents[2]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (DevOptions(backend="kubernetes"), 3, "not in this version"),
        (DevOptions(backend="podman"), 2, "--backend podman"),
        (DevOptions(engine="podman"), 2, "--backend docker"),
        (DevOptions(backend="docker", engine="lxc"), 2, "docker or podman"),
        (DevOptions(backend="docker", oz_path="/bin/true"), 2, "--oz-path"),
        (DevOptions(count=0), 2, "--count 0"),
        (DevOptions(scenario="flood"), 2, "half-open"),
        (DevOptions(scenario="cut", serve=True), 2, "leave out"),
        (DevOptions(listen="0.0.0.0:8080"), 2, "127.0.0.1:PORT"),
        (DevOptions(listen="127.0.0.1:http"), 2, "port 0"),
        (DevOptions(listen="127.0.0.1:70000"), 2, "port 0"),
        (DevOptions(oz_path="/no/such/oz"), 2, "--oz-path"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_started(
    options: DevOptions, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dev_command(options) == code
    said = capsys.readouterr()
    assert words in said.err
    assert said.out == ""


def test_every_mistake_is_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert dev_command(DevOptions(count=-1, listen="x", scenario="y")) == 2
    assert len(capsys.readouterr().err.splitlines()) == 4


def test_a_port_in_use_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert dev_command(DevOptions(listen=address)) == 3
    assert address in capsys.readouterr().err


def test_the_scenarios_are_those_that_the_command_line_names() -> None:
    for name in SCENARIOS:
        assert dev_command(DevOptions(scenario=name, count=0)) == 2
    assert list(SCENARIOS) == ["half-open", "cut", "refuse", "garbage", "slow"]


def test_without_websockets_the_cure_is_named(tmp_path: Path) -> None:
    (tmp_path / "websockets.py").write_text("raise ImportError('not here')\n")
    code = "import sys; from oz_worker.devplane.run import *; sys.exit(dev_command(DevOptions()))"
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": f"{tmp_path}:{PACKAGE_ROOT}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 3
    assert ended.stderr == ("dev needs the websockets package for its control plane: pip install 'oz-worker[dev]'\n")


def test_the_rules_and_the_wire_import_nothing_of_the_worker() -> None:
    code = (
        "import sys, oz_worker.devplane.rules, oz_worker.devplane.wire\n"
        "print(sorted(name for name in sys.modules if name.startswith('oz_worker')))"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE_ROOT, capture_output=True, text=True, timeout=60)
    expected = ["oz_worker", "oz_worker.devplane", "oz_worker.devplane.rules", "oz_worker.devplane.wire"]
    assert ended.stdout == f"{expected}\n", ended.stderr
