"""The objects of a task in a cluster: valid by the published schemas, exact, and laid over the operator's template."""

from __future__ import annotations

import base64
import re
from typing import Any, Mapping

import kubernetes_validate
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oz_worker.backends import job_object
from oz_worker.backends.base import Unit
from oz_worker.backends.job_env import MCP_VARIABLE, escaped
from oz_worker.errors import TaskFault
from oz_worker.model import InstanceShape, Key, Reason, Sidecar, TaskSpec, unit_name
from oz_worker.settings import KubernetesOptions

KEY = Key("Task 1", "Exec-ABCDEFGH")
UNIT = unit_name(KEY, 1)
WHOSE: dict[str, Any] = {"worker_id": "My Worker", "instance": "inst"}
MCP = '{"a":{"env":{"TOKEN":"$(TASK_ID) $$"}}}'
PLAIN = KubernetesOptions()

FULL: dict[str, Any] = {
    "serviceAccountName": "oz",
    "imagePullSecrets": [{"name": "regcred"}],
    "nodeSelector": {"kubernetes.io/os": "linux"},
    "securityContext": {"runAsNonRoot": True},
    "volumes": [{"name": "cache", "emptyDir": {}}],
    "initContainers": [{"name": "late", "image": "late:1"}],
    "containers": [
        {"name": "helper", "image": "helper:1"},
        {
            "name": "task",
            "image": "ignored",
            "command": ["ignored"],
            "args": ["ignored"],
            "workingDir": "/ignored",
            "imagePullPolicy": "Always",
            "securityContext": {"runAsUser": 1000},
            "env": [{"name": "TASK_ID", "value": "mine"}, {"name": "B", "value": "$(TASK_ID)/$(A)"}],
            "envFrom": [{"configMapRef": {"name": "more"}}],
            "volumeMounts": [{"name": "cache", "mountPath": "/cache"}],
            "resources": {"requests": {"cpu": "2", "memory": "4Gi"}, "limits": {"nvidia.com/gpu": 1}},
            "lifecycle": {"preStop": {"exec": {"command": ["true"]}}},
        },
    ],
}


def spec(**changes: Any) -> TaskSpec:
    values: dict[str, Any] = {
        "key": KEY,
        "run_id": KEY.task_id,
        "argv": ("agent", "run", "--task-id", "t"),
        "environment": {"TASK_ID": "t", "A": "$HOME $(B) $$"},
        "sidecars": (Sidecar("agent:1", "/agent"),),
        **changes,
    }
    return TaskSpec(**values)


def job(options: KubernetesOptions = PLAIN, *, cleanup: bool = True, **changes: Any) -> dict[str, Any]:
    wanted = spec(**changes)
    return job_object.job(options, Unit(UNIT, "inst", KEY, wanted), wanted, cleanup=cleanup, **WHOSE)


def secret(options: KubernetesOptions, **changes: Any) -> dict[str, Any] | None:
    wanted = spec(**changes)
    unit = Unit(UNIT, "inst", KEY, wanted)
    return job_object.secret(options, unit, wanted, job_uid="uid-1", **WHOSE)


