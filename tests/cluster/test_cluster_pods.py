"""The kubelet of the suite's cluster: processes, environment, volumes, init containers, ends and their words."""

from __future__ import annotations

import json
import signal

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.conditions import condition
from tests.cluster.fixtures import Kubectl, back_to
from tests.cluster.patience import eventually
from tests.cluster.shapes import (
    container,
    ended,
    events,
    has_event,
    job,
    pod_name,
    pod_of,
    pods_of,
    running,
    state,
    submit,
    verdict,
)

EMPTY = {"name": "w", "emptyDir": {}}
WORKSPACE = {"name": "w", "mountPath": "/workspace"}
READY = "trap 'echo term; exit 0' TERM; echo up; sleep 600 & wait"


def log(kubectl: Kubectl, name: str, *flags: str) -> str:
    return kubectl("logs", f"job/{name}", *flags)


def test_a_container_sees_its_root_and_nothing_of_the_machine(cluster: Cluster, kubectl: Kubectl) -> None:
    script = "hostname; pwd; echo $$$$; id -u; echo x > /new; cat /new; echo $HOSTNAME; ls /; test -c /dev/null"
    submit(cluster, job("a", container(script, workingDir="/some/where")))
    assert verdict(ended(cluster, "a")) == "Complete"
    lines = log(kubectl, "a").split("\n")
    name = pod_name(cluster, "a")
    assert lines[:6] == [name, "/some/where", "1", "0", "x", name]
    assert {"bin", "dev", "proc", "some", "tmp"} <= set(lines)
    assert "work" not in lines
    submit(cluster, job("b", container("test ! -e /new")))
    assert verdict(ended(cluster, "b")) == "Complete"


