"""What a task's container is asked for, as a command line, and how its environment gets there."""

from __future__ import annotations

from typing import Any

import pytest

from oz_worker.backends.base import Unit
from oz_worker.backends.container_env import transport
from oz_worker.backends.container_order import Order, order
from oz_worker.backends.resolution import FALLBACK_IMAGE, image_of, sidecars_of
from oz_worker.engines import endpoint_of, environment_for
from oz_worker.model import InstanceShape, Key, Sidecar, TaskSpec, unit_name
from oz_worker.settings import DockerOptions

KEY = Key("task-1", "run-1")


def spec(**changes: Any) -> TaskSpec:
    values: dict[str, Any] = {"key": KEY, "run_id": KEY.task_id, "argv": ("agent", "run"), "environment": {}, **changes}
    return TaskSpec(**values)


PLAIN = DockerOptions()


def ordered(options: DockerOptions = PLAIN, log_driver: str = "json-file", **changes: Any) -> Order:
    wanted = spec(**changes)
    unit = Unit(unit_name(KEY, 1), "inst", KEY, wanted)
    labels = {"instance": "inst", "worker": "w"}
    mounts = ["ozw-agent-1:/agent:ro"]
    return order(
        options,
        unit,
        wanted,
        image="img:1",
        sidecar_mounts=mounts,
        labels=labels,
        log_driver=log_driver,
        log_max=64 << 20,
    )


def values(order: Order, flag: str) -> list[str]:
    arguments = order.arguments
    return [arguments[at + 1] for at, word in enumerate(arguments) if word == flag]


def test_the_plain_order() -> None:
    plain = ordered()
    unit = unit_name(KEY, 1)
    assert plain.arguments[:6] == ("run", "--detach", "--name", f"oz-{unit}", "--pull", "never")
    assert values(plain, "--label") == [
        "oz-worker.instance=inst",
        "oz-worker.worker=w",
        "oz-worker.task=task-1",
        "oz-worker.execution=run-1",
        f"oz-worker.unit={unit}",
        "oz-worker.role=task",
    ]
    assert values(plain, "--workdir") == ["/workspace"]
    assert values(plain, "--entrypoint") == ["/agent/entrypoint.sh"]
    assert values(plain, "--volume") == ["ozw-agent-1:/agent:ro"]
    assert values(plain, "--log-opt") == ["max-size=32m", "max-file=2"]
    assert plain.arguments[-3:] == ("img:1", "agent", "run")
    assert plain.transport == (b"", {})


def test_every_option_and_the_instance_shape_arrive() -> None:
    options = DockerOptions(
        volumes=("/data:/data:ro",),
        platform="linux/amd64",
        network="none",
        user="1000:1000",
        memory="512m",
        cpus="1.5",
        extra_hosts=("db=192.0.2.1",),
        security_opt=("no-new-privileges",),
        pids_limit=100,
    )
    whole = ordered(options)
    expected = {
        "--platform": "linux/amd64",
        "--network": "none",
        "--user": "1000:1000",
        "--cpus": "1.5",
        "--memory": "512m",
        "--memory-swap": "512m",
        "--pids-limit": "100",
        "--add-host": "db:192.0.2.1",
        "--security-opt": "no-new-privileges",
    }
    assert {flag: values(whole, flag) for flag in expected} == {flag: [value] for flag, value in expected.items()}
    assert values(whole, "--volume") == ["ozw-agent-1:/agent:ro", "/data:/data:ro"]
    shaped = ordered(options, shape=InstanceShape(vcpus=4, memory_gb=8))
    assert (values(shaped, "--cpus"), values(shaped, "--memory")) == (["4"], ["8g"])
    assert values(shaped, "--memory-swap") == ["8g"]


def test_an_engine_whose_logs_cannot_be_bounded_is_not_asked_to() -> None:
    assert values(ordered(log_driver="journald"), "--log-opt") == []
    assert values(ordered(log_driver="k8s-file"), "--log-opt") == ["max-size=64m"]


def test_podman_gets_a_working_directory_unless_a_mount_brings_one() -> None:
    assert values(ordered(DockerOptions(engine="podman")), "--volume") == ["ozw-agent-1:/agent:ro", "/workspace"]
    mounted = DockerOptions(engine="podman", volumes=("/src:/workspace",))
    assert values(ordered(mounted), "--volume") == ["ozw-agent-1:/agent:ro", "/src:/workspace"]


def test_two_mounts_at_one_place_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"/own:/agent/ and ozw-agent-1:/agent:ro are mounted at the same place /agent"
    ):
        ordered(DockerOptions(volumes=("/own:/agent/",)))
    with pytest.raises(ValueError, match=r"/b:/x/./y and /a://x/y are mounted at the same place /x/y"):
        ordered(DockerOptions(volumes=("/a://x/y", "/b:/x/./y")))


def test_the_environment_of_the_configuration_wins_and_no_name_comes_twice() -> None:
    mixed = ordered(DockerOptions(environment={"A": "operator"}), environment={"A": "server", "B": "2"})
    assert mixed.transport.file == b"A=operator\nB=2\n"
    assert not any("operator" in word for word in mixed.arguments)


