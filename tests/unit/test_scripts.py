"""The scripts beside the program: the benchmark runs, and repeating stops at the first run that is not green."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SAFETY = 100.0

FAILS_THE_SECOND_TIME = """
import pathlib
def test_once():
    seen = pathlib.Path({seen!r})
    assert not seen.exists(), "a flake"
    seen.touch()
"""


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=SAFETY,
        check=False,
    )


def test_green_runs_are_counted(tmp_path: Path) -> None:
    suite = tmp_path / "test_green.py"
    suite.write_text("def test_nothing(): pass\n")
    done = run("repeat_tests.py", "--runs", "3", "--jobs", "2", "--load", "--output", str(tmp_path), "--", str(suite))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 green runs in a row" in done.stdout
    assert (tmp_path / "count").read_text() == "3\n"


def test_the_first_failure_ends_it_and_keeps_its_output(tmp_path: Path) -> None:
    suite = tmp_path / "test_flaky.py"
    suite.write_text(FAILS_THE_SECOND_TIME.format(seen=str(tmp_path / "seen")))
    done = run("repeat_tests.py", "--runs", "5", "--output", str(tmp_path), "--", str(suite))
    assert done.returncode == 1
    assert (tmp_path / "count").read_text() == "1\n"
    assert "a flake" in (tmp_path / "run-2.log").read_text()
    assert not (tmp_path / "run-3.log").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the benchmark needs pidfds and /proc")
def test_the_benchmark_measures_and_judges() -> None:
    done = run("bench.py", "--quick", "--only", "dispatch", "--only", "cancelled")
    rows = [line for line in done.stdout.splitlines() if line.endswith(("| ok      |", "| OVER    |"))]
    assert len(rows) == 4, done.stdout + done.stderr
    assert done.returncode == ("| OVER " in done.stdout)
