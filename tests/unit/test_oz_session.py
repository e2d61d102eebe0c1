"""Whatever text comes in: one command to the engine or one counted refusal; no exception, no value in a log."""

from __future__ import annotations

import copy
import json
import logging
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oz_worker.dialects.oz.session import OzSession
from oz_worker.meters import Meters
from oz_worker.model import InstanceShape, Key, Report, ReportKind, Sidecar, TaskSpec

ARN = {"role_arn": "arn:r", "region": "g"}
FULL: dict[str, Any] = {
    "task_id": "t-1",
    "execution_id": "e-1",
    "task": {
        "id": "t-1",
        "title": "Fix it",
        "task_definition": {"prompt": "do"},
        "created_at": "2026-01-01T00:00:00Z",
        "owner": {"Type": "USER", "Id": 3},
        "agent_config_snapshot": {
            "environment_id": "e",
            "model_id": "m",
            "mcp_servers": {"x": {"env": {"T": "mcp-secret-1"}, "headers": {"Authorization": "Bearer mcp-secret-2"}}},
            "idle_timeout_minutes": 10,
            "harness": {"type": " claude "},
            "inference_providers": {"aws": ARN},
        },
    },
    "docker_image": "img:1",
    "sidecar_image": "agent:1",
    "env_vars": {"WARP_API_KEY": "wk-secret-3", "SHORT": "1"},
    "additional_sidecars": [{"image": "i2", "mount_path": "/mnt/x", "read_write": True}],
    "additional_oz_args": ["--skip-initial-turn"],
    "instance_shape": {"vcpus": 2, "memory_gb": 4.0},
}


class Recorder:
    """An engine that only remembers what it was asked."""

    def __init__(self) -> None:
        self.assigned: list[TaskSpec] = []
        self.invalids: list[tuple[Key, str]] = []
        self.cancelled: list[tuple[str, str]] = []

    def assign(self, spec: TaskSpec) -> None:
        self.assigned.append(spec)

    def invalid(self, key: Key, sentence: str) -> None:
        self.invalids.append((key, sentence))

    def cancel(self, task_id: str, execution_id: str) -> None:
        self.cancelled.append((task_id, execution_id))


def session() -> tuple[OzSession, Recorder, Meters]:
    engine, meters = Recorder(), Meters()
    oz = OzSession(
        intake=engine,
        worker_id="w",
        server_root_url="https://s",
        session_sharing_server_url="",
        idle_on_complete="",
        meters=meters,
    )
    return oz, engine, meters


def frame(data: Any, kind: str = "task_assignment") -> str:
    return json.dumps({"type": kind, "data": data})


def changed(path: str, value: Any) -> dict[str, Any]:
    """FULL with the field at *path* (dotted) set."""
    data = copy.deepcopy(FULL)
    *parents, name = path.split(".")
    target = data
    for parent in parents:
        target = target[parent]
    target[name] = value
    return data


def assigned(data: Any) -> TaskSpec:
    oz, engine, _ = session()
    assert oz.received(data if isinstance(data, str) else frame(data))
    assert (len(engine.assigned), engine.invalids) == (1, [])
    return engine.assigned[0]


def refused(data: Any) -> str:
    oz, engine, _ = session()
    assert oz.received(data if isinstance(data, str) else frame(data))
    assert engine.assigned == []
    ((_, sentence),) = engine.invalids
    return sentence


def test_a_whole_assignment_reaches_the_engine() -> None:
    spec = assigned(FULL)
    assert spec.key == Key("t-1", "e-1")
    assert (spec.run_id, spec.title, spec.harness, spec.docker_image) == ("t-1", "Fix it", "claude", "img:1")
    assert spec.sidecars == (Sidecar("agent:1", "/agent"), Sidecar("i2", "/mnt/x", True))
    assert spec.shape == InstanceShape(2, 4)
    assert spec.document == FULL["task"]
    assert spec.argv[:4] == ("agent", "run", "--task-id", "t-1")
    assert spec.argv[spec.argv.index("--mcp") + 1] == spec.mcp
    assert json.loads(spec.mcp) == FULL["task"]["agent_config_snapshot"]["mcp_servers"]