ODD = {
    "PATH": "/x",
    "HOME": "/h",
    "DOCKER_HOST": "tcp://bad:1",
    "https_proxy": "http://p",
    "QUOTES": "a \"b\" 'c' $d `e`",
    "LINES": "one\ntwo",
    "RETURN": "x\r",
    "LONG": "y" * 70_000,
    "#odd": "1",
    "A B": "2",
    "RAW": "\udcff",
    "EMPTY": "",
}


def test_each_variable_takes_the_way_that_is_exact_for_it() -> None:
    sent = transport(ODD, podman=False)
    assert set(sent.passed) == {"LINES", "RETURN", "LONG", "#odd", "A B", "RAW"}
    lines = sent.file.decode().splitlines()
    assert [line.partition("=")[0] for line in lines] == [
        "PATH",
        "HOME",
        "DOCKER_HOST",
        "https_proxy",
        "QUOTES",
        "EMPTY",
    ]
    assert sent.arguments()[:2] == ["--env-file", "/dev/stdin"]
    assert sent.arguments()[2:] == [word for name in sent.passed for word in ("-e", name)]


def test_podman_is_given_by_file_what_is_plain_and_what_must_not_reach_its_program() -> None:
    sent = transport(ODD, podman=True)
    assert [line.partition(b"=")[0] for line in sent.file.splitlines()] == [
        b"PATH",
        b"HOME",
        b"DOCKER_HOST",
        b"https_proxy",
        b"EMPTY",
    ]


@pytest.mark.parametrize("name", ["PATH", "HOME", "DOCKER_HOST", "ld_preload", "GODEBUG", "OTEL_X", "NO_PROXY"])
def test_a_name_that_means_something_to_the_program_and_does_not_fit_a_line_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"the variable {name} cannot be given .* more than one line"):
        transport({name: "a\nb"}, podman=False)


def test_what_no_process_can_be_given_is_refused() -> None:
    with pytest.raises(ValueError, match="the variable BIG is longer than the 128 KiB"):
        transport({"BIG": "x\n" * 70_000}, podman=False)


def test_the_image_and_the_sidecars_of_a_task() -> None:
    assert image_of(spec(docker_image="own:1"), "default:1") == "own:1"
    assert image_of(spec(), "default:1") == "default:1"
    assert image_of(spec(), "") == FALLBACK_IMAGE
    given = (Sidecar("agent:1", "/agent"), Sidecar("tools:1", "/tools/", read_write=True))
    assert sidecars_of(spec(sidecars=given), "", {}) == given
    assert sidecars_of(spec(sidecars=given), "mine:2", {})[0] == Sidecar("mine:2", "/agent")
    assert sidecars_of(spec(), "mine:2", {}) == (Sidecar("mine:2", "/agent"),)
    oddly = (Sidecar("agent:1", "//agent/."),)
    assert sidecars_of(spec(sidecars=oddly), "mine:2", {}) == (Sidecar("mine:2", "//agent/."),)
    relative = (Sidecar("agent:1", "agent"),)
    assert len(sidecars_of(spec(sidecars=relative), "mine:2", {})) == 2, "which is refused, and not taken for /agent"
    claude = spec(harness="claude", sidecars=given)
    assert sidecars_of(claude, "", {"claude": "cli:3"})[2] == Sidecar("cli:3", "/mnt/claude-cli-sidecar")
    brought = (*given, Sidecar("cli:1", "/mnt/claude-cli-sidecar/"))
    assert sidecars_of(spec(harness="claude", sidecars=brought), "", {"claude": "cli:3"})[2].image == "cli:3"


def test_which_engine_is_meant(tmp_path: Any) -> None:
    assert endpoint_of("docker", {"DOCKER_HOST": "tcp://a:1", "HOME": "/"}) == "docker tcp://a:1"
    assert endpoint_of("docker", {"DOCKER_CONTEXT": "far"}) == "docker context far"
    (tmp_path / "config.json").write_text('{"currentContext": "lab"}')
    assert endpoint_of("docker", {"DOCKER_CONFIG": str(tmp_path)}) == "docker context lab"
    (tmp_path / "config.json").write_text('["no object"]')
    assert endpoint_of("docker", {"DOCKER_CONFIG": str(tmp_path)}) == "docker of this host"
    assert endpoint_of("podman", {}) == "podman of this host"


def test_the_socket_of_a_rootless_engine_is_found_where_nothing_else_is_said(tmp_path: Any) -> None:
    (tmp_path / ".docker" / "run").mkdir(parents=True)
    (tmp_path / ".docker" / "run" / "docker.sock").touch()
    home, nowhere = {"HOME": str(tmp_path)}, str(tmp_path / "none")
    found = f"unix://{tmp_path}/.docker/run/docker.sock"
    assert environment_for("docker", home, nowhere) == {**home, "DOCKER_HOST": found}
    assert environment_for("docker", home, str(tmp_path)) == home, "the default socket exists"
    for said in ({"DOCKER_HOST": "tcp://a:1"}, {"DOCKER_CONTEXT": "far"}):
        assert environment_for("docker", {**home, **said}, nowhere) == {**home, **said}
    assert environment_for("podman", home, nowhere) == home
    runtime = {"HOME": "/nowhere", "XDG_RUNTIME_DIR": str(tmp_path / ".docker" / "run")}
    assert environment_for("docker", runtime, nowhere)["DOCKER_HOST"] == found
