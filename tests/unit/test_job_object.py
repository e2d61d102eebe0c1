"""The objects of a task and of the preflight: valid by the published schemas, exact, laid over the template."""

from __future__ import annotations

import re
from typing import Any

import kubernetes_validate
import pytest

from oz_worker.backends import job_object
from oz_worker.model import InstanceShape, Reason, Sidecar
from oz_worker.settings import KubernetesOptions
from tests.unit.job_orders import FULL, PLAIN, WHOSE, job, named, names, pod, refused, secret, template

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