def test_environment_and_arguments_are_made_by_the_kubelet(cluster: Cluster, kubectl: Kubectl) -> None:
    kubectl("create", "secret", "generic", "s", "--from-literal=K=v$(A)", "--from-literal=L=two")
    env = [
        {"name": "A", "value": "1"},
        {"name": "B", "value": "$(A)$(C)$$(A)"},
        {"name": "C", "value": "late"},
        {"name": "S", "valueFrom": {"secretKeyRef": {"name": "s", "key": "K"}}},
        {"name": "O", "valueFrom": {"secretKeyRef": {"name": "none", "key": "K", "optional": True}}},
        {"name": "P", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "J", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['job']"}}},
    ]
    source = [{"prefix": "X_", "secretRef": {"name": "s"}}]
    script = 'echo "$A|$B|$C|$S|${O-unset}|$P|$J|$X_L|$KUBERNETES_SERVICE_HOST"; echo "$@"'
    row = container(script, env=env, envFrom=source)
    submit(cluster, job("a", {**row, "args": ["zero", "$(A)", "$$(A)", "$(NONE)", "$x"]}))
    ended(cluster, "a")
    name = pod_name(cluster, "a")
    expected = f"1|1$(C)$(A)|late|v$(A)|unset|{name}|a|two|127.0.0.1\n1 $(A) $(NONE) $x\n"
    assert log(kubectl, "a") == expected


def test_volumes_are_shared_by_the_containers_of_a_pod(cluster: Cluster, kubectl: Kubectl) -> None:
    kubectl("create", "secret", "generic", "s", "--from-literal=key=secret")
    volumes = [
        EMPTY,
        {"name": "s", "secret": {"secretName": "s"}},
        {"name": "i", "image": {"reference": cluster.sidecar_image}},
    ]
    mounts = [
        WORKSPACE,
        {"name": "s", "mountPath": "/etc/keys/deep"},
        {"name": "i", "mountPath": "/agent", "readOnly": True},
    ]
    first = container("echo one > /workspace/a", "first", volumeMounts=[WORKSPACE])
    script = "cat /workspace/a /etc/keys/deep/key; echo; ls /agent; touch /agent/x; ! touch /etc/keys/deep/x"
    submit(
        cluster, job("a", container(script, volumeMounts=mounts), pod={"volumes": volumes, "initContainers": [first]})
    )
    assert verdict(ended(cluster, "a")) == "Complete"
    said = log(kubectl, "a", "-c", "task")
    assert said.startswith("one\nsecret\nentrypoint.sh\noz\n")
    assert said.count("Read-only file system") == 2


def test_a_sidecar_image_without_a_shell_runs_from_its_volume(cluster: Cluster, kubectl: Kubectl) -> None:
    volumes = [{"name": "i", "image": {"reference": cluster.sidecar_image}}]
    row = container(
        "", volumeMounts=[{"name": "i", "mountPath": "/agent"}], env=[{"name": "FAKE_OZ_SCRIPT", "value": "echo works"}]
    )
    row["command"] = ["/agent/entrypoint.sh", "agent", "run", "--prompt", "x"]
    submit(cluster, job("a", row, pod={"volumes": volumes}))
    submit(cluster, job("b", container("true", image=cluster.sidecar_image)))
    assert verdict(ended(cluster, "a")) == "Complete"
    assert log(kubectl, "a") == "works\n"
    ended(cluster, "b")
    found = state(pod_of(cluster, "b"))["terminated"]
    assert (found["reason"], found["exitCode"]) == ("StartError", 128)
    assert 'exec: "/bin/sh": stat /bin/sh: no such file or directory' in found["message"]


def test_init_containers_run_in_order_and_stop_at_the_first_failure(cluster: Cluster, kubectl: Kubectl) -> None:
    early = [
        container("echo a >> /workspace/log", "one", volumeMounts=[WORKSPACE]),
        container("cat /workspace/log; exit 4", "two", volumeMounts=[WORKSPACE]),
        container("true", "three"),
    ]
    submit(cluster, job("a", container("true"), pod={"volumes": [EMPTY], "initContainers": early}))
    assert verdict(ended(cluster, "a")) == "Failed: BackoffLimitExceeded"
    pod = pod_of(cluster, "a")
    assert pod["status"]["phase"] == "Failed"
    assert [state(pod, name).get("terminated", {}).get("exitCode") for name in ("one", "two", "three")] == [0, 4, None]
    assert state(pod)["waiting"]["reason"] == "PodInitializing"
    row = condition(pod, "Initialized")
    assert row is not None
    assert (row["status"], row["reason"]) == ("False", "ContainersNotInitialized")
    assert log(kubectl, "a", "-c", "two") == "a\n"
    assert "waiting to start: PodInitializing" in kubectl.refused("logs", "job/a", "-c", "task")


def test_native_sidecars_live_as_long_as_the_pod(cluster: Cluster, kubectl: Kubectl) -> None:
    mesh = container(READY, "mesh", restartPolicy="Always")
    after = container("echo after", "after")
    submit(cluster, job("a", container("sleep 1; echo done"), pod={"initContainers": [mesh, after]}))
    pod = running(cluster, "a", "mesh")
    assert verdict(ended(cluster, "a")) == "Complete"
    pod = pod_of(cluster, "a")
    assert pod["status"]["phase"] == "Succeeded"
    assert state(pod, "mesh")["terminated"]["exitCode"] == 0
    assert log(kubectl, "a", "-c", "mesh") == "up\nterm\n"


@pytest.mark.parametrize(
    ("script", "code", "reason"),
    [
        ("exit 0", 0, "Completed"),
        ("exit 3", 3, "Error"),
        ("sh -c 'kill -9 $$$$'", 137, "Error"),
        ("sh -c 'kill -11 $$$$'", 139, "Error"),
    ],
)
def test_ends_have_a_code_and_a_reason(script: str, code: int, reason: str, cluster: Cluster) -> None:
    submit(cluster, job("a", container(f"{script}; exit $?")))
    ended(cluster, "a")
    found = state(pod_of(cluster, "a"))["terminated"]
    assert (found["exitCode"], found["reason"]) == (code, reason)
    assert {"startedAt", "finishedAt", "containerID"} <= found.keys()


def test_memory_that_is_used_up_is_said(cluster: Cluster) -> None:
    submit(cluster, job("a", container("sleep 600")))
    running(cluster, "a")
    cluster.faults.out_of_memory("default", pod_name(cluster, "a"))
    assert verdict(ended(cluster, "a")) == "Failed: BackoffLimitExceeded"
    found = state(pod_of(cluster, "a"))["terminated"]
    assert (found["exitCode"], found["reason"]) == (137, "OOMKilled")


def test_last_words_are_the_message(cluster: Cluster) -> None:
    submit(cluster, job("a", container("echo because > /dev/termination-log; exit 1")))
    submit(cluster, job("b", container("echo because; exit 1", terminationMessagePolicy="FallbackToLogsOnError")))
    for name in "ab":
        ended(cluster, name)
        assert state(pod_of(cluster, name))["terminated"]["message"] == "because\n"


@pytest.mark.parametrize(("script", "code"), [(READY, 0), ("sleep 600", 137)], ids=["obeys", "ignores"])
def test_deletion_is_term_then_kill(script: str, code: int, cluster: Cluster, kubectl: Kubectl) -> None:
    before = cluster.census()
    seen: list[int] = []

    def heard(change: object) -> None:
        obj = getattr(change, "object")  # noqa: B009
        if obj["kind"] == "Pod" and (found := state(obj).get("terminated")):
            seen.append(found["exitCode"])

    cluster.store.listeners.append(heard)
    submit(cluster, job("a", container(script)))
    pod = running(cluster, "a")
    kubectl("delete", "job", "a", "--cascade=foreground")
    assert seen[0] == code
    assert ("Normal", "Killing", "Stopping container task") in events(cluster, pod["metadata"]["name"])
    back_to(cluster, before)


def test_a_hook_runs_before_term(cluster: Cluster, kubectl: Kubectl) -> None:
    hook = {
        "preStop": {
            "exec": {"command": ["/bin/sh", "-c", "cat /proc/1/comm > /workspace/hook; echo $A >> /workspace/hook"]}
        }
    }
    script = "trap 'cat /workspace/hook; sleep 1; exit 0' TERM; echo up; sleep 600 & wait"
    row = container(script, lifecycle=hook, volumeMounts=[WORKSPACE], env=[{"name": "A", "value": "b"}])
    submit(cluster, job("a", row, pod={"volumes": [EMPTY], "terminationGracePeriodSeconds": 20}))
    running(cluster, "a")
    eventually(lambda: log(kubectl, "a") == "up\n")
    name = pod_name(cluster, "a")
    kubectl("delete", "pod", name, "--wait=false")
    eventually(lambda: kubectl.run("logs", name).stdout == "up\nsh\nb\n")


def test_logs_are_cut_as_asked(cluster: Cluster, kubectl: Kubectl) -> None:
    submit(cluster, job("a", container("for i in 1 2 3; do echo line $i; done; printf end; sleep 600")))
    running(cluster, "a")
    eventually(lambda: log(kubectl, "a") == "line 1\nline 2\nline 3\n")
    assert log(kubectl, "a", "--tail=2") == "line 2\nline 3\n"
    assert log(kubectl, "a", "--limit-bytes=10") == "line 1\nlin"
    assert log(kubectl, "a", "--tail=1", "--limit-bytes=4") == "line"
    assert log(kubectl, "a", "--since-time=2100-01-01T00:00:00Z") == ""
    assert "line 1" in log(kubectl, "a", "--since=1h", "--timestamps")
    assert log(kubectl, "a", "--tail=0") == ""
    assert "container nobody is not valid for pod" in kubectl.refused("logs", "job/a", "-c", "nobody")
    assert 'previous terminated container "task" in pod' in kubectl.refused("logs", "job/a", "--previous")
    cluster.faults.signal("default", pod_name(cluster, "a"), signal.SIGKILL)
    ended(cluster, "a")
    assert log(kubectl, "a", "--tail=1") == "end"


def test_logs_can_be_followed(cluster: Cluster, kubectl: Kubectl) -> None:
    submit(cluster, job("a", container("echo one; sleep 1; echo two")))
    running(cluster, "a")
    assert log(kubectl, "a", "-f") == "one\ntwo\n"


def test_a_container_is_restarted_where_the_pod_says_so(cluster: Cluster, kubectl: Kubectl) -> None:
    row = container("echo run; test -e /workspace/a || { touch /workspace/a; exit 1; }", volumeMounts=[WORKSPACE])
    submit(cluster, job("a", row, pod={"volumes": [EMPTY], "restartPolicy": "OnFailure"}))
    assert verdict(ended(cluster, "a")) == "Complete"
    (found,) = pod_of(cluster, "a")["status"]["containerStatuses"]
    assert found["restartCount"] == 1
    assert found["lastState"]["terminated"]["exitCode"] == 1
    assert log(kubectl, "a", "--previous") == "run\n"


def test_resources_decide_where_a_pod_fits(cluster: Cluster) -> None:
    half = {"requests": {"cpu": "40", "memory": "1Gi"}}
    submit(cluster, job("a", container(READY, resources=half)))
    running(cluster, "a")
    submit(cluster, job("b", container("true", resources=half)))
    pod = pod_of(cluster, "b")
    has_event(cluster, pod["metadata"]["name"], "FailedScheduling", "0/1 nodes are available: 1 Insufficient cpu.")
    row = condition(pod_of(cluster, "b"), "PodScheduled")
    assert row is not None
    assert (row["status"], row["reason"]) == ("False", "Unschedulable")
    assert pod_of(cluster, "b")["status"]["qosClass"] == "Burstable"
    cluster.faults.delete_job("default", "a")
    assert verdict(ended(cluster, "b")) == "Complete"


def test_a_selector_that_fits_no_node_waits_for_one(cluster: Cluster) -> None:
    submit(cluster, job("a", container("true"), pod={"nodeSelector": {"gpu": "yes"}}))
    has_event(
        cluster, pod_name(cluster, "a"), "FailedScheduling", "1 node(s) didn't match Pod's node affinity/selector"
    )
    cluster.add_node("node-2", labels={"gpu": "yes"})
    ended(cluster, "a")
    assert pod_of(cluster, "a")["spec"]["nodeName"] == "node-2"


def test_the_token_of_the_service_account_is_mounted_unless_it_is_not_wanted(
    cluster: Cluster, kubectl: Kubectl
) -> None:
    script = "cd /var/run/secrets/kubernetes.io/serviceaccount && ls && cat namespace"
    submit(cluster, job("a", container(script)))
    submit(cluster, job("b", container(script), pod={"automountServiceAccountToken": False}))
    assert verdict(ended(cluster, "a")) == "Complete"
    assert log(kubectl, "a").split() == ["ca.crt", "namespace", "token", "default"]
    assert verdict(ended(cluster, "b")).startswith("Failed")


def test_users_and_modes_are_kept(cluster: Cluster, kubectl: Kubectl) -> None:
    submit(
        cluster,
        job("a", container("id -u; id -g; touch /x"), pod={"securityContext": {"runAsUser": 1000, "runAsGroup": 1000}}),
    )
    assert verdict(ended(cluster, "a")).startswith("Failed")
    assert log(kubectl, "a").split()[:2] == ["1000", "1000"]


def test_two_images_can_be_told_apart(cluster: Cluster, kubectl: Kubectl) -> None:
    cluster.images.add("example.com/team/own:1", files={"hello": (0o644, b"own\n")}, env={"E": "image"}, cwd="/tmp")
    submit(cluster, job("a", container("cat /hello; echo $E; pwd", image="example.com/team/own:1")))
    ended(cluster, "a")
    assert log(kubectl, "a") == "own\nimage\n/tmp\n"
    assert json.loads(kubectl("get", "pods", "-o", "json"))["items"][0]["status"]["podIP"] == "127.0.0.1"
    assert len(pods_of(cluster, "a")) == 1