def test_the_environment_is_in_order_and_the_server_may_override_it() -> None:
    spec = assigned(changed("env_vars", {"B": "2", "TASK_ID": "other", "A": "x=y,\nz"}))
    assert list(spec.environment.items()) == [
        ("TASK_ID", "other"),
        ("GIT_TERMINAL_PROMPT", "0"),
        ("GH_PROMPT_DISABLED", "1"),
        ("WARP_SERVER_ROOT_URL", "https://s"),
        ("B", "2"),
        ("A", "x=y,\nz"),
    ]


def test_the_secrets_are_the_variables_and_what_mcp_servers_are_given() -> None:
    assert set(assigned(FULL).secrets) == {"wk-secret-3", "mcp-secret-1", "Bearer mcp-secret-2", "mcp-secret-2"}
    elsewhere = {"x": {"url": "https://h/s/path-secret/sse?key=query-secret", "args": ["-y", "--token=arg-secret"]}}
    found = assigned(changed("task.agent_config_snapshot.mcp_servers", elsewhere)).secrets
    assert {"path-secret", "query-secret", "arg-secret"} <= set(found)


def test_a_spec_does_not_show_its_secrets() -> None:
    assert "secret" not in repr(assigned(FULL)).replace("secrets", "")


def test_field_names_are_matched_in_any_case_and_unknown_fields_ignored() -> None:
    text = '{"TYPE":"task_assignment","extra":1,"Data":{"Task_ID":"t","new":{},"TASK":{"ID":"t","future":[1]}}}'
    assert assigned(text).key == Key("t")


def test_a_ligature_in_a_name_makes_it_another_name() -> None:
    config = {"mcp_servers": {"a": 1}}
    assert assigned({"task_id": "t", "task": {"agent_con\ufb01g_snapshot": config}}).mcp == ""
    assert assigned({"task_id": "t", "ta\u017fk": {"Agent_Config_Snapshot": config}}).mcp == '{"a":1}'


def test_the_id_inside_the_task_is_what_the_agent_sees_and_the_outer_one_what_reports_say(
    caplog: pytest.LogCaptureFixture,
) -> None:
    spec = assigned(changed("task.id", "inner"))
    assert (spec.key.task_id, spec.run_id, spec.environment["TASK_ID"]) == ("t-1", "t-1", "inner")
    assert "inner" in spec.argv
    assert "task.id differs" in caplog.text


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("task.created_at", "not a time"),
        ("task.created_at", 12),
        ("task.updated_at", {}),
        ("task.title", 5),
        ("task.task_definition", "x"),
        ("task.agent_conversation_id", []),
        ("task.owner.Id", "x"),
        ("task.agent_config_snapshot.base_prompt", {}),
        ("task.agent_config_snapshot.harness_auth_secrets", 1),
        ("task.agent_config_snapshot.idle_timeout_minutes", "10"),
        ("task.agent_config_snapshot.snapshot_upload_timeout_secs", 10.5),
        ("task.agent_config_snapshot.snapshot_script_timeout_secs", []),
        ("instance_shape", "large"),
        ("instance_shape", {"vcpus": "2", "memory_gb": -1}),
        ("instance_shape", None),
        ("env_vars", None),
        ("additional_sidecars", None),
        ("additional_oz_args", None),
        ("telemetry_collection", 7),
        ("execution_id", None),
        ("execution_id", ""),
    ],
)
def test_a_field_the_worker_does_not_need_never_costs_a_task(path: str, value: Any) -> None:
    assigned(changed(path, value))


@pytest.mark.parametrize("value", ["10", 10.5, True, [], 1e300])
def test_an_unusable_number_is_ignored_with_a_warning(value: Any, caplog: pytest.LogCaptureFixture) -> None:
    spec = assigned(changed("task.agent_config_snapshot.idle_timeout_minutes", value))
    assert spec.argv[-1] == "--idle-on-complete"
    assert "idle_timeout_minutes is" in caplog.text


