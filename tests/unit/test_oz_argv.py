"""The command line of `oz` is composed as oz.md section 6 says, to the letter."""

from __future__ import annotations

import json
from typing import Any

import pytest

from oz_worker.dialects.oz.argv import compose
from oz_worker.dialects.oz.frames import Assignment, decode

BASE = ["agent", "run", "--task-id", "t-1", "--sandboxed", "--server-root-url", "https://s"]


def argv(task: dict[str, Any], *, root: str = "https://s", sharing: str = "", idle: str = "", **data: Any) -> list[str]:
    frame = {"type": "task_assignment", "data": {"task_id": "t-1", "task": {"id": "t-1", **task}, **data}}
    message = decode(json.dumps(frame))
    assert isinstance(message, Assignment), message
    return list(compose(message, server_root_url=root, session_sharing_server_url=sharing, idle_on_complete=idle))


def with_config(**config: Any) -> list[str]:
    """What a snapshot adds between the base and the idle flag."""
    args = argv({"agent_config_snapshot": config})
    assert args[: len(BASE)] == BASE
    assert args[-1] == "--idle-on-complete"
    return args[len(BASE) : -1]


def test_the_shortest_task_has_the_base_and_the_bare_idle_flag() -> None:
    assert argv({}) == [*BASE, "--idle-on-complete"]
    assert argv({"agent_config_snapshot": None}) == [*BASE, "--idle-on-complete"]


def test_an_empty_server_url_is_still_passed() -> None:
    assert argv({}, root="")[5:8] == ["--server-root-url", "", "--idle-on-complete"]


@pytest.mark.parametrize("owner", [None, {"Type": "USER", "Id": 1}, {"Type": "team"}, {}])
def test_only_a_team_task_is_shared_with_the_team(owner: Any) -> None:
    assert "--share" not in argv({"owner": owner})
    shared = argv({"owner": {"Type": "TEAM", "Id": 7}})
    assert shared[:4] == ["agent", "run", "--share", "team:edit"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, ["--computer-use"]),
        ({"model_id": " gpt "}, ["--model", "gpt", "--computer-use"]),
        ({"model_id": " \t "}, ["--computer-use"]),
        ({"model_id": "m", "harness": {}}, ["--model", "m", "--computer-use"]),
        ({"model_id": "m", "harness": {"type": None}}, ["--model", "m", "--computer-use"]),
        ({"model_id": "m", "harness": {"type": ""}}, ["--model", "m", "--computer-use"]),
        ({"model_id": "m", "harness": {"type": "oz"}}, ["--model", "m", "--computer-use", "--harness", "oz"]),
        ({"model_id": "m", "harness": {"type": "claude"}}, ["--no-computer-use", "--harness", "claude"]),
        # The test for oz does not trim, the flag does.
        ({"model_id": "m", "harness": {"type": " oz "}}, ["--no-computer-use", "--harness", "oz"]),
        ({"harness": {"type": " "}}, ["--no-computer-use"]),
        ({"profile_id": " p "}, ["--profile", "p", "--computer-use"]),
        ({"skill_spec": "\u00a0s\u3000"}, ["--skill", "s", "--computer-use"]),
        # U+001C is no blank for Go, though it is one for Python.
        ({"skill_spec": "s\x1c"}, ["--skill", "s\x1c", "--computer-use"]),
        ({"mcp_servers": {}}, ["--computer-use"]),
        ({"mcp_servers": None}, ["--computer-use"]),
        ({"mcp_servers": {"b": 1, "a": {"z": 1, "y": 2}}}, ["--mcp", '{"a":{"z":1,"y":2},"b":1}', "--computer-use"]),
        ({"computer_use_enabled": True, "harness": {"type": "codex"}}, ["--computer-use", "--harness", "codex"]),
        ({"computer_use_enabled": False}, ["--no-computer-use"]),
        ({"computer_use_enabled": None}, ["--computer-use"]),
        ({"inference_providers": {}}, ["--computer-use"]),
        (
            {"inference_providers": {"aws": {"role_arn": "arn:r", "region": "  eu-1 "}}},
            ["--computer-use", "--bedrock-inference-role", "arn:r", "--bedrock-role-region", "eu-1"],
        ),
        (
            {"inference_providers": {"aws": {"role_arn": "arn:r", "region": " "}}},
            ["--computer-use", "--bedrock-inference-role", "arn:r"],
        ),
        ({"inference_providers": {"aws": {"role_arn": " ", "region": "eu-1"}}}, ["--computer-use"]),
        ({"inference_providers": {"aws": {"disabled": True, "role_arn": "arn:r"}}}, ["--computer-use"]),
        ({"session_sharing": {"public_access": "VIEWER"}}, ["--computer-use", "--share", "public:view"]),
        ({"session_sharing": {"public_access": "EDITOR"}}, ["--computer-use", "--share", "public:edit"]),
        ({"session_sharing": {"public_access": "FULL"}}, ["--computer-use"]),
        ({"session_sharing": {}}, ["--computer-use"]),
        ({"snapshot_disabled": True}, ["--computer-use", "--no-snapshot"]),
        ({"snapshot_disabled": False}, ["--computer-use"]),
        ({"snapshot_upload_timeout_secs": 90}, ["--computer-use", "--snapshot-upload-timeout", "90s"]),
        ({"snapshot_script_timeout_secs": 45.0}, ["--computer-use", "--snapshot-script-timeout", "45s"]),
        ({"snapshot_upload_timeout_secs": 0, "snapshot_script_timeout_secs": -1}, ["--computer-use"]),
        ({"environment_id": " e "}, ["--computer-use", "--environment", "e"]),
        ({"environment_id": "  "}, ["--computer-use"]),
        ({"base_prompt": "b", "harness_auth_secrets": {"claude_auth_secret_name": "n"}}, ["--computer-use"]),
    ],
)
def test_each_setting_becomes_its_flag(config: dict[str, Any], expected: list[str]) -> None:
    assert with_config(**config) == expected