def pod(options: KubernetesOptions = PLAIN, **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = job(options, **changes)["spec"]["template"]["spec"]
    return found


def named(containers: list[dict[str, Any]], name: str = "task") -> dict[str, Any]:
    return next(each for each in containers if each["name"] == name)


def names(things: list[dict[str, Any]]) -> list[str]:
    return [each["name"] for each in things]


def template(**fields: Any) -> KubernetesOptions:
    return KubernetesOptions(pod_template=fields)


def refused(options: KubernetesOptions, **changes: Any) -> tuple[Reason | None, str]:
    with pytest.raises(TaskFault) as caught:
        job(options, **changes)
    facts = caught.value.facts
    assert not facts.agent_started
    return facts.reason, facts.detail


# -- names, labels, annotations


def test_the_names_and_labels_are_those_of_the_existing_worker_and_ours() -> None:
    made = job(KubernetesOptions(extra_labels={"team": "a", "oz-task-id": "b"}, extra_annotations={"x/y": "z"}))
    labels = made["metadata"]["labels"]
    assert made["metadata"]["name"] == "oz-task-task-1-exec-abcdefgh"
    assert labels == {
        "team": "a",
        "oz-worker-id": "my-worker",
        "oz-worker-hash": "61b6053823f2528f",
        "oz-task-id": "task-1",
        "oz-task-hash": "15e66171bb9efb19",
        "oz-execution-id": "exec-abcdefgh",
        "oz-execution-hash": "c62f22d0b34833b4",
        "oz-worker-instance": "inst",
        "oz-worker-role": "task",
        "oz-worker-unit": UNIT,
    }
    ids = {"oz.warp.dev/task-id": "Task 1", "oz.warp.dev/execution-id": "Exec-ABCDEFGH"}
    ids["oz.warp.dev/worker-id"] = "My Worker"
    assert made["metadata"]["annotations"] == {"x/y": "z", **ids}
    assert made["spec"]["template"]["metadata"]["labels"] == labels
    assert made["spec"]["template"]["metadata"]["annotations"].items() >= {"x/y": "z", **ids}.items()


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (Key("run-1"), "oz-task-run-1-exec-run-1"),
        (Key("run-1", "   "), "oz-task-run-1-exec-run-1"),
        (Key("Ünï", "é"), "oz-task-n-exec-exec"),
        (Key("---", "--------"), "oz-task-run-exec-exec"),
        (Key("a" * 100, "0123456789"), f"oz-task-{'a' * 41}-exec-23456789"),
        (Key("a" * 40 + "--b", "0123456789"), f"oz-task-{'a' * 40}-exec-23456789"),
        (Key("a_b.c", "1/2"), "oz-task-a-b-c-exec-1-2"),
    ],
)
def test_the_name_of_a_job(key: Key, name: str) -> None:
    assert job_object.job_name(key) == name


ANY_TEXT = st.text(max_size=120)


@settings(deadline=None)
@given(task=ANY_TEXT, execution=ANY_TEXT, worker=ANY_TEXT, instance=st.from_regex(r"[a-z0-9-]{1,40}", fullmatch=True))
def test_names_and_labels_are_always_valid_and_ids_come_back(
    task: str, execution: str, worker: str, instance: str
) -> None:
    key = Key(task, execution)
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", job_object.job_name(key))
    found = job_object.labels(PLAIN, worker_id=worker, instance=instance, key=key, role="task", unit=unit_name(key, 1))
    for value in found.values():
        assert re.fullmatch(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?", value)
    notes = job_object.annotations_for(PLAIN, worker_id=worker, key=key)
    thing = {"metadata": {"labels": found, "annotations": notes}}
    assert job_object.key_of(thing) == (key if task else None)
    assert job_object.unit_of(thing) == unit_name(key, 1)
    wanted = job_object.selector(worker_id=worker, instance=instance)
    assert dict(part.split("=") for part in wanted.split(",")).items() <= found.items()


@settings(deadline=None)
@given(st.lists(st.from_regex(r"[a-z0-9-]{1,40}", fullmatch=True), min_size=2, max_size=2, unique=True))
def test_two_instances_never_select_each_other_s(instances: list[str]) -> None:
    one, other = (job_object.selector(worker_id="w", instance=instance) for instance in instances)
    assert one != other


def test_a_selector_has_a_role_or_none() -> None:
    assert job_object.selector(worker_id="w", instance="i").endswith(",oz-worker-instance=i,oz-worker-role=task")
    assert "role" not in job_object.selector(worker_id="w", instance="i", role="")


@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"metadata": None},
        {"metadata": []},
        {"metadata": {"labels": [], "annotations": "x"}},
        {"metadata": {"annotations": {"oz.warp.dev/task-id": 1}, "labels": {"oz-worker-unit": 1}}},
    ],
)
def test_what_is_no_task_s_has_no_key_and_no_unit(odd: Mapping[str, Any]) -> None:
    assert (job_object.key_of(odd), job_object.unit_of(odd)) == (None, "")


def test_a_job_without_its_label_is_the_first_attempt_s() -> None:
    thing = {"metadata": {"annotations": job_object.annotations_for(PLAIN, worker_id="w", key=KEY)}}
    assert job_object.unit_of(thing) == unit_name(KEY, 1)


