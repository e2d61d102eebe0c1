"""Run the whole suite again and again, and stop at the first run that is not green.

A flake is a failure: nothing is rerun. The count of green runs in a row is printed and written to `count` in the output
directory, the output of a run that failed is kept beside it. Arguments behind `--` go to pytest.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple, Sequence

ROOT = Path(__file__).resolve().parents[1]
BUSY = "while True: pass"


class Run(NamedTuple):
    """One pytest process, its output file, and the busy loop beside it if there is one."""

    number: int
    tests: subprocess.Popen[bytes]
    log: Path
    load: subprocess.Popen[bytes] | None
    began: float


def main() -> int:
    """Repeat; 0 when every run was green, 1 after the first that was not, 130 when interrupted."""
    options = _options()
    output = options.output
    output.mkdir(parents=True, exist_ok=True)
    (output / "count").write_text("0\n")
    waiting = list(range(1, options.runs + 1))
    running: list[Run] = []
    green = 0
    try:
        while waiting or running:
            while waiting and len(running) < options.jobs:
                number = waiting.pop(0)
                running.append(_start(number, output, loaded=options.load and number % 2 == 0, more=options.pytest))
            run = _first_ended(running)
            running.remove(run)
            if not _settle(run):
                print(f"run {run.number} failed after {green} green runs; its output is {run.log}", flush=True)
                return 1
            green += 1
            (output / "count").write_text(f"{green}\n")
            run.log.unlink()
    except KeyboardInterrupt:
        return 130
    finally:
        for run in running:
            _end(run)
    print(f"{green} green runs in a row", flush=True)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=10, help="how many (10)")
    parser.add_argument("--jobs", type=int, default=1, help="so many at the same time (1)")
    parser.add_argument("--load", action="store_true", help="a busy loop beside every second run")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "repeat", help="a directory (build/repeat)")
    parser.add_argument("pytest", nargs="*", metavar="-- ARGUMENT", help="for pytest")
    return parser.parse_args()


def _start(number: int, output: Path, *, loaded: bool, more: Sequence[str]) -> Run:
    log = output / f"run-{number}.log"
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", *more]
    with log.open("wb") as sink:
        tests = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT)
    load = subprocess.Popen([sys.executable, "-c", BUSY]) if loaded else None
    return Run(number, tests, log, load, time.monotonic())


def _first_ended(running: Sequence[Run]) -> Run:
    while True:
        for run in running:
            try:
                run.tests.wait(0.2)
            except subprocess.TimeoutExpired:
                continue
            return run


def _settle(run: Run) -> bool:
    """Print the run's line; whether it was green. A run in which nothing was tested (pytest's exit 5) is not."""
    if run.load is not None:
        _kill(run.load)
    lines = run.log.read_text(errors="replace").splitlines()
    beside = " under load" if run.load is not None else ""
    closing = lines[-1] if lines else "no output"
    print(f"run {run.number}{beside}: {closing} ({time.monotonic() - run.began:.0f} s)", flush=True)
    if run.tests.returncode:
        print("\n".join(lines[-40:]), flush=True)
    return run.tests.returncode == 0


def _end(run: Run) -> None:
    """Stop a run that is no longer wanted: INT first, so that its fixtures clean up."""
    run.tests.send_signal(signal.SIGINT)
    try:
        run.tests.wait(30)
    except subprocess.TimeoutExpired:
        _kill(run.tests)
    if run.load is not None:
        _kill(run.load)


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


if __name__ == "__main__":
    raise SystemExit(main())
