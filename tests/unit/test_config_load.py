"""Who wins: defaults < file < environment < flags; and what reaches the settings."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

import pytest

from oz_worker.config import flags, paths
from oz_worker.config.load import Loaded, load
from oz_worker.errors import ConfigurationError
from oz_worker.settings import (
    BackendOptions,
    CommandOptions,
    DirectOptions,
    DockerOptions,
    KubernetesOptions,
    LinkOptions,
    Settings,
)

KEY = {"WARP_API_KEY": "wk-test"}


def loaded(directory: Path, text: str, *words: str, environ: dict[str, str] | None = None) -> Loaded:
    argv = list(words)
    if text:
        (directory / "c.yaml").write_text(text)
        argv += ["--config-file", str(directory / "c.yaml")]
    if not any(word.startswith("worker_id") for word in text.split("\n")) and "--worker-id" not in words:
        argv += ["--worker-id", "w"]
    return load(flags.parse(argv), KEY if environ is None else environ)


def refused(directory: Path, text: str, *words: str, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigurationError) as raised:
        loaded(directory, text, *words, environ=environ)
    assert raised.value.exit_code == 2
    return str(raised.value)


def test_defaults_are_those_of_the_option_classes(tmp_path: Path) -> None:
    settings, warnings, origins = loaded(tmp_path, "")
    assert settings == Settings(
        worker_id="w",
        api_key=settings.api_key,
        on_shutdown="cancel",
        state_dir=paths.default_state_dir("w", KEY),
    )
    assert settings.api_key.reveal() == "wk-test"
    assert isinstance(settings.options, DockerOptions)
    assert warnings == ()
    assert origins["worker_id"] == "--worker-id"


OVERRIDES: list[tuple[str, str, list[str], str, Any]] = [
    ("worker_id: f", "worker_id", ["--worker-id", "c"], "f", "c"),
    ("max_concurrent_tasks: 4", "max_concurrent_tasks", ["--max-concurrent-tasks", "0"], "4", 0),
    ("max_concurrent_tasks: 4", "max_concurrent_tasks", ["--max-concurrent-tasks=-1"], "4", 0),
    ("idle_on_complete: 1m", "idle_on_complete", ["--idle-on-complete", "2m"], "1m", "2m"),
    ("cleanup: true", "cleanup", ["--no-cleanup"], "True", False),
    ("log_level: debug", "log_level", ["--log-level", "warning"], "debug", "warn"),
    ("log_format: json", "log_format", ["--log-format", "text"], "json", "text"),
    ("log_file: /f", "log_file", ["--log-file", "/c"], "/f", "/c"),
    ("ca_file: /f", "ca_file", ["--ca-file", "/c"], "/f", "/c"),
    ("state_dir: /f", "state_dir", ["--state-dir", "/c"], "/f", "/c"),
    ("instance_id: f", "instance_id", ["--instance-id", "c"], "f", "c"),
    ("on_shutdown: drain", "on_shutdown", ["--on-shutdown", "preserve"], "drain", "preserve"),
    ("stop_grace: 1s", "stop_grace", ["--stop-grace", "2s"], "1.0", 2.0),
    ("drain_timeout: 1s", "drain_timeout", ["--drain-timeout", "2s"], "1.0", 2.0),
    ("task_timeout: 1h 30m", "task_timeout", ["--task-timeout", "0"], "5400.0", 0.0),
    ("one_shot: false", "one_shot", ["--one-shot"], "False", True),
    ("exit_on_refusal: false", "exit_on_refusal", ["--exit-on-refusal=true"], "False", True),
    ("health_listen: a:1", "health_listen", ["--health-listen", ":2"], "a:1", ":2"),
    ("control_plane: cropscode", "control_plane", ["--control-plane", "oz"], "cropscode", "oz"),
    ("web_socket_url: wss://f", "web_socket_url", ["--web-socket-url", "wss://c/ws"], "wss://f", "wss://c/ws"),
    ("server_root_url: https://f", "server_root_url", ["--server-root-url", "https://c"], "https://f", "https://c"),
    (
        "session_sharing_server_url: wss://f",
        "session_sharing_server_url",
        ["--session-sharing-server-url", "wss://c"],
        "wss://f",
        "wss://c",
    ),
]


@pytest.mark.parametrize(("text", "name", "words", "in_file", "expected"), OVERRIDES, ids=lambda value: str(value))
def test_a_flag_goes_before_the_file(
    tmp_path: Path, text: str, name: str, words: list[str], in_file: str, expected: Any
) -> None:
    assert str(getattr(loaded(tmp_path, text).settings, name)) == in_file
    assert getattr(loaded(tmp_path, text, *words).settings, name) == expected


def test_an_empty_flag_does_not_override_the_file(tmp_path: Path) -> None:
    settings = loaded(tmp_path, "idle_on_complete: 1m\nlog_level: debug", "--idle-on-complete", "", "--log-level=")[0]
    assert (settings.idle_on_complete, settings.log_level) == ("1m", "debug")


def test_groups_reach_their_options(tmp_path: Path) -> None:
    text = (
        "link: {ping_interval: 500ms, acknowledgement: write, refused_backoff: 10m}\nexit_after: {tasks: 3, idle: 1h}\n"
    )
    settings = loaded(tmp_path, text, "--exit-after-uptime", "2h", "--exit-after-tasks", "4")[0]
    assert settings.link == LinkOptions(ping_interval=0.5, acknowledgement="write", refused_backoff=300.0)
    assert (settings.exit_after.tasks, settings.exit_after.idle, settings.exit_after.uptime) == (4, 3600.0, 7200.0)


def test_one_shot_changes_two_defaults_and_only_those(tmp_path: Path) -> None:
    settings = loaded(tmp_path, "", "--one-shot")[0]
    assert (settings.exit_on_refusal, settings.flush_timeout) == (True, 60.0)
    settings = loaded(tmp_path, "one_shot: true\nexit_on_refusal: false\nflush_timeout: 3s")[0]
    assert (settings.exit_on_refusal, settings.flush_timeout) == (False, 3.0)


@pytest.mark.parametrize(
    ("backend", "default"),
    [("docker", "cancel"), ("direct", "cancel"), ("kubernetes", "preserve"), ("command", "preserve")],
)
def test_shutdown_follows_the_backend(tmp_path: Path, backend: str, default: str) -> None:
    text = "backend: {command: {dispatch_command: x}}" if backend == "command" else f"backend: {{{backend}: {{}}}}"
    assert loaded(tmp_path, text).settings.on_shutdown == default
    loaded(tmp_path, text, "--on-shutdown", "preserve")
    if default == "preserve":
        assert "--on-shutdown: on_shutdown 'cancel'" in refused(tmp_path, text, "--on-shutdown", "cancel")


# --- the key -----------------------------------------------------------------------------------------------------


def key_of(directory: Path, flag: str, flag_file: str, variable: str | None, file: str) -> tuple[str, str]:
    words = ["--api-key", flag] if flag else []
    if flag_file:
        (directory / "flag-key").write_text(flag_file)
        words += ["--api-key-file", str(directory / "flag-key")]
    if file:
        (directory / "file-key").write_text(file)
    text = f"api_key_file: {directory / 'file-key'}\n" if file else "cleanup: true\n"
    environ = {} if variable is None else {"WARP_API_KEY": variable}
    settings = loaded(directory, text, *words, environ=environ).settings
    return settings.api_key.reveal(), os.path.basename(settings.api_key_file)


@pytest.mark.parametrize(
    ("flag", "flag_file", "variable", "file", "key", "read_again"),
    [
        ("flag", "", "variable", "file", "flag", ""),
        ("", "flag-file", "variable", "file", "flag-file", "flag-key"),
        ("", "", "variable", "file", "variable", ""),
        ("", "", None, "file", "file", "file-key"),
        ("", "", "", "file", "file", "file-key"),
        ("", "", " \n", " file\r\n", "file", "file-key"),
        ("  flag ", "", None, "", "flag", ""),
        (" ", "", " variable\n", "", "variable", ""),
    ],
)
def test_the_order_of_the_key(
    tmp_path: Path, flag: str, flag_file: str, variable: str | None, file: str, key: str, read_again: str
) -> None:
    assert key_of(tmp_path, flag, flag_file, variable, file) == (key, read_again)


def test_a_key_that_cannot_be_one_is_refused_without_showing_it(tmp_path: Path) -> None:
    for bad in ("wk-secret\nX-Evil: 1", "wk-secret\x7f", "wk-sécret", "wk-secret\r\nHost: x"):
        line = refused(tmp_path, "", environ={"WARP_API_KEY": bad})
        assert line.startswith("$WARP_API_KEY: the API key has a character at position")
        assert "cret" not in line
    (tmp_path / "key").write_text("")
    assert "is empty" in refused(tmp_path, "", "--api-key-file", str(tmp_path / "key"))
    assert "cannot be read" in refused(tmp_path, f"api_key_file: {tmp_path}/none", environ={})
    (tmp_path / "key").write_text("x" * 70_000)
    assert "too large" in refused(tmp_path, "", "--api-key-file", str(tmp_path / "key"))
    assert "stands beside --api-key-file" in refused(tmp_path, "", "--api-key", "a", "--api-key-file", "b")
    assert "no API key: set WARP_API_KEY" in refused(tmp_path, "", environ={"WARP_API_KEY": " "})


def test_the_key_never_shows(tmp_path: Path) -> None:
    result = loaded(tmp_path, "", "-e", "TOKEN=hunter22", "--backend", "direct", environ={"WARP_API_KEY": "wk-hidden"})
    assert "wk-hidden" not in repr(result)
    assert "hunter22" not in repr(result)


# --- variables of tasks ------------------------------------------------------------------------------------------


def environment_of(options: BackendOptions) -> dict[str, str]:
    return dict(options.environment)


@pytest.mark.parametrize(
    ("entry", "expected", "warned"),
    [
        ("A=x", {"A": "x"}, ""),
        ("A=", {"A": ""}, ""),
        ("A", {"A": "from host"}, ""),
        ("NO_PROXY=a,b", {"NO_PROXY": "a,b"}, ""),
        ('J={"a":1,"b":2}', {"J": '{"a":1,"b":2}'}, ""),
        (r"P=C:\dir\x", {"P": r"C:\dir\x"}, ""),
        ("A=b=c", {"A": "b=c"}, ""),
        ("A=  b ", {"A": "  b "}, ""),
        ("A=x,B=y", {"A": "x,B=y"}, "-e: A is one variable, commas included"),
        (r"A=x\,y", {"A": r"x\,y"}, "-e: A keeps its backslash"),
        ("A,NONE", {"A": "from host", "NONE": ""}, "-e: A,NONE is read as 2 variables"),
        ("A,B=y", {"A": "from host", "B": "y"}, "-e: A,B is read as 2 variables"),
        ("NONE", {"NONE": ""}, "-e: NONE is not set in the worker's environment"),
        ("A=two\nlines", {"A": "two\nlines"}, ""),
    ],
)
@pytest.mark.parametrize("backend", ["docker", "direct", "kubernetes", "command"])
def test_variables_of_the_command_line_arrive_unharmed(
    tmp_path: Path, backend: str, entry: str, expected: dict[str, str], warned: str
) -> None:
    text = "backend: {command: {dispatch_command: x}}" if backend == "command" else f"backend: {{{backend}: {{}}}}"
    settings, warnings, _ = loaded(tmp_path, text, "-e", entry, environ={**KEY, "A": "from host"})
    assert environment_of(settings.options) == expected
    assert any(line.startswith(warned) for line in warnings) if warned else not warnings


@pytest.mark.parametrize("entry", ["", "=x", "A B=x", "A\tB=x", "A B", "A,,B", "A,", "A=\0", "A\n=x"])
def test_a_variable_without_a_usable_name_is_refused(tmp_path: Path, entry: str) -> None:
    assert refused(tmp_path, "", f"--env={entry}").startswith("-e: ")


def test_variables_are_file_then_flags(tmp_path: Path) -> None:
    text = """