@pytest.mark.parametrize(
    ("key", "told"),
    [
        (Key("t\ud800"), "the task id 't\\ud800' is not valid UTF-8"),
        (Key("t", "e" * 5000), "the execution id is longer than 4096 characters"),
    ],
)
def test_ids_that_would_not_come_back_are_refused(key: Key, told: str) -> None:
    wanted = spec(key=key)
    with pytest.raises(TaskFault, match=re.escape(told)) as caught:
        job_object.job(PLAIN, Unit("u", "inst", key, wanted), wanted, **WHOSE)
    assert caught.value.facts.reason is Reason.JOB_CREATE


# -- the Job

NATIVE = {"name": "proxy", "image": "p", "restartPolicy": "Always"}
EVERYTHING = KubernetesOptions(
    env_in_secret=True,
    setup_command="true",
    teardown_command="true",
    active_deadline_seconds=60,
    workspace_size_limit="10Gi",
    extra_labels={"team": "a"},
    extra_annotations={"x/y": "z"},
    environment={"A": "B"},
    pod_template=FULL,
)


@pytest.mark.parametrize("version", ["1.27", "1.29", "1.32", "1.35"])
def test_every_object_is_valid_by_the_published_schemas(version: str) -> None:
    changes: dict[str, Any] = {
        "sidecars": (Sidecar("a", "/agent"), Sidecar("b", "/b", True)),
        "shape": InstanceShape(1, 1),
    }
    things = [job(), job(EVERYTHING, **changes), secret(EVERYTHING, **changes)]
    things += [job_object.preflight_job(options, stamp=1, **WHOSE) for options in (PLAIN, EVERYTHING)]
    if version != "1.27":
        things.append(job(template(initContainers=[NATIVE])))
    if version == "1.35":
        options = KubernetesOptions(use_image_volumes=True)
        things += [job(options), job_object.preflight_job(options, stamp=1, **WHOSE)]
    for thing in things:
        assert kubernetes_validate.validate(thing, version, strict=True) == version


def test_the_schemas_are_strict() -> None:
    wrong = job(template(nodeSelectr={"a": "b"}))
    with pytest.raises(kubernetes_validate.ValidationError, match="nodeSelectr"):
        kubernetes_validate.validate(wrong, "1.32", strict=True)


def test_a_plain_job_runs_once_and_is_kept_for_a_day() -> None:
    made = job()["spec"]
    assert (made["backoffLimit"], made["ttlSecondsAfterFinished"]) == (0, 86400)
    assert "activeDeadlineSeconds" not in made
    assert made["template"]["spec"]["restartPolicy"] == "Never"


def test_deadline_and_ttl_of_the_options() -> None:
    options = KubernetesOptions(active_deadline_seconds=60, ttl_seconds_after_finished=0)
    made = job(options)["spec"]
    assert (made["activeDeadlineSeconds"], made["ttlSecondsAfterFinished"]) == (60, 0)
    assert "ttlSecondsAfterFinished" not in job(options, cleanup=False)["spec"]


def test_the_plain_pod() -> None:
    made = pod()
    assert made["automountServiceAccountToken"] is False
    assert names(made["volumes"]) == ["workspace", "sidecar-0-data"]
    assert names(made["initContainers"]) == ["copy-sidecar-0"]
    task = named(made["containers"])
    assert (task["image"], task["imagePullPolicy"], task["workingDir"]) == (
        "ubuntu:22.04",
        "IfNotPresent",
        "/workspace",
    )
    assert task["command"][:2] == ["/bin/sh", "-c"]
    assert task["command"][3:] == ["oz-task"]
    assert "exec /agent/entrypoint.sh" in task["command"][2]
    assert "report-shutdown" not in task["command"][2]
    assert task["args"] == ["agent", "run", "--task-id", "t"]
    assert task["volumeMounts"] == [
        {"name": "workspace", "mountPath": "/workspace"},
        {"name": "sidecar-0-data", "mountPath": "/agent", "readOnly": True},
    ]
    assert task["env"] == [
        {"name": "TASK_ID", "value": "t"},
        {"name": "A", "value": "$$HOME $$(B) $$$$"},
        *(
            {"name": f"{prefix}_{name}", "value": value}
            for prefix in ("OZ", "WARP")
            for name, value in (
                ("ENVIRONMENT_FILE", "/workspace/.oz-env"),
                ("WORKSPACE_ROOT", "/workspace"),
                ("WORKER_BACKEND", "kubernetes"),
                ("RUN_ID", "Task 1"),
            )
        ),
    ]


