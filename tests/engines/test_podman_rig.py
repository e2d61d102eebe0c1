"""The rig for Podman itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engines.census import audit_engine, census, differences
from tests.engines.images import load_images
from tests.engines.podman import Podman
from tests.engines.registry import Registry
from tests.engines.traces import marked, traces
from tests.rig import ROOT, until

HOLDS_PODMAN = """
import sys
from tests.engines.images import load_images
from tests.engines.podman import Podman
podman = Podman()
image = load_images(podman).task
for name in ("runs", "waits"):
    podman.cli("run", "--detach", "--name", name, "--env", "MARK=" + sys.argv[1], image, "sleep", "1000")
podman.cli("pause", "waits")
print(podman.place, flush=True)
sys.stdin.read()
podman.close()
podman.close()
"""


def test_containers_run_and_a_registry_is_pulled_from(podman: Podman, registry: Registry) -> None:
    before = census(podman)
    images = load_images(podman)
    podman.cli("create", "--name", "left", images.task)
    assert [line.split(":")[0] for line in differences(before, census(podman))] == ["containers"]
    podman.cli("rm", "left")
    podman.allow_plain(registry.address)
    reference = registry.publish(podman, f"rig/podman:{os.getpid()}", files={"own": (0o644, os.urandom(9))})
    assert podman.read("run", "--rm", "--network", "none", reference, "id", "-u") == "0"
    assert podman.cli("run", "--rm", images.task, "sh", "-c", "exit 7", check=False).returncode == 7
    podman.cli("rmi", reference, *images)
    audit_engine(before, census(podman))


@pytest.mark.usefixtures("podman")  # skipped where there can be none
def test_nothing_outlives_the_process_that_made_it() -> None:
    for last in ("close", "kill"):
        mark = os.urandom(8).hex()
        command = [sys.executable, "-c", HOLDS_PODMAN, mark]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdin
            assert process.stdout
            try:
                place = Path(process.stdout.readline().decode().strip())
                assert (len(marked(mark)), traces(place) != []) == (2, True)
                if last == "close":
                    process.stdin.close()
                    assert process.wait() == 0
                    assert traces(place) == []
                else:
                    process.kill()
                until(lambda: traces(place) == [], "the end of Podman")  # noqa: B023 - ends before the next round
            finally:
                process.kill()
        assert marked(mark) == []
