"""The rig for engines itself: what it promises to the tests that use it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engines.census import audit_engine, census, differences
from tests.engines.client import Client, EngineError
from tests.engines.docker import Engine
from tests.engines.fixtures import OwnEngine
from tests.engines.images import Images, load_image, load_images
from tests.engines.traces import marked, traces
from tests.rig import ROOT, SAFETY, until

HOLDS_AN_ENGINE = """
import sys
from tests.engines.docker import Engine
from tests.engines.images import load_images
engine = Engine()
engine.cli("run", "--detach", "--env", "MARK=" + sys.argv[1], load_images(engine).task, "sleep", "1000")
print(engine.place, flush=True)
sys.stdin.read()
engine.close()
"""


def running(engine: Engine) -> set[str]:
    return set(engine.read("ps", "--format", "{{.Names}} {{.State}}").splitlines())


def test_containers_outlive_their_engine_and_end_with_close(own_engine: OwnEngine) -> None:
    engine = own_engine()
    task = load_images(engine).task
    for name in ("runs", "waits"):
        engine.cli("run", "--detach", "--name", name, task, "sleep", "1000")
    engine.cli("pause", "waits")
    engine.stop()
    with pytest.raises(EngineError, match="Cannot connect"):
        engine.cli("ps")
    engine.start_again()
    engine.kill()
    engine.start_again()
    assert running(engine) == {"runs running", "waits paused"}
    assert engine.read("exec", "runs", "echo", "here") == "here"
    assert traces(engine.place) != []
    engine.close()
    assert traces(engine.place) == []
    engine.close()


def test_a_frozen_engine_answers_once_it_is_thawed_and_can_be_killed(own_engine: OwnEngine) -> None:
    engine = own_engine()
    engine.freeze()
    asking = subprocess.Popen([engine.program, "ps", "--quiet"], env=engine.env, stdout=subprocess.PIPE)
    with pytest.raises(subprocess.TimeoutExpired):
        asking.wait(0.5)
    engine.thaw()
    assert (asking.communicate(timeout=SAFETY)[0], asking.returncode) == (b"", 0)
    engine.freeze()
    engine.kill()
    engine.start_again()
    assert engine.read("ps", "--quiet") == ""


def test_a_hidden_socket_comes_back(own_engine: OwnEngine) -> None:
    engine = own_engine()
    engine.hide_socket()
    assert b"Is the docker daemon running?" in engine.cli("ps", check=False).stderr
    engine.show_socket()
    assert engine.read("ps", "--quiet") == ""


def test_a_small_disk_is_full_and_the_engine_lives_on(own_engine: OwnEngine) -> None:
    engine = own_engine(data_mb=16)
    task = load_images(engine).task
    with pytest.raises(EngineError, match="no space left on device"):
        load_image(engine, "big:1", files={"big": (0o644, os.urandom(20 << 20))})
    wrote = engine.cli("run", "--rm", task, "dd", "if=/dev/zero", "of=/tmp/x", "bs=1M", "count=30", check=False)
    assert b"No space left on device" in wrote.stderr
    assert engine.read("run", "--rm", task, "echo", "lives") == "lives"


@pytest.mark.usefixtures("own_engine")  # skipped where there can be none
@pytest.mark.parametrize("victim", ["test", "namespace"])
def test_nothing_outlives_a_kill_of_what_holds_the_engine(victim: str) -> None:
    mark = os.urandom(8).hex()
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLDS_AN_ENGINE, mark]
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        try:
            place = Path(process.stdout.readline().decode().strip())
            until(lambda: marked(mark), "the container, which `docker run` announces before it has been executed")
            if victim == "test":
                process.kill()
            else:
                child = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0]
                os.kill(int(child), signal.SIGKILL)
                until(lambda: not marked(mark), "the end of the container")
                process.stdin.close()  # it closes what has crashed
            until(lambda: traces(place) == [], "the end of the engine")
        finally:
            process.kill()
    assert marked(mark) == []


def test_a_bad_flag_is_told_and_leaves_nothing(own_engine: OwnEngine) -> None:
    with pytest.raises(EngineError, match="unknown flag: --no-such-flag"):
        own_engine("--no-such-flag")


def test_images_of_any_architecture_entrypoint_and_content(engine: Client, images: Images) -> None:
    before = census(engine)
    made = load_image(engine, "oz-test/arm:1", architecture="arm64", base=False, files={"a/b": (0o600, b"x")})
    facts = "{{.Architecture}} {{.Os}} {{.Config.Entrypoint}}"
    assert engine.read("image", "inspect", "--format", facts, made) == "arm64 linux []"
    own = load_image(
        engine,
        "oz-test/own:1",
        entrypoint=["/bin/echo", "it says"],
        env=["A=b"],
        files={"x/y": (0o755, b"#!/bin/sh\necho $A\n")},
    )
    assert engine.read("run", "--rm", "--network", "none", own, "hello") == "it says hello"
    assert engine.read("run", "--rm", "--network", "none", "--entrypoint", "/x/y", own) == "b"
    assert engine.read("run", "--rm", "--network", "none", images.task, "stat", "-c", "%a", "/tmp") == "1777"
    engine.cli("rmi", made, own)
    audit_engine(before, census(engine))


def test_the_sidecar_runs_the_script_of_the_test(engine: Client, images: Images) -> None:
    before = census(engine)
    filler = engine.read("create", "--volume", "oz-test-agent:/target", images.sidecar, "none")
    engine.cli("cp", "-", f"{filler}:/target", stdin=engine.cli("export", filler).stdout)
    assert [line.split(":")[0] for line in differences(before, census(engine))] == ["containers", "volumes"]
    run = ["run", "--rm", "--network", "none", "--volume", "oz-test-agent:/agent:ro", "--env"]
    agent = [images.task, "/agent/entrypoint.sh", "agent", "run", "--sandboxed"]
    told = engine.cli(*run, 'FAKE_OZ_SCRIPT=echo "$@"; exit 3', *agent, "--task-id", "a b", check=False)
    assert (told.returncode, told.stdout) == (3, b"agent run --sandboxed --task-id a b\n")
    refused = engine.cli(*run, "FAKE_OZ_SCRIPT=echo never", *agent, "--tusk-id", "a", check=False)
    assert (refused.returncode, refused.stdout) == (2, b"")
    engine.cli("rm", filler)
    engine.cli("volume", "rm", "oz-test-agent")
    audit_engine(before, census(engine))