def test_the_template_is_overlaid() -> None:
    options = KubernetesOptions(
        default_image="default:1",
        setup_command='echo $$ > "$OZ_ENVIRONMENT_FILE"',
        teardown_command="echo 'torn $$'",
        workspace_size_limit="10Gi",
        environment={"A": "from -e", "E": "e"},
        pod_template=FULL,
    )
    made = pod(options)
    assert {name: made[name] for name in ("serviceAccountName", "imagePullSecrets", "nodeSelector")} == {
        name: FULL[name] for name in ("serviceAccountName", "imagePullSecrets", "nodeSelector")
    }
    assert "automountServiceAccountToken" not in made
    assert names(made["volumes"]) == ["cache", "workspace", "sidecar-0-data"]
    assert made["volumes"][1]["emptyDir"] == {"sizeLimit": "10Gi"}
    assert names(made["initContainers"]) == ["copy-sidecar-0", "setup", "late"]
    assert names(made["containers"]) == ["helper", "task"]
    task, setup = named(made["containers"]), named(made["initContainers"], "setup")
    assert (task["image"], task["imagePullPolicy"], task["workingDir"]) == ("default:1", "Always", "/workspace")
    assert task["lifecycle"] == {"preStop": {"exec": {"command": ["true"]}}}
    assert names(task["env"])[:3] == ["TASK_ID", "A", "E"]
    values = {entry["name"]: entry["value"] for entry in task["env"]}
    assert (values["TASK_ID"], values["A"], values["B"]) == ("t", "from -e", "$(TASK_ID)/$(A)")
    assert task["volumeMounts"][0] == {"name": "cache", "mountPath": "/cache"}
    assert "torn $$$$" in task["command"][2]
    assert setup["command"] == ["/bin/sh", "-c", 'echo $$$$ > "$$OZ_ENVIRONMENT_FILE"']
    for name in ("image", "env", "envFrom", "volumeMounts", "workingDir", "securityContext"):
        assert setup[name] == task[name]
    plain = {"requests": {"cpu": "2", "memory": "4Gi"}}
    assert setup["resources"] == named(made["initContainers"], "copy-sidecar-0")["resources"] == plain
    assert options.pod_template is FULL
    assert FULL["containers"][1]["image"] == "ignored"


def test_the_shape_wins_over_the_template_axis_by_axis() -> None:
    resources = named(pod(KubernetesOptions(pod_template=FULL), shape=InstanceShape(4, 0))["containers"])["resources"]
    assert resources == {"requests": {"cpu": "4", "memory": "4Gi"}, "limits": {"cpu": "4", "nvidia.com/gpu": 1}}
    resources = named(pod(shape=InstanceShape(2, 8))["containers"])["resources"]
    assert resources == {"requests": {"cpu": "2", "memory": "8Gi"}, "limits": {"cpu": "2", "memory": "8Gi"}}
    assert named(pod()["containers"])["resources"] == {}


def test_native_sidecars_of_the_template_and_what_precedes_them_run_before_ours() -> None:
    options = KubernetesOptions(
        setup_command="true",
        pod_template={"initContainers": [{"name": "iptables", "image": "i"}, NATIVE, {"name": "late", "image": "l"}]},
    )
    assert names(pod(options)["initContainers"]) == ["iptables", "proxy", "copy-sidecar-0", "setup", "late"]