def test_a_bedrock_role_without_a_region_is_passed_on_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    spec = assigned(changed("task.agent_config_snapshot.inference_providers", {"aws": {"role_arn": "arn:r"}}))
    assert "--bedrock-inference-role" in spec.argv
    assert "--bedrock-role-region" not in spec.argv
    assert "newer CLIs refuse" in caplog.text


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("task", None, "task is missing"),
        ("task", "x", "task is text"),
        ("task", [], "task is a list"),
        ("task.id", 5, "task.id"),
        ("task.id", "a\0b", "task.id"),
        ("task.owner", "TEAM", "task.owner"),
        ("task.owner", {"type": 1}, "task.owner.Type"),
        ("task.agent_config_snapshot", [], "agent_config_snapshot"),
        ("task.agent_config_snapshot.model_id", 4, "model_id"),
        ("task.agent_config_snapshot.model_id", "\ud800", "model_id"),
        ("task.agent_config_snapshot.model_id", "é" * 65536, "model_id"),
        ("task.agent_config_snapshot.computer_use_enabled", "yes", "computer_use_enabled"),
        ("task.agent_config_snapshot.mcp_servers", ["x"], "mcp_servers"),
        ("task.agent_config_snapshot.mcp_servers", {"x": "a" * 131072}, "mcp_servers"),
        ("task.agent_config_snapshot.mcp_servers", {"x": float("nan")}, "mcp_servers"),
        ("task.agent_config_snapshot.harness", "claude", "harness"),
        ("task.agent_config_snapshot.inference_providers", {"aws": 1}, "inference_providers.aws"),
        ("env_vars", {"A": 1}, "env_vars['A']"),
        ("env_vars", {"A": None}, "env_vars['A']"),
        ("env_vars", {"A": "\0"}, "env_vars['A']"),
        ("env_vars", {"A": "\udfff"}, "env_vars['A']"),
        ("env_vars", {"": "x"}, "env_vars['']"),
        ("env_vars", {"A=B": "x"}, "env_vars['A=B']"),
        ("env_vars", {"A\0": "x"}, "env_vars['A"),
        ("env_vars", ["A=B"], "env_vars"),
        ("additional_oz_args", ["ok", 1], "additional_oz_args[1]"),
        ("additional_oz_args", ["a" * 131072], "additional_oz_args[0]"),
        ("additional_oz_args", "x", "additional_oz_args"),
        ("additional_sidecars", [None], "additional_sidecars[0]"),
        ("additional_sidecars", [{"image": 1}], "additional_sidecars[0].image"),
        ("docker_image", "a\0", "docker_image"),
        ("execution_id", 7, "execution_id"),
        ("execution_id", "e" * 1025, "execution_id"),
        ("execution_id", "\0", "execution_id"),
    ],
)
def test_what_cannot_be_run_is_reported_with_the_field_and_the_cure(path: str, value: Any, named: str) -> None:
    sentence = refused(changed(path, value))
    assert named in sentence
    assert "run it again" in sentence
    assert "secret" not in sentence
    assert len(sentence) < 400


def test_an_argument_of_just_under_128_kib_is_taken() -> None:
    assigned(changed("additional_oz_args", ["a" * 131071]))


def test_mcp_numbers_order_and_escapes_keep_their_spelling() -> None:
    text = frame(changed("task.agent_config_snapshot.mcp_servers", {"X": 0}))
    raw = '{ "b": {"z": 1.10, "a": 1e2, "u": "\\u003C<\\/"}, "a&": 12345678901234567890 }'
    spec = assigned(text.replace('{"X": 0}', raw))
    assert spec.mcp == '{"a\\u0026":12345678901234567890,"b":{"z":1.10,"a":1e2,"u":"\\u003C\\u003c\\/"}}'


def test_a_task_too_deep_for_the_threads_that_write_it_again_is_refused() -> None:
    def nested(levels: int) -> str:
        return frame(changed("task.future", 0)).replace('"future": 0', f'"future": {"[" * levels}{"]" * levels}')

    assert assigned(nested(99)).document["future"]
    assert "nested" in refused(nested(100))


def test_duplicate_names_and_numbers_too_long_for_python_do_no_harm() -> None:
    digits = "9" * 50_000
    text = frame(FULL).replace('"task_id": "t-1"', f'"task_id": 5, "n": {digits}, "task_id": "t-2"', 1)
    assert assigned(text).key.task_id == "t-2"