@pytest.mark.parametrize(
    ("minutes", "worker", "expected"),
    [
        (10, "", ["--idle-on-complete", "10m"]),
        (10, "5m", ["--idle-on-complete", "10m"]),
        (10.0, "5m", ["--idle-on-complete", "10m"]),
        (0, "5m", ["--idle-on-complete", "5m"]),
        (-3, "5m", ["--idle-on-complete", "5m"]),
        (0, "0s", ["--idle-on-complete", "0s"]),
        (0, "", ["--idle-on-complete"]),
        (10.5, "", ["--idle-on-complete"]),
        ("10", "", ["--idle-on-complete"]),
        (True, "", ["--idle-on-complete"]),
        (10**30, "", ["--idle-on-complete"]),
        (1e300, "", ["--idle-on-complete"]),
        (None, "", ["--idle-on-complete"]),
    ],
)
def test_the_idle_time_is_the_tasks_else_the_workers_else_the_default(
    minutes: Any, worker: str, expected: list[str]
) -> None:
    task = {"agent_config_snapshot": {"idle_timeout_minutes": minutes, "computer_use_enabled": True}}
    assert argv(task, idle=worker) == [*BASE, "--computer-use", *expected]


def test_everything_at_once_keeps_the_order_of_the_existing_worker() -> None:
    config = {
        "environment_id": "env",
        "model_id": "m",
        "profile_id": "p",
        "skill_spec": "s",
        "mcp_servers": {"k": {}},
        "computer_use_enabled": False,
        "idle_timeout_minutes": 3,
        "harness": {"type": "oz"},
        "inference_providers": {"aws": {"role_arn": "r", "region": "g"}},
        "session_sharing": {"public_access": "VIEWER"},
        "snapshot_disabled": True,
        "snapshot_upload_timeout_secs": 1,
        "snapshot_script_timeout_secs": 2,
    }
    task = {
        "owner": {"Type": "TEAM", "Id": 1},
        "agent_config_snapshot": config,
        "title": "T",
        "agent_conversation_id": "c",
        "task_definition": {"prompt": "P"},
    }
    args = argv(task, sharing="wss://share", idle="9m", additional_oz_args=["--skip-initial-turn", "", " x "])
    assert args == [
        *("agent", "run", "--share", "team:edit", "--task-id", "t-1", "--sandboxed", "--server-root-url", "https://s"),
        *("--model", "m", "--profile", "p", "--skill", "s", "--mcp", '{"k":{}}', "--no-computer-use"),
        *("--bedrock-inference-role", "r", "--bedrock-role-region", "g", "--harness", "oz", "--share", "public:view"),
        *("--no-snapshot", "--snapshot-upload-timeout", "1s", "--snapshot-script-timeout", "2s"),
        *("--environment", "env", "--skip-initial-turn", "", " x ", "--idle-on-complete", "3m"),
        *("--session-sharing-server-url", "wss://share"),
    ]


def test_the_agent_is_given_the_id_inside_the_task() -> None:
    assert argv({"id": "inner"})[2:4] == ["--task-id", "inner"]
    assert argv({"id": ""})[2:4] == ["--task-id", "t-1"]