def test_names_that_the_template_uses_are_left_to_it() -> None:
    options = KubernetesOptions(
        setup_command="true",
        pod_template={
            "volumes": [{"name": "workspace", "emptyDir": {}}, {"name": "sidecar-0-data", "emptyDir": {}}],
            "initContainers": [{"name": "setup", "image": "x"}],
            "containers": [{"name": "copy-sidecar-0", "image": "y"}],
        },
    )
    made = pod(options)
    assert names(made["volumes"]) == ["workspace", "sidecar-0-data", "workspace-oz0", "sidecar-0-data-oz0"]
    assert names(made["initContainers"]) == ["copy-sidecar-0-oz0", "setup-oz0", "setup"]
    mounts = {mount["mountPath"]: mount["name"] for mount in named(made["containers"])["volumeMounts"]}
    assert mounts == {"/workspace": "workspace-oz0", "/agent": "sidecar-0-data-oz0"}


@pytest.mark.parametrize(
    ("fields", "wants"),
    [
        ({}, False),
        ({"serviceAccountName": "a"}, None),
        ({"serviceAccount": "a"}, None),
        ({"automountServiceAccountToken": True}, True),
        ({"serviceAccountName": "a", "automountServiceAccountToken": False}, False),
    ],
)
def test_a_token_of_the_api_is_there_for_who_asks_for_it(fields: dict[str, Any], wants: bool | None) -> None:
    assert pod(template(**fields)).get("automountServiceAccountToken") is wants


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"volumes": {"name": "x"}}, "pod_template: volumes must be a list of mappings"),
        ({"initContainers": ["x"]}, "pod_template: initContainers must be a list of mappings"),
        ({"containers": [{"name": "task", "env": {"A": "b"}}]}, "the container task: env must be a list of mappings"),
        ({"containers": [{"name": "task", "resources": []}]}, "the container task: resources must be a mapping"),
        ({"containers": [{"name": "task", "resources": {"limits": ["x"]}}]}, "task: limits must be a mapping"),
        (
            {"containers": [{"name": "task", "volumeMounts": [{"name": "v", "mountPath": "/workspace/"}]}]},
            "pod_template mounts the volume v at /workspace, which is each task's own working directory",
        ),
    ],
)
def test_a_template_that_cannot_be_laid_over_is_refused_also_at_start(fields: dict[str, Any], told: str) -> None:
    reason, detail = refused(template(**fields))
    assert reason is Reason.JOB_CREATE
    assert told in detail
    with pytest.raises(ValueError, match=re.escape(told)):
        job_object.preflight_job(template(**fields), stamp=1, **WHOSE)


# -- sidecars


def test_sidecars_are_copied_by_root_and_mounted_as_asked() -> None:
    made = pod(sidecars=(Sidecar("a:1", "/agent"), Sidecar("b:1", "/mnt//b/", True)))
    mounts = named(made["containers"])["volumeMounts"][1:]
    assert mounts == [
        {"name": "sidecar-0-data", "mountPath": "/agent", "readOnly": True},
        {"name": "sidecar-1-data", "mountPath": "/mnt/b", "readOnly": False},
    ]
    for number, filler in enumerate(made["initContainers"]):
        assert filler["volumeMounts"] == [{"name": f"sidecar-{number}-data", "mountPath": "/target"}]
        assert filler["securityContext"]["runAsUser"] == 0
        assert filler["securityContext"]["runAsNonRoot"] is False
        assert filler["securityContext"]["allowPrivilegeEscalation"] is False


def test_image_volumes_need_no_copy() -> None:
    options = KubernetesOptions(use_image_volumes=True, image_pull_policy="Always")
    made = pod(options)
    volume = {"name": "sidecar-0-image", "image": {"reference": "agent:1", "pullPolicy": "Always"}}
    assert made["volumes"][1] == volume
    assert made["initContainers"] == []
    mount = {"name": "sidecar-0-image", "mountPath": "/agent", "readOnly": True}
    assert named(made["containers"])["volumeMounts"][1] == mount


def test_configured_sidecars_replace_those_of_the_task() -> None:
    options = KubernetesOptions(sidecar_image="mine:1", coding_cli_sidecars={"claude": "claude:1"})
    made = pod(options, harness="claude")
    assert [filler["image"] for filler in made["initContainers"]] == ["mine:1", "claude:1"]
    assert named(made["containers"])["volumeMounts"][2]["mountPath"] == "/mnt/claude-cli-sidecar"


