"""`check` as a process and as JSON, and its probes one family at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Mapping, NamedTuple, Sequence

import yaml

from oz_worker.checks.probe import Probe, Result, work
from tests.audit import guard
from tests.rig import ROOT

KEY = "wk-secret-of-the-check"
SECONDS = 60
"""Many times what any of these takes."""


class Answer(NamedTuple):
    """What `check --json` said. `all_text` is both streams as they came."""

    code: int
    document: dict[str, Any]
    tests: dict[str, dict[str, Any]]
    all_text: str

    def results(self) -> dict[str, str]:
        """The result of each test by its name, in order."""
        return {name: test["result"] for name, test in self.tests.items()}


def asked(place: Path, config: Mapping[str, Any], *flags: str, **environ: str) -> Answer:
    """Run `check --json` with *config* in a process of its own."""
    done = command(place, config, "--json", *flags, **environ)
    document = json.loads(done.stdout)
    tests = {test["name"]: test for test in document["tests"]}
    assert len(tests) == len(document["tests"]), "two tests of one name"
    assert document["exit_code"] == done.returncode
    return Answer(done.returncode, document, tests, done.stdout + done.stderr)


def command(place: Path, config: Mapping[str, Any], *flags: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run `check` with *config*."""
    file = place / "config.yaml"
    file.write_text(yaml.safe_dump(dict(config)))
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(place), "WARP_API_KEY": KEY, "PYTHONPATH": str(ROOT), **environ}
    key = environment["WARP_API_KEY"]
    guard().keep(place, key)
    words = [sys.executable, "-m", "oz_worker", "check", "--config-file", str(file), *flags]
    done = subprocess.run(
        words, env=environment, cwd=place, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert "Traceback" not in done.stdout + done.stderr
    assert not key or key not in done.stdout + done.stderr
    return done


def found(probes: Sequence[Probe]) -> dict[str, Result]:
    """What the probes found, by name."""
    return {result.name: result for result in work(probes)}
