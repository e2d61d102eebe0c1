"""Files and directories: what cannot be read, written or taken, and that a running worker is not disturbed."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from oz_worker.checks import host, places
from oz_worker.redact import Secret
from oz_worker.settings import DirectOptions, Settings
from tests.checks.asked import KEY, asked, command, found
from tests.rawserver import RawServer, refused_port
from tests.rig import Rig, until


def settings(place: Path, **more: Any) -> Settings:
    defaults: dict[str, Any] = {"api_key": Secret(KEY), "state_dir": str(place / "state")}
    options = DirectOptions(workspace_root=str(place / "ws"))
    return Settings(worker_id="w", backend="direct", options=options, **{**defaults, **more})


def test_a_key_file_for_all_to_read_and_one_that_went_away(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(KEY + "\n")
    file.chmod(0o644)
    chosen = settings(tmp_path, api_key_file=str(file))
    shown = found(places.probes(chosen, {}, "api_key_file"))
    assert shown["key"].outcome.value == "warning"
    assert shown["key"].cure == f"chmod 600 {file}"
    file.chmod(0o600)
    assert found(places.probes(chosen, {}, "api_key_file"))["key"].outcome.value == "ok"
    file.write_text("two words")
    assert "holds blanks" in found(places.probes(chosen, {}, "api_key_file"))["key"].said
    file.unlink()
    shown = found(places.probes(chosen, {}, "api_key_file"))
    assert shown["key"].outcome.value == "failed"
    assert f"the key file {file} cannot be read" in shown["key"].said


def test_a_log_file_that_a_worker_could_not_open(tmp_path: Path) -> None:
    for file in (tmp_path / "missing" / "worker.log", tmp_path):
        shown = found(places.probes(settings(tmp_path, log_file=str(file)), {}, "x"))
        assert shown["log"].outcome.value == "failed"
        assert f"log_file {file} cannot be opened" in shown["log"].said
    file = tmp_path / "worker.log"
    for content in (None, "a line\n"):
        if content is not None:
            file.write_text(content)
        shown = found(places.probes(settings(tmp_path, log_file=str(file)), {}, "x"))
        assert shown["log"].outcome.value == "ok"
        assert sorted(tmp_path.iterdir()) == ([file] if content else []), "nothing is left behind"


@pytest.fixture
def tiny(tmp_path: Path) -> Any:
    """A disk of 1 MiB with room for few files."""
    place = tmp_path / "tiny"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=50", "tmpfs", str(place)], check=True)
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_disks_that_are_low_full_or_read_only(tmp_path: Path, tiny: Path) -> None:
    shown = found(places.probes(settings(tiny), {}, "x"))
    assert shown["state"].outcome.value == "ok"
    assert f"{tiny} has 1 MiB free, min_free_disk asks for 512" in shown["disk"].said
    assert found(places.probes(settings(tiny, min_free_disk=0, min_free_inodes=0), {}, "x"))["disk"].said.startswith(
        "at least 1 MiB free"
    )
    shown = found(places.probes(settings(tiny, min_free_disk=0, min_free_inodes=100), {}, "x"))
    assert "inodes free, min_free_inodes asks for 100" in shown["disk"].said
    subprocess.run(["mount", "-o", "remount,ro", str(tiny)], check=True)
    for place in (tiny, tiny / "deep"):
        shown = found(places.probes(settings(tmp_path, state_dir=str(place)), {}, "x"))
        assert f"the state directory {place} cannot be used (Read-only file system)" in shown["state"].said
        assert shown["instance"].outcome.value == "skipped"
    (tmp_path / "file").touch()
    shown = found(places.probes(settings(tmp_path, state_dir=str(tmp_path / "file" / "below")), {}, "x"))
    assert "Not a directory" in shown["state"].said


def test_a_check_beside_a_running_worker_tells_of_it_and_does_not_disturb_it(rig: Rig) -> None:
    listen = f"127.0.0.1:{refused_port()}"
    worker = rig.start("--instance-id", "pinned", "--health-listen", listen)
    connections = len(rig.plane.connections)
    config = {**rig.config, "web_socket_url": rig.plane.url, "instance_id": "pinned", "health_listen": listen}
    before = {path: path.stat().st_ino for path in rig.state_dir.rglob("*")}
    answer = asked(rig.place, config, WARP_API_KEY=rig.plane.key)
    assert answer.code == 0, answer.all_text
    assert answer.results()["instance"] == "warning"
    assert answer.tests["instance"]["said"] == f"the instance pinned is held by process {worker.pid}"
    assert answer.results()["ports"] == "warning"
    assert f"it may be process {worker.pid}, the worker that runs here" in answer.tests["ports"]["said"]
    assert answer.results()["server"] == "skipped"
    assert f"process {worker.pid}, which runs with this worker id; its own link: connected" in answer.all_text
    assert answer.results()["clock"] == "ok"
    assert {path: path.stat().st_ino for path in rig.state_dir.rglob("*")} == before
    other = asked(rig.place, {**config, "worker_id": "another", "instance_id": "other"}, WARP_API_KEY=rig.plane.key)
    assert other.tests["instance"]["said"] == f"process {worker.pid} holds pinned"
    assert other.results()["server"] == "ok", "an id that no worker here has is tried"
    assert len(rig.plane.connections) == connections + 1
    task = rig.submit("exit 0")
    rig.plane.wait_acknowledged(task)
    assert worker.stop() == 0
    rig.audit()


@pytest.mark.parametrize("why", ["refused", "disconnected"])
def test_a_worker_that_does_not_connect_says_so_through_the_check(rig: Rig, why: str) -> None:
    """Whatever is wrong; with its age, because what was refused may have been put right since."""
    said = {"refused": "does not know the API key", "disconnected": "refused the connection"}[why]
    url = rig.plane.url if why == "refused" else f"ws://127.0.0.1:{refused_port()}/"
    worker = rig.start("--web-socket-url", url, env={"WARP_API_KEY": "wk-wrong"}, connected=False)
    worker.wait_log(said)
    until(lambda: f"link: {why}" in rig.run_command("status", "--state-dir", str(rig.state_dir)).stdout, "the fact")
    with RawServer(lambda peer: peer.refuse("404 Not Found")) as far:  # what is asked anew is fine
        answer = asked(rig.place, {**rig.config, "web_socket_url": far.url}, WARP_API_KEY="wk-wrong")
    assert (answer.code, answer.results()["server"]) == (3, "failed"), answer.all_text
    words = rf"not tried beside process {worker.pid}, .*; its own link: {why} for \S+ \(.*{said}.*\); tried .*next try"
    assert re.match(words, answer.tests["server"]["said"])
    worker.kill()
    rig.audit()


def test_a_wrong_configuration_is_one_failed_test_and_exit_2(tmp_path: Path) -> None:
    answer = asked(tmp_path, {"worker_id": "w", "wroker": 1, "stop_grace": "5"})
    assert answer.code == 2
    assert answer.results() == {"configuration": "failed"}
    said = answer.tests["configuration"]["said"]
    assert "unknown key 'wroker'" in said
    assert "stop_grace" in said
    assert command(tmp_path, {"worker_id": "w", "wroker": 1}).stdout == ""
    answer = asked(tmp_path, {"worker_id": "w"}, WARP_API_KEY="")
    assert answer.tests["configuration"]["said"].startswith("no API key: set WARP_API_KEY")
    assert answer.tests["configuration"]["cure"] == "do what each of these lines says"  # no place is named above
    answer = asked(tmp_path, {"worker_id": "w"}, "--api-key-file", str(tmp_path / "none"))
    assert answer.code == 2
    assert "key file" in answer.tests["configuration"]["said"]


def test_what_the_environment_asks_for_and_what_cannot_start_here(tmp_path: Path) -> None:
    chosen = settings(tmp_path)
    cases: list[tuple[dict[str, str], str, str]] = [
        ({}, "ok", "nothing is missing"),
        ({"OTEL_METRICS_EXPORTER": "prometheus,console", "OTEL_TRACES_EXPORTER": "none"}, "ok", "nothing is missing"),
        ({"OTEL_METRICS_EXPORTER": "oltp"}, "warning", "OTEL_METRICS_EXPORTER names 'oltp', which this"),
        ({"OTEL_TRACES_EXPORTER": "prometheus"}, "warning", "OTEL_TRACES_EXPORTER names 'prometheus', which"),
        (
            {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"},
            "warning",
            "OTEL_EXPORTER_OTLP_PROTOCOL is 'http/json', which this worker does not speak",
        ),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "nonsense"}, "warning", "OTEL_EXPORTER_OTLP_ENDPOINT is "),  # unset means otlp
        ({"OTEL_TRACES_EXPORTER": "oltp", "OTEL_SDK_DISABLED": "true"}, "ok", "nothing is missing"),
        ({"OTEL_METRICS_EXPORTER": "oltp,none"}, "ok", "nothing is missing"),
    ]
    for environ, outcome, said in cases:
        extras = found(host.probes(chosen, environ))["extras"]
        assert (extras.outcome.value, said in extras.said) == (outcome, True), extras
        assert bool(extras.cure) == (outcome == "warning")
    shown = found(host.probes(settings(tmp_path, control_plane="cropscode"), {}))
    assert "control_plane cropscode is not in this version" in shown["platform"].said


def test_a_machine_for_which_there_are_no_agents(tmp_path: Path) -> None:
    """A warning: what would fail is the agent, which is tried itself. The kernel itself claims to be another."""
    script = (
        "import sys; from oz_worker.checks import host; from oz_worker.settings import DirectOptions, Settings\n"
        "direct = DirectOptions(workspace_root=sys.argv[1], oz_path='/bin/true')\n"
        "print(host._platform(Settings(worker_id='w', backend='direct', options=direct, state_dir=sys.argv[1])))\n"
    )
    root = Path(places.__file__).parents[2]
    words = ["setarch", "i686", sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=True)
    assert "i686, Python" in done.stdout
    assert "agents are built for amd64 and arm64 only" in done.stdout
    assert "WARNING" in done.stdout


def test_ports_that_are_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as other:
        port, own = taken.getsockname()[1], other.getsockname()[1]
        other.close()
        exporter = {"OTEL_METRICS_EXPORTER": "prometheus", "OTEL_EXPORTER_PROMETHEUS_HOST": "127.0.0.1"}
        busy = {**exporter, "OTEL_EXPORTER_PROMETHEUS_PORT": str(port)}
        for address, environ, outcome, said in (
            ("", {}, "ok", "none are asked for"),
            (f"127.0.0.1:{own}", {}, "ok", "can be had"),
            (f"127.0.0.1:{port}", {}, "failed", "health_listen: 127.0.0.1:"),
            ("192.0.2.1:80", {}, "failed", "cannot be had"),
            ("", busy, "warning", "OTEL_EXPORTER_PROMETHEUS_PORT: 127.0.0.1:"),
            (
                "",
                {**exporter, "OTEL_EXPORTER_PROMETHEUS_HOST": "no.invalid"},
                "warning",
                "PROMETHEUS_HOST: no.invalid:",
            ),
            ("", {**exporter, "OTEL_EXPORTER_PROMETHEUS_PORT": "x"}, "warning", "is 'x', which is no port"),
        ):
            ports = found(host.probes(settings(tmp_path, health_listen=address), environ))["ports"]
            assert (ports.outcome.value, said in ports.said) == (outcome, True), ports


def test_an_extra_that_is_not_installed_is_named(tmp_path: Path) -> None:
    """An interpreter without site-packages stands for an installation without extras."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from oz_worker.checks import host\n"
        "for protocol in ('http/protobuf', 'grpc'):\n"
        "    print(host._extras({'OTEL_METRICS_EXPORTER': 'otlp', 'OTEL_EXPORTER_OTLP_PROTOCOL': protocol}))\n"
    )
    root = Path(places.__file__).parents[2]
    done = subprocess.run([sys.executable, "-S", "-c", script, str(root)], capture_output=True, text=True, check=True)
    assert "pip install 'oz-worker[otel]'" in done.stdout
    assert "pip install 'oz-worker[otel-grpc]'" in done.stdout