@pytest.mark.parametrize(
    ("options", "sidecars", "told"),
    [
        (PLAIN, [Sidecar("", "/agent")], "names no image"),
        (PLAIN, [Sidecar("a", "")], "a mount path is absolute"),
        (PLAIN, [Sidecar("a", "/workspace/")], "/workspace is the task's working directory; choose another path"),
        (PLAIN, [Sidecar("a", "/x"), Sidecar("b", "/x/")], "a is mounted at /x already"),
        (KubernetesOptions(use_image_volumes=True), [Sidecar("a", "/x", True)], "which an image volume cannot be"),
        (KubernetesOptions(pod_template=FULL), [Sidecar("a", "/cache")], "pod_template mounts the volume cache there"),
    ],
)
def test_a_sidecar_that_cannot_be_given(options: KubernetesOptions, sidecars: list[Sidecar], told: str) -> None:
    reason, detail = refused(options, sidecars=tuple(sidecars))
    assert reason is Reason.SIDECAR_PREP
    assert told in detail


# -- variables and arguments


def expanded(text: str, known: Mapping[str, str]) -> str:
    """What a kubelet makes of *text*, by the words of Kubernetes' documentation of variables in commands.

    `$(NAME)` stands for the variable, where there is one; `$$` is a `$` that begins no reference; all else stays.
    """
    found, at = "", 0
    while at < len(text):
        close = text.find(")", at)
        if text.startswith("$$", at):
            found, at = found + "$", at + 2
        elif text.startswith("$(", at) and close > 0:
            name = text[at + 2 : close]
            found, at = found + known.get(name, f"$({name})"), close + 1
        else:
            found, at = found + text[at], at + 1
    return found


SIGNS = st.text(st.sampled_from("$()AB {}\\'\"\nü"), max_size=30)


@settings(deadline=None)
@given(SIGNS | st.text())
def test_an_escaped_text_arrives_literally(text: str) -> None:
    assert expanded(escaped(text), {"A": "wrong", "B": "wrong", "": "wrong"}) == text


@settings(deadline=None)
@given(argv=st.lists(SIGNS, max_size=4), values=st.dictionaries(st.sampled_from("ABCD"), SIGNS), hide=st.booleans())
def test_what_a_container_is_given_is_what_was_meant(argv: list[str], values: dict[str, str], hide: bool) -> None:
    options = KubernetesOptions(env_in_secret=hide, setup_command="s $$ $(A)")
    wanted = spec(argv=("agent", *argv, "--mcp", MCP), mcp=MCP, environment=values, sidecars=())
    unit = Unit(UNIT, "inst", KEY, wanted)
    made = job_object.job(options, unit, wanted, **WHOSE)["spec"]["template"]["spec"]
    kept = job_object.secret(options, unit, wanted, job_uid="u", **WHOSE)
    seen: dict[str, str] = {}
    for entry in named(made["containers"])["env"]:
        if "valueFrom" in entry:
            assert kept is not None
            reference = entry["valueFrom"]["secretKeyRef"]
            assert reference["name"] == kept["metadata"]["name"]
            seen[entry["name"]] = base64.b64decode(kept["data"][reference["key"]]).decode()
        else:
            seen[entry["name"]] = expanded(entry["value"], seen)
    assert {name: seen[name] for name in values} == values
    assert [expanded(each, seen) for each in named(made["containers"])["args"]] == ["agent", *argv, "--mcp", MCP]
    assert expanded(named(made["initContainers"], "setup")["command"][2], seen) == "s $$ $(A)"
    assert (kept is not None) == hide


