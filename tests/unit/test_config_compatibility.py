"""A configuration that worked with the existing worker works here, with a warning where it was probably not meant."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from oz_worker.config import flags
from oz_worker.config.load import Loaded, load
from oz_worker.settings import CommandOptions, DirectOptions, DockerOptions, KubernetesOptions

FIXTURES = Path(__file__).parent.parent / "fixtures" / "existing_worker"
ENVIRON = {"WARP_API_KEY": "wk-test", "GITHUB_TOKEN": "ghp"}


def fixture(name: str, *words: str) -> Loaded:
    return load(flags.parse(["--config-file", str(FIXTURES / name), *words]), ENVIRON)


def of_text(directory: Path, text: str, *words: str) -> Loaded:
    (directory / "c.yaml").write_text(text)
    return load(flags.parse(["--config-file", str(directory / "c.yaml"), *words]), ENVIRON)


@pytest.mark.parametrize("name", sorted(path.name for path in FIXTURES.glob("*.yaml") if path.name != "oddities.yaml"))
def test_configurations_in_use_load_without_a_warning(name: str) -> None:
    assert fixture(name).warnings == ()


def test_the_docker_example() -> None:
    settings = fixture("docker.yaml").settings
    assert (settings.worker_id, settings.cleanup, settings.max_concurrent_tasks) == ("my-worker", True, 4)
    assert settings.idle_on_complete == "10m"
    assert settings.options == DockerOptions(
        volumes=("/data:/data:ro", "/cache:/cache"),
        environment={"NPM_TOKEN": "your_token", "GITHUB_TOKEN": "ghp"},
    )


def test_the_kubernetes_example_and_the_chart() -> None:
    options = fixture("kubernetes.yaml").settings.options
    assert isinstance(options, KubernetesOptions)
    assert (options.namespace, options.unschedulable_timeout) == ("warp-oz", 120.0)
    task = options.pod_template["containers"][0]
    assert task["resources"] == {"requests": {"cpu": "2", "memory": "4Gi"}}
    assert task["env"][0]["valueFrom"] == {"secretKeyRef": {"name": "my-k8s-secret", "key": "github-token"}}
    options = fixture("chart.yaml").settings.options
    assert isinstance(options, KubernetesOptions)
    assert options.extra_labels == {"team": "platform", "example.com/cost-centre": "42"}
    assert (options.active_deadline_seconds, options.ttl_seconds_after_finished) == (28800, 86400)
    assert options.preflight_resources["limits"] == {"cpu": "100m", "memory": "64Mi"}
    # Kubernetes wants text there, and the existing worker made text of the number.
    assert options.pod_template["containers"][0]["env"] == [{"name": "DEBUG", "value": "1"}]


def test_the_direct_and_command_examples() -> None:
    assert fixture("direct.yaml").settings.options == DirectOptions(
        workspace_root="/var/lib/oz/workspaces",
        oz_path="/usr/local/bin/oz",
        setup_command="/opt/scripts/setup.sh",
        teardown_command="/opt/scripts/teardown.sh",
        environment={"MY_VAR": "hello"},
    )
    settings = fixture("command.yaml").settings
    assert settings.worker_id == "42"
    assert settings.options == CommandOptions(
        dispatch_command="python3 /opt/oz/dispatch.py",
        cancel_command="python3 /opt/oz/cancel.py",
        dispatch_timeout=90.0,
        environment={"QUEUE": "agents", "EMPTY": ""},
    )


def test_oddities_load_each_with_a_warning() -> None:
    settings, warnings, _ = fixture("oddities.yaml")
    assert (settings.worker_id, settings.cleanup, settings.max_concurrent_tasks) == ("007", True, 0)
    assert settings.idle_on_complete == "1.5h"
    assert settings.options == DockerOptions(environment={"COPIED": "2024-01-01", "MERGED": "2024-01-01"})
    for part in (
        "second YAML document",
        "`<<` merges",
        "anchors and aliases",
        "'yes' is read as true",
        "-1 is read as",
    ):
        assert any(part in line for line in warnings), part
    assert any("oz will refuse '1.5h'" in line for line in warnings)
    assert len(warnings) == 6


def test_a_section_with_nothing_under_it_counts_as_absent(tmp_path: Path) -> None:
    settings, warnings, _ = of_text(tmp_path, "worker_id: w\nbackend:\n  docker:\n  direct: {}\n")
    assert settings.options == DirectOptions()
    assert warnings == ()
    settings, warnings, _ = of_text(tmp_path, "worker_id: w\nbackend:\n  direct:\n")
    assert settings.options == DockerOptions()
    assert [line.split("c.yaml:")[1] for line in warnings] == [
        "3:3: `direct:` with nothing under it counts as absent; write `direct: {}` to choose it"
    ]


@pytest.mark.parametrize(
    ("text", "expected"), [("0x10", 16), ("010", 8), ("1_000", 1000), ("4.0", 4), ("4.7", 4), ("0o7", 7)]
)
def test_numbers_as_the_existing_worker_read_them(tmp_path: Path, text: str, expected: int) -> None:
    settings, warnings, _ = of_text(tmp_path, f"worker_id: w\nmax_concurrent_tasks: {text}\n")
    assert settings.max_concurrent_tasks == expected
    assert f"is read as {expected}" in warnings[0]


@pytest.mark.parametrize("value", ["true", "1", "1.10", "2024-01-01", "22:22", "yes", "0x1f", ".5"])
def test_text_fields_keep_the_text_of_what_looks_like_something_else(tmp_path: Path, value: str) -> None:
    text = f"worker_id: {value}\nbackend: {{direct: {{environment: [{{name: A, value: {value}}}]}}}}\n"
    settings = of_text(tmp_path, text).settings
    assert settings.worker_id == value
    assert settings.options == DirectOptions(environment={"A": value})


def test_nothing_after_a_key_is_the_default(tmp_path: Path) -> None:
    text = "worker_id: w\ncleanup:\nmax_concurrent_tasks: ~\nbackend: {direct: {setup_command: null, environment: }}\n"
    settings = of_text(tmp_path, text).settings
    assert (settings.cleanup, settings.max_concurrent_tasks, settings.options) == (True, 0, DirectOptions())


def test_tabs_that_do_not_indent_are_no_mistake(tmp_path: Path) -> None:
    settings = of_text(tmp_path, "worker_id:\tw\t\n\nlog_level: debug\t# why\n\t\nbackend:\n  direct:\t{}\n").settings
    assert (settings.worker_id, settings.log_level, settings.backend) == ("w", "debug", "direct")


def test_a_mark_of_byte_order_and_carriage_returns_are_no_mistake(tmp_path: Path) -> None:
    for data in ("﻿worker_id: w\r\nlog_level: debug\r\n".encode(), "worker_id: w\nlog_level: debug\n".encode("utf-16")):
        (tmp_path / "c.yaml").write_bytes(data)
        settings = load(flags.parse(["--config-file", str(tmp_path / "c.yaml")]), ENVIRON).settings
        assert (settings.worker_id, settings.log_level) == ("w", "debug")


@pytest.mark.parametrize(
    ("text", "warned"),
    [
        ("10m", False),
        ("1h30m", False),
        ("1h 30m", False),
        ("0s", False),
        ("90 seconds", False),
        ("1.5h", True),
        ("soon", True),
        ("-5m", True),
        ("45", True),
    ],
)
def test_idle_on_complete_is_passed_on_and_checked(tmp_path: Path, text: str, warned: bool) -> None:
    settings, warnings, _ = of_text(tmp_path, "worker_id: w\n", f"--idle-on-complete={text}")
    assert settings.idle_on_complete == text
    assert bool(warnings) is warned


def test_command_lines_of_the_documents(tmp_path: Path) -> None:
    words = "--worker-id prod-runner-1 --log-level debug --no-cleanup --max-concurrent-tasks 4 --idle-on-complete 10m "
    words += "-v /opt/shared-cache:/cache:ro -e NPM_TOKEN=your_token -e GITHUB_TOKEN"
    settings, warnings, _ = load(flags.parse(words.split()), ENVIRON)
    assert warnings == ()
    assert (settings.worker_id, settings.log_level, settings.cleanup) == ("prod-runner-1", "debug", False)
    assert settings.options == DockerOptions(
        volumes=("/opt/shared-cache:/cache:ro",), environment={"NPM_TOKEN": "your_token", "GITHUB_TOKEN": "ghp"}
    )
    chart = ["--config-file", str(FIXTURES / "chart.yaml"), "--backend", "kubernetes", "--log-level", "info"]
    chart += ["--web-socket-url", settings.web_socket_url, "--server-root-url", settings.server_root_url]
    assert load(flags.parse(chart), ENVIRON).warnings == ()


def test_a_pod_template_is_passed_on_and_its_typos_are_told(tmp_path: Path) -> None:
    text = """worker_id: w
backend:
  kubernetes:
    pod_template:
      metadata: {labels: {a: b}}
      nodeSelecter: {a: b}
      nodeSelector: {gpu: true}
      securityContext: {runAsUser: 1000, runAsNonRoot: true}
      containers:
        - name: task
          resorces: {}
          command: [sleep, 5]
"""
    settings, warnings, _ = of_text(tmp_path, text)
    assert isinstance(settings.options, KubernetesOptions)
    assert settings.options.pod_template == {
        "nodeSelecter": {"a": "b"},
        "nodeSelector": {"gpu": "true"},
        "securityContext": {"runAsUser": 1000, "runAsNonRoot": True},
        "containers": [{"name": "task", "resorces": {}, "command": ["sleep", "5"]}],
    }
    found = [re.sub(r"^.*?c\.yaml:", "", line) for line in warnings]
    assert found[0].startswith("5:7: pod_template is a PodSpec without `metadata`")
    assert found[1:] == [
        "6:7: no pod has the field 'nodeSelecter'; did you mean 'nodeSelector'?",
        "11:11: no container has the field 'resorces'; did you mean 'resources'?",
    ]
