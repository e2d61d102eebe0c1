"""Every mistake has its place, its cause and its cure, and all are told at once."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from oz_worker.config.load import load
from oz_worker.errors import ConfigurationError

KEY = {"WARP_API_KEY": "wk-test"}


def problems(directory: Path, text: str | bytes, flags: argparse.Namespace | None = None) -> tuple[str, ...]:
    file = directory / "c.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    arguments = flags or argparse.Namespace()
    arguments.config_file = str(file)
    with pytest.raises(ConfigurationError) as raised:
        load(arguments, KEY)
    return tuple(line.replace(str(file), "c.yaml") for line in raised.value.problems)


def direct(line: str) -> str:
    return f"worker_id: w\nbackend:\n  direct:\n    {line}\n"


def docker(line: str) -> str:
    return f"worker_id: w\nbackend:\n  docker:\n    {line}\n"


def kubernetes(line: str) -> str:
    return f"worker_id: w\nbackend:\n  kubernetes:\n    {line}\n"


def top(line: str) -> str:
    return f"worker_id: w\n{line}\n"


MISTAKES = [
    # what is not YAML, or hurts
    ("", "c.yaml: is empty", "config.example.yaml"),
    ("# nothing\n", "c.yaml: is empty", "config.example.yaml"),
    ("[a]", "c.yaml:1:1: keys like `worker_id: my-worker` belong here, not a list", ""),
    ("worker_id: w\n\tlog_level: info\n", "c.yaml:2:1: a tab", "indent with spaces"),
    ("backend:\n  direct:\n\t  cgroup: off\n", "c.yaml:3:1: a tab", "indent with spaces"),
    (b"worker_id: w\nlog_file: '\xff'\n", "c.yaml:2:12: is not UTF-8 from here on", "save the file as UTF-8"),
    (b"worker_id: w\nlog_file: '\x07'\n", "c.yaml:2:12: has the control character U+0007", "remove it"),
    ("worker_id: w\nlog_level: a: b\n", "c.yaml:2:13: is not YAML", "check indentation"),
    ("worker_id: 'w\n", "c.yaml:2:1: is not YAML", "quotes"),
    ("worker_id: *nobody\n", "c.yaml:1:12: is not YAML", "nobody"),
    ("a: &a [*a]\n", "c.yaml:1:4: this anchor contains an alias of itself", "write the values out"),
    ("a: &a {b: *a}\n", "c.yaml:1:4: this anchor contains an alias of itself", ""),
    ("a: " + "[" * 60, "c.yaml:1:43: is nested deeper than 40 levels", ""),
    ("a: [" + "x," * 20_001 + "]", "c.yaml:1:39999: has more than 20000 values", ""),
    ("a: " + "x" * 1024 * 1024, "c.yaml: is larger than 1 MiB", "is it the right file?"),
    ("? [a, b]\n: c\n", "c.yaml:1:3: a key must be a word", ""),
    ("<<: 7\n", "c.yaml:1:5: `<<` needs a mapping, not a whole number", ""),
    # keys
    (top("worker_id: x"), "c.yaml:2:1: the key 'worker_id' stands here and at c.yaml:1:1", "keep one of the two"),
    (
        top("max_concurent_tasks: 4"),
        "c.yaml:2:1: unknown key 'max_concurent_tasks'",
        "did you mean 'max_concurrent_tasks'?",
    ),
    (top("workerId: x"), "c.yaml:2:1: unknown key 'workerId'", "did you mean 'worker_id'?"),
    (top("backends: {}"), "c.yaml:2:1: unknown key 'backends'", "did you mean 'backend'?"),
    (top("1: x"), "c.yaml:2:1: unknown key '1'", "known here"),
    (top("volumes: []"), "c.yaml:2:1: unknown key 'volumes'", "it belongs in backend.docker"),
    (top("docker: {}"), "c.yaml:2:1: unknown key 'docker'", "it belongs in backend"),
    (top("dead_after: 3s"), "c.yaml:2:1: unknown key 'dead_after'", "it belongs in link"),
    (direct("worker_id: x"), "c.yaml:4:5: unknown key 'worker_id' in backend.direct", "the top level"),
    (direct("workspace_rot: /x"), "c.yaml:4:5: unknown key 'workspace_rot' in backend.direct", "'workspace_root'?"),
    (top("link: {dead_afer: 3s}"), "c.yaml:2:8: unknown key 'dead_afer' in link", "did you mean 'dead_after'?"),
    (top("exit_after: 7"), "c.yaml:2:13: `exit_after` is a section, not a whole number", ""),
    (top("backend: docker"), "c.yaml:2:10: `backend` is a section, not text", "write `docker: {}` below it"),
    (top("backend: {dokcer: {}}"), "c.yaml:2:11: unknown backend 'dokcer'", "did you mean 'docker'?"),
    (top("backend: {docker: {}, direct: {}}"), "c.yaml:2:23: a second backend beside 'docker' (c.yaml:2:11)", ""),
    (top("api_key: wk-inline-secret"), "c.yaml:2:1: `api_key`: a key does not belong in this file", "`api_key_file`"),
    # values
    (top("cleanup: maybe"), "c.yaml:2:10: `cleanup`: expected true or false, got 'maybe'", ""),
    (top("cleanup: 1"), "c.yaml:2:10: `cleanup`: expected true or false, got '1'", ""),
    (top("cleanup: [true]"), "c.yaml:2:10: `cleanup`: expected a single value, got a list", ""),
    (top("max_concurrent_tasks: '4'"), "c.yaml:2:23: `max_concurrent_tasks`: expected a whole number", "quotes away"),
    (top("max_concurrent_tasks: four"), "c.yaml:2:23: `max_concurrent_tasks`: expected a whole number", "like 4"),
    (top("max_concurrent_tasks: .inf"), "c.yaml:2:23: `max_concurrent_tasks`: expected a whole number", ""),
    (top(f"max_concurrent_tasks: {'9' * 5000}"), "c.yaml:2:23: `max_concurrent_tasks`: expected a whole number", ""),
    (top("min_free_inodes: -1"), "c.yaml:2:18: `min_free_inodes`: '-1' is out of range", ""),
    (top("stop_grace: 10"), "c.yaml:2:13: `stop_grace`: '10' has no unit; write 10s for seconds", ""),
    (top("stop_grace: soon"), "c.yaml:2:13: `stop_grace`: 'soon' is not a duration; write it like 90s", ""),
    (top("stop_grace: -3s"), "c.yaml:2:13: `stop_grace`: '-3s' is negative", "0s"),
    (top("stop_grace: 9999999h"), "c.yaml:2:13: `stop_grace`: '9999999h' is more than a hundred years", ""),
    (top("task_log_max: 64M"), "c.yaml:2:15: `task_log_max`: '64M' is not a size; write it like 64MiB", ""),
    (top("log_level: verbose"), "c.yaml:2:12: `log_level`: expected debug, info, warn or error, got 'verbose'", ""),
    (top("log_level: wran"), "c.yaml:2:12: `log_level`: expected", "did you mean 'warn'?"),
    (top("instance_id: Rack_4"), "c.yaml:2:14: `instance_id`: 'Rack_4' is not of the form [a-z0-9-]{1,40}", ""),
    (top("health_listen: 8080"), "c.yaml:2:16: `health_listen`: '8080' is not host:port", "127.0.0.1:8080"),
    (top("health_listen: a:99999"), "c.yaml:2:16: `health_listen`: 'a:99999' is not host:port", ""),
    (
        top("web_socket_url: https://x/ws"),
        "c.yaml:2:17: `web_socket_url`: is not an address that begins with wss://",
        "",
    ),
    (top("web_socket_url: wss://u:p@x/ws"), "c.yaml:2:17: `web_socket_url`: contains a user or a password", ""),
    (top("web_socket_url: ''"), "c.yaml:2:17: web_socket_url is empty", ""),
    (top("server_root_url: x"), "c.yaml:2:18: `server_root_url`: is not an address", ""),
    (top("server_root_url: http://h:99999999"), "c.yaml:2:18: `server_root_url`: is not an address", ""),
    (top('log_file: "a\\nb"'), "c.yaml:2:11: `log_file`: contains the control character U+000A", ""),
    ("worker_id: warp-1\n", "c.yaml:1:12: `worker_id`: 'warp-1' begins with `warp`, which is reserved", "choose"),
    ('worker_id: "a\\tb"\n', "c.yaml:1:12: `worker_id`: contains the control character U+0009", ""),
    ("worker_id: {a: b}\n", "c.yaml:1:12: `worker_id`: expected a single value, got a mapping", ""),
    ("worker_id: ''\n", "no worker id", "--worker-id"),
    ("log_level: info\n", "no worker id", "`worker_id` in the file"),
    (top("link: {ping_interval: 0}"), "c.yaml:2:23: `ping_interval`: must be longer than 0s", ""),
    (top("link: {ping_interval: 40s}"), "c.yaml:2:23: link.ping_interval must be shorter than link.dead_after", ""),
    (top("link: {backoff_min: 2m}"), "c.yaml:2:21: link.backoff_min must be shorter than link.backoff_max", ""),
    # direct
    (direct("workspace_root: /"), "c.yaml:4:21: `workspace_root`: must be a directory of its own, not /", ""),
    (direct("environment: {A: b}"), "c.yaml:4:18: `environment`: expected a list of `- name: NAME`", ""),
    (direct("environment: [A=b]"), "c.yaml:4:19: expected `- name: NAME` with `value: TEXT`", ""),
    (direct("environment: [{value: x}]"), "c.yaml:4:19: the entry has no name", ""),
    (direct("environment: [{name: ''}]"), "c.yaml:4:26: the name of the variable is empty", ""),
    (direct("environment: [{name: A B}]"), "c.yaml:4:26: 'A B' cannot be the name of a variable", "remove the space"),
    (
        direct('environment: [{name: "A\\tB"}]'),
        "c.yaml:4:26: the name of the variable contains the control character U+0009",
        "",
    ),
    (direct("environment: [{name: A, valeu: x}]"), "c.yaml:4:29: unknown key 'valeu'", "did you mean 'value'?"),
    (direct("environment: [{name: A, value: [x]}]"), "c.yaml:4:36: the value of A expected a single value", ""),
    (direct("inherit_environment: [~]"), "c.yaml:4:27: the entry is empty", ""),
    (direct("harness_config_dirs: [x]"), "c.yaml:4:26: `harness_config_dirs`: expected a mapping", ""),
    (direct('setup_command: "a\\0b"'), "c.yaml:4:20: `setup_command`: contains a character", ""),
    # command
    (top("backend: {command: {}}"), "c.yaml:2:11: the command backend needs `dispatch_command`", ""),
    (top("backend: {command: {dispatch_command: ' '}}"), "c.yaml:2:11: the command backend needs", ""),
    (
        top("on_shutdown: drain\nbackend: {command: {dispatch_command: x}}"),
        "c.yaml:2:14: on_shutdown 'drain' is not possible with the command backend",
        "preserve",
    ),
    (
        top("backend: {command: {dispatch_command: x, dispatch_timeout: 60}}"),
        "c.yaml:2:60: `dispatch_timeout`: '60' has no unit",
        "60s",
    ),
    # docker
    (docker("volumes: /a:/b"), "c.yaml:4:14: `volumes`: expected a list", ""),
    (docker("volumes: [/a:b]"), "c.yaml:4:15: 'b' is not a place in the container", "absolute"),
    (docker("volumes: [/a:/]"), "c.yaml:4:15: '/' is not a place in the container", ""),
    (docker("volumes: [./a:/b]"), "c.yaml:4:15: './a' is neither an absolute path", "volume"),
    (docker("volumes: [/a:/b:rx]"), "c.yaml:4:15: 'rx' is not a mode of a mount; write ro or rw", ""),
    (docker("volumes: [nonsense]"), "c.yaml:4:15: 'nonsense' is not of the form HOST:CONTAINER", ""),
    (docker("volumes: [/a:/b/..]"), "c.yaml:4:15: '/b/..' is not a place in the container", "below /"),
    (docker("volumes: ['/a:/b:ro:x']"), "c.yaml:4:15: '/a:/b:ro:x' is not of the form HOST:CONTAINER", ""),
    (docker("volumes: [/a:/x/y, /b://x/./y]"), "c.yaml:4:14: two volumes are mounted at /x/y", ""),
    (docker("volumes: [/a:/x, /b:/x/]"), "c.yaml:4:14: two volumes are mounted at /x", ""),
    (docker("engine: dockre"), "c.yaml:4:13: `engine`: expected docker or podman, got 'dockre'", "mean 'docker'?"),
    (docker("sidecar_image: ' '"), "c.yaml:4:20: `sidecar_image`: ' ' is not an image", "write it like"),
    (docker("default_image: Ubuntu"), "c.yaml:4:20: `default_image`: 'Ubuntu' is not an image", "lower case"),
    (docker("default_image: a b"), "c.yaml:4:20: `default_image`: 'a b' is not an image", ""),
    (docker("image_pull_policy: Alwais"), "c.yaml:4:24: `image_pull_policy`: expected Always,", "mean 'Always'?"),
    (docker("{pull_policy: never, image_pull_policy: Never}"), "c.yaml:4:26: `image_pull_policy` says the same", ""),
    (docker("platform: amd64"), "c.yaml:4:15: `platform`: 'amd64' is not of the form linux/amd64", ""),
    (docker("memory: lots"), "c.yaml:4:13: `memory`: 'lots' is not of the form 512m or 4g", ""),
    (docker("cpus: two"), "c.yaml:4:11: `cpus`: 'two' is not of the form 2 or 0.5", ""),
    (docker("extra_hosts: [a]"), "c.yaml:4:19: 'a' is not of the form name:192.0.2.1", ""),
    (docker("extra_hosts: ['a:1.2.3']"), "c.yaml:4:19: 'a:1.2.3' is not of the form name:192.0.2.1", ""),
    # kubernetes
    (kubernetes("namespace: My_Space"), "c.yaml:4:16: `namespace`: 'My_Space' is not a namespace", ""),
    (
        kubernetes("workspace_size_limit: 10 GB"),
        "c.yaml:4:27: `workspace_size_limit`: '10 GB' is not a quantity",
        "10Gi",
    ),
    (kubernetes("extra_labels: {a b: c}"), "c.yaml:4:20: 'a b' is not a key", "example.com/team"),
    (kubernetes("extra_labels: {a: b c}"), "c.yaml:4:20: 'b c' cannot be a label", ""),
    (kubernetes("active_deadline_seconds: 0"), "c.yaml:4:30: `active_deadline_seconds`: '0' is out of range", ""),
    (kubernetes("ttl_seconds_after_finished: -1"), "c.yaml:4:33: `ttl_seconds_after_finished`: '-1' is out of", ""),
    (kubernetes("preflight_resources: {limits: {cpu: much}}"), "c.yaml:4:36: 'much' is not a quantity", ""),
    (kubernetes("pod_template: []"), "c.yaml:4:19: `pod_template`: expected a mapping", ""),
    (kubernetes("pod_template: {containers: {}}"), "c.yaml:4:32: containers must be a list", ""),
    (kubernetes("pod_template: {containers: [{image: x}]}"), "c.yaml:4:33: a container needs a name", ""),
    (
        "worker_id: w\non_shutdown: cancel\nbackend: {kubernetes: {}}\n",
        "c.yaml:2:14: on_shutdown 'cancel' is not possible with the kubernetes backend",
        "",
    ),
    *(
        (kubernetes(f"{name}: x"), f"c.yaml:4:5: `{name}`: this key is retired", "pod_template")
        for name in (
            "image_pull_secret",
            "service_account",
            "node_selector",
            "tolerations",
            "resources",
            "termination_grace_period_seconds",
            "environment",
        )
    ),
]


@pytest.mark.parametrize(("text", "start", "cure"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_is_told_with_its_place_and_its_cure(
    tmp_path: Path, text: str | bytes, start: str, cure: str
) -> None:
    about_id = "worker_id" in start or "no worker" in start  # then one sentence must be enough
    (line,) = [line for line in problems(tmp_path, text) if about_id or not line.startswith("no worker id")]
    assert line.startswith(start)
    assert cure in line


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = "wroker_id: w\nstop_grace: 5\nbackend:\n  direct:\n    cgrup: auto\n    environment:\n      - name: A B\n"
    flags = argparse.Namespace(max_concurrent_tasks="many", env=["=x"])
    assert [line[:40] for line in problems(tmp_path, text, flags)] == [
        "c.yaml:1:1: unknown key 'wroker_id'; did",
        "c.yaml:2:13: `stop_grace`: '5' has no un",
        "c.yaml:5:5: unknown key 'cgrup' in backe",
        "c.yaml:7:15: 'A B' cannot be the name of",
        "--max-concurrent-tasks: expected a whole",
        "-e: the name of the variable is empty",
        "no worker id: give --worker-id, or `work",
    ]


def test_what_is_wrong_is_not_said_to_be_missing_as_well(tmp_path: Path) -> None:
    (line,) = problems(tmp_path, "log_level: info\n", argparse.Namespace(worker_id="warp-x"))
    assert line.startswith("--worker-id: 'warp-x' begins with `warp`")
    (line,) = problems(tmp_path, "worker_id: w\nbackend: {command: {dispatch_command: [x]}}")
    assert line.startswith("c.yaml:2:39: `dispatch_command`: expected a single value")


def test_a_mistake_never_repeats_a_secret(tmp_path: Path) -> None:
    text = direct("environment: [{name: A, value: [hunter22]}, hunter22, {name: B, value: hunter22, hunter: 2}]")
    text += "api_key: hunter22\n"
    flags = argparse.Namespace(env=["A B=hunter22", "=hunter22", "C=hunter22\0"])
    found = problems(tmp_path, text, flags)
    assert len(found) == 7
    assert "hunter22" not in "\n".join(found)


def test_aliases_cannot_unfold_without_bound(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    (line,) = problems(tmp_path, "\n".join(lines))
    assert "aliases unfold to more than 20000 values" in line


def test_an_unreadable_file_is_one_sentence(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(ConfigurationError) as raised:
            load(argparse.Namespace(config_file=str(path), worker_id="w"), KEY)
        (line,) = raised.value.problems
        assert line.startswith(f"{path}: cannot be read (")
        assert "check --config-file" in line