def test_with_a_secret_nothing_of_the_task_s_variables_stands_in_the_job() -> None:
    options = KubernetesOptions(env_in_secret=True, setup_command="true", environment={"E": "operators"})
    hidden: dict[str, Any] = {
        "environment": {"TOKEN": "hush-hush", "odd name/": "also hushed"},
        "argv": ("agent", "--mcp", MCP),
    }
    made = job(options, mcp=MCP, **hidden)
    for value in ("hush", "operators", "TASK_ID) $", escaped(MCP)):
        assert value not in repr(made)
    task = named(made["spec"]["template"]["spec"]["containers"])
    assert task["args"] == ["agent", "--mcp", f"$({MCP_VARIABLE})"]
    assert task["command"][2].startswith(f"unset {MCP_VARIABLE}\n")
    setup = named(made["spec"]["template"]["spec"]["initContainers"], "setup")
    assert MCP_VARIABLE not in names(setup["env"])
    kept = secret(options, mcp=MCP, **hidden)
    assert kept is not None
    assert kept["immutable"] is True
    assert kept["metadata"]["name"] == made["metadata"]["name"]
    assert kept["metadata"]["labels"] == made["metadata"]["labels"]
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": made["metadata"]["name"], "uid": "uid-1"}
    assert kept["metadata"]["ownerReferences"] == [owner]
    assert all(re.fullmatch(r"[-._a-zA-Z0-9]+", name) and name.startswith(f"{UNIT}.") for name in kept["data"])


def test_without_variables_or_without_the_option_there_is_no_secret() -> None:
    assert secret(PLAIN) is None
    assert secret(KubernetesOptions(env_in_secret=True), environment={}) is None


@pytest.mark.parametrize("hide", [False, True])
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"environment": {"": "x"}}, "a variable cannot have the name ''"),
        ({"environment": {"A=B": "x"}}, "a variable cannot have the name 'A=B'"),
        ({"environment": {"A": "x\0"}}, "the variable A has a NUL byte in it; remove it"),
        ({"environment": {"A": "\udcff"}}, "the variable A is not valid UTF-8"),
        ({"argv": ("agent", "x\0")}, "argument 2 has a NUL byte in it"),
    ],
)
def test_what_no_container_can_be_given_is_named(hide: bool, changes: dict[str, Any], told: str) -> None:
    reason, detail = refused(KubernetesOptions(env_in_secret=hide), **changes)
    assert reason is Reason.JOB_CREATE
    assert told in detail


# -- preflight


@pytest.mark.parametrize("image_volumes", [False, True])
def test_the_preflight_has_what_decides_about_a_task_s_pod(image_volumes: bool) -> None:
    options = KubernetesOptions(
        pod_template=FULL,
        use_image_volumes=image_volumes,
        preflight_image="mine:1",
        preflight_timeout=2.5,
        extra_labels={"team": "a"},
        extra_annotations={"x/y": "z"},
    )
    made = job_object.preflight_job(options, stamp=1234567890123456789, **WHOSE)
    assert made["metadata"]["name"] == "oz-preflight-61b6053823f2528f-1234567890123456789"
    assert made["metadata"]["labels"].items() >= {"team": "a", "oz-worker-role": "preflight"}.items()
    assert "oz-task-id" not in made["metadata"]["labels"]
    assert made["metadata"]["annotations"] == {"x/y": "z", "oz.warp.dev/worker-id": "My Worker"}
    assert job_object.key_of(made) is None
    assert (made["spec"]["activeDeadlineSeconds"], made["spec"]["ttlSecondsAfterFinished"]) == (33, 300)
    inside = made["spec"]["template"]["spec"]
    assert inside["serviceAccountName"] == "oz"
    assert inside["nodeSelector"] == FULL["nodeSelector"]
    assert names(inside["containers"]) == ["task"]
    task = inside["containers"][0]
    assert (task["image"], task["command"], task["securityContext"]) == ("mine:1", ["true"], {"runAsUser": 1000})
    assert task["resources"]["limits"] == {"cpu": "100m", "memory": "64Mi"}
    assert names(inside["initContainers"]) == ([] if image_volumes else ["root"])
    if image_volumes:
        assert inside["volumes"][-1]["image"]["reference"] == "mine:1"
        assert task["volumeMounts"][0]["name"] == inside["volumes"][-1]["name"]
    else:
        assert inside["initContainers"][0]["securityContext"]["runAsUser"] == 0


def test_the_preflight_s_resources_can_be_given() -> None:
    resources = {"limits": {"cpu": "1"}}
    made = job_object.preflight_job(KubernetesOptions(preflight_resources=resources), stamp=1, **WHOSE)
    assert made["spec"]["template"]["spec"]["containers"][0]["resources"] == resources