backend:
  direct:
    environment:
      - {name: A, value: file}
      - {name: B, value: 010}
      - {name: C, value: ""}
      - {name: D}
      - {name: E, value: yes}
      - {name: F, value: ~}
"""
    settings, warnings, origins = loaded(tmp_path, text, "-e", "A=flag", environ={**KEY, "D": "host", "C": "no"})
    assert environment_of(settings.options) == {"A": "flag", "B": "010", "C": "", "D": "host", "E": "yes", "F": ""}
    assert [line.split(": ", 1)[1] for line in warnings] == [
        "F is not set in the worker's environment; tasks get it empty"
    ]
    assert origins["backend.direct.environment"].endswith(" and -e")


# --- backends ----------------------------------------------------------------------------------------------------


def test_another_backend_on_the_command_line_runs_with_its_defaults_and_says_so(tmp_path: Path) -> None:
    settings, warnings, _ = loaded(tmp_path, "backend: {docker: {memory: 1g}}", "--backend", "direct")
    assert settings.options == DirectOptions()
    assert "--backend: direct is used with its defaults; the docker section at" in warnings[0]
    assert "needs `dispatch_command`" in refused(tmp_path, "backend: {docker: {}}", "--backend", "command")
    assert "--backend: expected docker, kubernetes, direct or command, got 'dokcer'; did you mean" in refused(
        tmp_path, "", "--backend", "dokcer"
    )


def test_flags_of_another_backend_are_ignored_with_a_warning(tmp_path: Path) -> None:
    settings, warnings, _ = loaded(tmp_path, "backend: {direct: {}}", "-v", "nonsense", "--engine", "podman")
    assert settings.options == DirectOptions()
    assert sorted(line.split(":")[0] for line in warnings) == ["--engine", "-v"]
    settings, warnings, _ = loaded(tmp_path, "", "--target-dir", "/srv")
    assert settings.options == DockerOptions()
    assert warnings == ("--target-dir: is only for the direct backend and is ignored; the backend is docker",)


def test_volumes_and_engine_and_target_dir(tmp_path: Path) -> None:
    text = "backend: {docker: {volumes: ['/a:/a:ro'], engine: docker, pull_policy: missing}}"
    settings = loaded(tmp_path, text, "-v", "/b:/b:rw,z", "--volumes", "cache:/c", "--engine", "podman")[0]
    assert isinstance(settings.options, DockerOptions)
    assert settings.options.volumes == ("/a:/a:ro", "/b:/b:rw,z", "cache:/c")
    assert (settings.options.engine, settings.options.image_pull_policy) == ("podman", "IfNotPresent")
    assert refused(tmp_path, text, "-v", "/x:/a").endswith("two volumes are mounted at /a; keep one of them")
    assert "give each mount an entry of its own" in refused(tmp_path, "", "-v", "/a:/b,/c:/d")
    direct = loaded(tmp_path, "backend: {direct: {target_dir: /file}}", "--target-dir", "/flag").settings.options
    assert direct == DirectOptions(target_dir="/flag")


def test_a_file_of_seccomp_is_relative_to_the_directory_of_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "profile.json").touch()
    chosen = ("seccomp=profile.json", "seccomp=unconfined", "seccomp:other", "no-new-privileges")
    options = loaded(tmp_path, f"backend: {{docker: {{security_opt: {list(chosen)}}}}}").settings.options
    assert isinstance(options, DockerOptions)
    assert options.security_opt == (f"seccomp={tmp_path}/profile.json", *chosen[1:])


def test_durations_of_the_existing_worker(tmp_path: Path) -> None:
    for text, expected in (("0s", 60.0), ("-5s", 60.0), ("1.5h", 5400.0), ("500us", 0.0005), ("1m30s", 90.0)):
        options = loaded(tmp_path, f"backend: {{command: {{dispatch_command: x, dispatch_timeout: {text}}}}}")[
            0
        ].options
        assert isinstance(options, CommandOptions)
        assert options.dispatch_timeout == pytest.approx(expected)
    for text, expected in (("0s", 0.0), ("0", 0.0), ("-5s", 0.0), ("2m", 120.0)):
        pod = loaded(tmp_path, f"backend: {{kubernetes: {{unschedulable_timeout: {text}}}}}").settings.options
        assert isinstance(pod, KubernetesOptions)
        assert pod.unschedulable_timeout == expected


# --- paths -------------------------------------------------------------------------------------------------------


def test_paths_are_absolute_and_know_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = "log_file: logs/w.log\nca_file: ~/ca.pem\n"
    text += "backend: {direct: {workspace_root: ./ws, oz_path: oz, target_dir: ''}}\n"
    settings = loaded(tmp_path, text, environ={**KEY, "HOME": "/home/somebody"})[0]
    assert settings.log_file == f"{tmp_path}/logs/w.log"
    assert settings.ca_file == "/home/somebody/ca.pem"
    assert settings.options == DirectOptions(workspace_root=f"{tmp_path}/ws", oz_path="oz")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "c.yaml").write_text("worker_id: at-home\n")
    environ = {**KEY, "HOME": str(tmp_path / "home")}
    assert load(argparse.Namespace(config_file="~/c.yaml"), environ).settings.worker_id == "at-home"


def test_dots_in_a_path_are_resolved_as_the_kernel_does(tmp_path: Path) -> None:
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "deep")
    settings = loaded(tmp_path, f"log_file: {tmp_path}/link/../w.log")[0]
    assert settings.log_file == os.path.realpath(tmp_path / "real" / "w.log")


def test_the_state_directory_has_an_order(tmp_path: Path) -> None:
    systemd = {**KEY, "STATE_DIRECTORY": "/var/lib/a:/var/lib/b"}
    assert loaded(tmp_path, "", environ=systemd).settings.state_dir == "/var/lib/a"
    assert loaded(tmp_path, "state_dir: /f", environ=systemd).settings.state_dir == "/f"
    given = loaded(tmp_path, "worker_id: w", environ=systemd)
    assert given.origins["state_dir"] == "$STATE_DIRECTORY"
    assert [warning for warning in given.warnings if "write `state_dir: /var/lib/a` into the file" in warning]
    assert not [line for line in loaded(tmp_path, "state_dir: /f", environ=systemd).warnings if "state_dir" in line]


def test_a_worker_on_kubernetes_has_the_same_instance_on_every_disk(tmp_path: Path) -> None:
    first, again = (loaded(tmp_path, "backend: {kubernetes: {}}").settings.instance_id for _ in range(2))
    assert first == again
    assert re.fullmatch("[0-9a-f]{12}", first)
    other = loaded(tmp_path, "worker_id: other\nbackend: {kubernetes: {}}").settings.instance_id
    assert other != first
    assert loaded(tmp_path, "backend: {kubernetes: {}}", "--instance-id", "mine").settings.instance_id == "mine"
    assert loaded(tmp_path, "backend: {direct: {}}").settings.instance_id == ""


def test_entries_without_a_value_are_ignored_with_a_warning(tmp_path: Path) -> None:
    text = "backend: {docker: {coding_cli_sidecars: {claude: '', codex: image:1, gemini: }}}"
    settings, warnings, _ = loaded(tmp_path, text)
    assert settings.options == DockerOptions(coding_cli_sidecars={"codex": "image:1"})
    assert len(warnings) == 2


def test_worker_ids_become_one_safe_component_of_a_path() -> None:
    assert paths.worker_directory("prod-runner_1.x") == "prod-runner_1.x"
    hostile = ["..", ".", "a/b", "a b", "a_b ", "../../etc", "ü", "x" * 300, "a\0b"]
    names = [paths.worker_directory(worker_id) for worker_id in hostile]
    assert len(set(names)) == len(hostile)
    for name in names:
        assert "/" not in name
        assert name.strip(".")
        assert len(name) < 128
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


def test_what_is_allowed_and_not_meant_is_told(tmp_path: Path) -> None:
    text = "web_socket_url: ws://server.example/ws\nserver_root_url: http://localhost:8080\ncollect_task_logs: true\n"
    warnings = loaded(tmp_path, text, "--collect-task-logs=false", "--api-key", "k").warnings
    for part in ("ws:// sends the API key unencrypted", "server_root_url is this machine", "is accepted and ignored"):
        assert any(part in line for line in warnings), part
    assert any(line.startswith("--api-key: shows the key") for line in warnings)
    assert sum("is accepted and ignored" in line for line in warnings) == 2