@pytest.mark.parametrize(
    ("text", "kind"), [("", "not_json"), (frame({}, "heartbeat"), "unknown_type"), (frame(None), "no_task_id")]
)
def test_a_frame_without_use_is_said_once_and_counted(text: str, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    oz, engine, meters = session()
    for _ in range(3):
        assert not oz.received(text)
    assert (engine.assigned, engine.invalids, engine.cancelled) == ([], [], [])
    assert meters.value("oz_worker_frames_refused_total", kind=kind) == 3
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1


def test_an_endless_choice_of_unknown_types_neither_fills_the_log_nor_the_metrics(
    caplog: pytest.LogCaptureFixture,
) -> None:
    oz, _, meters = session()
    for number in range(500):
        oz.received(frame({}, f"kind-{number}"))
    assert len(caplog.records) <= 32
    assert meters.values() == {("oz_worker_frames_refused_total", (("kind", "unknown_type"),)): 500}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"task_id": "t"}, ("t", "")),
        ({"task_id": "t", "execution_id": None}, ("t", "")),
        ({"task_id": "t", "execution_id": "e", "why": 1}, ("t", "e")),
        ({"TASK_ID": "t", "Execution_Id": "e"}, ("t", "e")),
    ],
)
def test_a_cancel_names_one_execution_or_all(data: Any, expected: tuple[str, str]) -> None:
    oz, engine, _ = session()
    assert oz.received(frame(data, "task_cancellation"))
    assert engine.cancelled == [expected]


def test_no_value_of_an_assignment_is_ever_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    oz, _, _ = session()
    for path, value in [("docker_image", "img:1"), ("env_vars", {"K": 5, "L": "wk-secret-3"}), ("task.id", "other")]:
        oz.received(frame(changed(path, value)))
    oz.received(frame(FULL)[:-1])
    oz.received(frame(FULL, "mystery"))
    assert "secret" not in caplog.text.replace("env_vars", "")
    assert caplog.records


def test_a_report_is_encoded_with_the_workers_name() -> None:
    oz, _, _ = session()
    text = oz.encode(Report(ReportKind.CLAIMED, Key("t", "e")))
    assert text == '{"type":"task_claimed","data":{"task_id":"t","execution_id":"e","worker_id":"w"}}'


# Anything JSON can say, and things it cannot.
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=8)
    | st.sampled_from(["\0", "\ud800", "a" * 131072, "TEAM", "task_assignment", 10**500, -0.0])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["task_id", "task", "ID", "env", "A=", "", "x"]) | st.text(max_size=4), inner)
    ),
    max_leaves=8,
)
PATHS = [
    *FULL,
    *(f"task.{name}" for name in FULL["task"]),
    *(f"task.agent_config_snapshot.{name}" for name in [*FULL["task"]["agent_config_snapshot"], "skill_spec"]),
    "env_vars.WARP_API_KEY",
    "task.agent_config_snapshot.mcp_servers.x",
]


def outcome(text: str) -> tuple[bool, Recorder]:
    oz, engine, meters = session()
    known = oz.received(text)
    asked = len(engine.assigned) + len(engine.invalids) + len(engine.cancelled)
    counted = sum(meters.values().values())
    assert (asked, counted) == ((1, 0) if known else (0, 1))
    return known, engine


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], deadline=None)
@given(VALUES | st.fixed_dictionaries({"type": st.just("task_assignment") | LEAVES, "data": VALUES}))
def test_any_json_is_one_command_or_one_refusal(value: Any) -> None:
    outcome(json.dumps(value))


@settings(deadline=None)
@given(st.text(st.characters(), max_size=30) | st.binary(max_size=30).map(lambda raw: raw.decode("utf-8", "replace")))
def test_any_text_is_one_command_or_one_refusal(text: str) -> None:
    outcome(text)


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], deadline=None, max_examples=300)
@given(st.sampled_from(PATHS), VALUES, st.booleans())
def test_an_assignment_with_a_readable_id_is_always_answered(path: str, value: Any, ascii_only: bool) -> None:
    data = changed(path, value)
    known, engine = outcome(json.dumps({"type": "task_assignment", "data": data}, ensure_ascii=ascii_only))
    task_id = data["task_id"]
    readable = isinstance(task_id, str) and 0 < len(task_id.encode("utf-8", "replace")) <= 1024
    if readable and task_id.isprintable():
        assert known
        assert len(engine.assigned) + len(engine.invalids) == 1
    for spec in engine.assigned:
        for argument in (*spec.argv, *spec.environment, *spec.environment.values()):
            assert "\0" not in argument
            argument.encode()
        assert all(len(argument.encode()) < 131072 for argument in spec.argv)
        json.dumps(spec.document, allow_nan=False)


@settings(deadline=None, max_examples=200)
@given(st.integers(0, len(frame(FULL))), st.integers(0, 30), st.text(st.sampled_from('{}[],:"\\ \0an10e'), max_size=3))
def test_a_damaged_assignment_is_one_command_or_one_refusal(at: int, length: int, new: str) -> None:
    text = frame(FULL)
    outcome(text[:at] + new + text[at + length :])
