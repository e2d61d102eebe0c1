"""The API server of the suite, driven by the real kubectl: discovery, verbs, refusals, rights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trustme

from tests.cluster.access import Rule
from tests.cluster.cluster import Cluster, Tls
from tests.cluster.environment import expand
from tests.cluster.fixtures import Kubectl, OwnCluster, back_to
from tests.cluster.patience import eventually
from tests.cluster.resources import JOBS, SECRETS
from tests.cluster.shapes import container, ended, gone, job, pod_name, submit, text, verdict
from tests.conftest import Certificates
from tests.engines.client import find_program

JOBS_PATH = "/apis/batch/v1/namespaces/default/jobs"
CLIENTS = sorted(Path("/usr/lib/google-cloud-sdk/bin").glob("kubectl.1.*")) or [Path(find_program("kubectl"))]
"""Every version that is installed."""


def delete_options(**fields: object) -> str:
    return json.dumps({"apiVersion": "v1", "kind": "DeleteOptions", **fields})


@pytest.fixture
def secure_cluster(certificates: Certificates, own_cluster: OwnCluster) -> Cluster:
    return own_cluster(tls=Tls(certificates.server, certificates.ca_file))


@pytest.mark.parametrize("aggregated", [True, False], ids=["aggregated", "old"])
@pytest.mark.parametrize("release", ["1.27", "1.32"])
def test_a_job_is_created_runs_and_is_read(
    release: str, aggregated: bool, own_cluster: OwnCluster, tmp_path: Path
) -> None:
    cluster = own_cluster(release, aggregated=aggregated)
    kubectl = Kubectl(cluster.kubeconfig, tmp_path)
    assert json.loads(kubectl("version", "-o", "json"))["serverVersion"]["gitVersion"] == f"v{release}.0"
    assert "job.batch/a created" in kubectl(
        "create", "-f", "-", stdin=text(job("a", container("echo hello; echo oh >&2")))
    )
    assert verdict(ended(cluster, "a")) == "Complete"
    assert sorted(kubectl("logs", "job/a").split()) == ["hello", "oh"]
    assert json.loads(kubectl("get", "jobs", "-o", "json"))["items"][0]["status"]["succeeded"] == 1
    assert "job.batch/a" in kubectl("get", "jobs,pods,secrets,events,nodes", "-A", "-o", "name")


@pytest.mark.parametrize("program", CLIENTS, ids=lambda path: path.name)
def test_every_kubectl_can_create_and_delete(program: Path, cluster: Cluster, tmp_path: Path) -> None:
    kubectl = Kubectl(cluster.kubeconfig, tmp_path, str(program))
    kubectl("create", "-f", "-", stdin=text(job("a", container("sleep 600"))))
    kubectl("delete", "job", "a", "--cascade=foreground", "--grace-period=0", "--force")
    gone(cluster, "a")


def test_an_object_with_this_name_is_there_already(kubectl: Kubectl) -> None:
    kubectl("create", "-f", "-", stdin=text(job("a", container("sleep 600"))))
    said = kubectl.refused("create", "-f", "-", stdin=text(job("a", container("true"))))
    assert 'Error from server (AlreadyExists): error when creating "STDIN": jobs.batch "a" already exists' in said
    assert 'jobs.batch "b" not found' in kubectl.refused("get", "job", "b")


@pytest.mark.parametrize("release", ["1.27", "1.32"])
def test_decoding_is_strict(release: str, own_cluster: OwnCluster, tmp_path: Path) -> None:
    cluster = own_cluster(release)
    kubectl = Kubectl(cluster.kubeconfig, tmp_path)

    def refused(obj: object, *flags: str) -> str:
        return kubectl.refused("create", "-f", "-", *flags, stdin=json.dumps(obj))

    said = refused(job("a", container("true", imagPullPolicy="Never"), pod={"nodeSelektor": {}}))
    assert 'strict decoding error: unknown field "spec.template.spec.nodeSelektor"' not in said or "imagPull" in said
    assert 'unknown field "spec.template.spec.containers[0].imagPullPolicy"' in said
    assert 'unknown field "spec.template.spec.nodeSelektor"' in said
    said = refused(job("a", container("true"), backoffLimit="0"))
    assert "json: cannot unmarshal string into Go struct field JobSpec.spec.backoffLimit of type int32" in said
    said = refused(job("a", container("true", resources={"limits": {"cpu": "1 core"}})))
    assert "quantities must match the regular expression" in said
    with_image = job("a", container("true"), pod={"volumes": [{"name": "i", "image": {"reference": "busybox"}}]})
    if release == "1.27":
        assert 'unknown field "spec.template.spec.volumes[0].image"' in refused(with_image)
    else:
        kubectl("create", "-f", "-", stdin=text(with_image))
    twice = text(job("t", container("true"))).replace('"backoffLimit": 0', '"backoffLimit": 0, "backoffLimit": 1')
    path = tmp_path / "twice.json"
    path.write_text(twice)
    assert 'duplicate field "spec.backoffLimit"' in kubectl.refused(
        "create", "--raw", f"{JOBS_PATH}?fieldValidation=Strict", "-f", str(path)
    )
    loose = job("loose", container("true", imagPullPolicy="Never"))
    assert "created" in kubectl("create", "--validate=ignore", "-f", "-", stdin=text(loose))
    done = kubectl.run("create", "--validate=warn", "-f", "-", stdin=text({**loose, "metadata": {"name": "warned"}}))
    assert 'Warning: unknown field "spec.template.spec.containers[0].imagPullPolicy"' in done.stderr
    made = cluster.store.get(JOBS, "default", "warned")
    assert made is not None
    assert "imagPullPolicy" not in text(made)


def test_image_volumes_that_are_switched_off_lose_their_source(own_cluster: OwnCluster, tmp_path: Path) -> None:
    kubectl = Kubectl(own_cluster(image_volumes=False).kubeconfig, tmp_path)
    obj = job("a", container("true"), pod={"volumes": [{"name": "i", "image": {"reference": "busybox"}}]})
    assert "spec.template.spec.volumes[0]: Required value: must specify a volume type" in kubectl.refused(
        "create", "-f", "-", stdin=text(obj)
    )


@pytest.mark.parametrize(
    ("obj", "said"),
    [
        (job("A_b", container("true")), 'metadata.name: Invalid value: "A_b": a lowercase RFC 1123 subdomain'),
        (job("a" * 64, container("true")), "must be no more than 63 characters"),
        (
            job("a", container("true"), meta={"labels": {"x": "a b"}}),
            'metadata.labels: Invalid value: "a b": a valid label',
        ),
        (
            job("a", container("true"), meta={"annotations": {"a b": "x"}}),
            'metadata.annotations: Invalid value: "a b": name part',
        ),
        (
            job("a", container("true"), activeDeadlineSeconds=-1),
            "spec.activeDeadlineSeconds: Invalid value: -1: must be greater",
        ),
        (job("a", {"name": "task"}), "spec.template.spec.containers[0].image: Required value"),
        (job("a"), "spec.template.spec.containers: Required value"),
        (job("a", container("true"), container("true")), 'containers[1].name: Duplicate value: "task"'),
        (
            job("a", container("true", volumeMounts=[{"name": "v", "mountPath": "/v"}])),
            'spec.template.spec.containers[0].volumeMounts[0].name: Not found: "v"',
        ),
        (
            job("a", container("true"), pod={"volumes": [{"name": "v", "emptyDir": {}}] * 2}),
            'spec.template.spec.volumes[1].name: Duplicate value: "v"',
        ),
        (
            job("a", container("true"), pod={"restartPolicy": "Always"}),
            'restartPolicy: Required value: valid values: "OnFailure", "Never"',
        ),
        (
            job("a", container("true", resources={"requests": {"cpu": "2"}, "limits": {"cpu": "1"}})),
            "must be less than or equal to cpu limit",
        ),
        (job("a", container("true", imagePullPolicy="Sometimes")), 'Unsupported value: "Sometimes": supported values:'),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_is_not_valid_is_refused_by_field(obj: dict[str, object], said: str, kubectl: Kubectl) -> None:
    assert said in kubectl.refused("create", "-f", "-", stdin=json.dumps(obj))


def test_deletion_keeps_its_preconditions(cluster: Cluster, kubectl: Kubectl) -> None:
    made = submit(cluster, job("a", container("trap : TERM; sleep 600 & wait")))
    path = f"{JOBS_PATH}/a"
    wrong = delete_options(preconditions={"uid": "other"}, propagationPolicy="Foreground")
    said = kubectl.refused("delete", "--raw", path, "-f", "-", stdin=wrong)
    assert "Error from server (Conflict): Operation cannot be fulfilled" in said
    assert f"Precondition failed: UID in precondition: other, UID in object meta: {made['metadata']['uid']}" in said
    right = delete_options(preconditions={"uid": made["metadata"]["uid"]}, propagationPolicy="Foreground")
    answer = json.loads(kubectl("delete", "--raw", path, "-f", "-", stdin=right))
    assert answer["metadata"]["finalizers"] == ["foregroundDeletion"]
    assert answer["metadata"]["deletionTimestamp"]
    gone(cluster, "a")
    assert "(NotFound)" in kubectl.refused("delete", "--raw", path, "-f", "-", stdin=right)


def test_deletion_without_a_policy_leaves_the_pods(cluster: Cluster, kubectl: Kubectl) -> None:
    submit(cluster, job("a", container("sleep 600")))
    pod = pod_name(cluster, "a")
    done = kubectl.run("delete", "--raw", f"{JOBS_PATH}/a", "-f", "-", stdin=delete_options())
    assert "child pods are preserved by default when jobs are deleted" in done.stderr
    eventually(lambda: cluster.store.get(JOBS, "default", "a") is None)
    found = json.loads(kubectl("get", "pod", pod, "-o", "json"))
    assert "ownerReferences" not in found["metadata"]
    kubectl("delete", "pod", pod)


@pytest.mark.parametrize("policy", ["Foreground", "Background"])
def test_what_a_job_owns_goes_with_it(policy: str, cluster: Cluster, kubectl: Kubectl) -> None:
    before = cluster.census()
    made = submit(cluster, job("a", container("sleep 600")))
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": "a", "uid": made["metadata"]["uid"]}
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "a", "ownerReferences": [owner]},
        "stringData": {"K": "v"},
    }
    kubectl("create", "-f", "-", stdin=text(secret))
    cluster.faults.delete_job("default", "a", policy=policy)
    gone(cluster, "a")
    eventually(lambda: cluster.store.get(SECRETS, "default", "a") is None)
    back_to(cluster, before)


def test_what_is_owned_by_nobody_that_exists_is_collected(cluster: Cluster, kubectl: Kubectl) -> None:
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": "a", "uid": "00000000-0000-4000-8000-000000000000"}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s", "ownerReferences": [owner]}}
    kubectl("create", "-f", "-", stdin=text(secret))
    eventually(lambda: cluster.store.get(SECRETS, "default", "s") is None)


def test_patches_change_what_may_change(cluster: Cluster, kubectl: Kubectl) -> None:
    submit(cluster, job("a", container("sleep 600")))
    kubectl("patch", "job", "a", "--type=merge", "-p", '{"spec":{"activeDeadlineSeconds":500}}')
    kubectl("patch", "job", "a", "--type=json", "-p", '[{"op":"add","path":"/metadata/labels","value":{"x":"y"}}]')
    kubectl("annotate", "job", "a", "note=1")
    found = json.loads(kubectl("get", "job", "a", "-o", "json"))
    assert found["spec"]["activeDeadlineSeconds"] == 500
    assert (found["metadata"]["labels"]["x"], found["metadata"]["annotations"]["note"]) == ("y", "1")
    said = kubectl.refused(
        "patch", "job", "a", "-p", '{"spec":{"template":{"spec":{"containers":[{"name":"task","image":"b"}]}}}}'
    )
    assert "spec.template: Invalid value:" in said
    assert "field is immutable" in said
    stale = {**found, "metadata": {**found["metadata"], "resourceVersion": "1"}}
    assert "the object has been modified; please apply your changes" in kubectl.refused(
        "replace", "-f", "-", stdin=text(stale)
    )


def test_a_strategic_patch_merges_rows_by_their_key(cluster: Cluster, kubectl: Kubectl) -> None:
    made = submit(cluster, job("a", container("sleep 600"), suspend=True))
    assert made["spec"]["suspend"] is True
    change = {"spec": {"template": {"spec": {"containers": [{"name": "task", "env": [{"name": "A", "value": "1"}]}]}}}}
    kubectl("patch", "job", "a", "-p", text(change))
    rows = json.loads(kubectl("get", "job", "a", "-o", "json"))["spec"]["template"]["spec"]["containers"]
    assert [(row["name"], row["image"], row["env"]) for row in rows] == [
        ("task", "busybox", [{"name": "A", "value": "1"}])
    ]


def test_apply_creates_and_changes(kubectl: Kubectl) -> None:
    for flags in ([], ["--server-side"]):
        obj = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": f"s{len(flags)}"}, "stringData": {"a": "1"}}
        kubectl("apply", *flags, "-f", "-", stdin=text(obj))
        kubectl("apply", *flags, "-f", "-", stdin=text({**obj, "stringData": {"a": "2"}}))
        assert json.loads(kubectl("get", "secret", f"s{len(flags)}", "-o", "json"))["data"] == {"a": "Mg=="}


def test_lists_come_in_pages_of_one_moment(cluster: Cluster, kubectl: Kubectl) -> None:
    for number in range(5):
        submit(
            cluster, job(f"j{number}", container("sleep 600"), meta={"labels": {"n": str(number % 2)}}, suspend=True)
        )
    eventually(lambda: all(found.get("status") for found in cluster.store.objects(JOBS)[0]))
    first = json.loads(kubectl("get", "--raw", f"{JOBS_PATH}?limit=2"))
    assert [row["metadata"]["name"] for row in first["items"]] == ["j0", "j1"]
    assert first["metadata"]["remainingItemCount"] == 3
    cluster.faults.delete_job("default", "j2")
    token = first["metadata"]["continue"]
    second = json.loads(kubectl("get", "--raw", f"{JOBS_PATH}?limit=9&continue={token}"))
    assert [row["metadata"]["name"] for row in second["items"]] == ["j2", "j3", "j4"]
    assert second["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]
    cluster.faults.forget_history()
    said = kubectl.refused("get", "--raw", f"{JOBS_PATH}?limit=9&continue={token}")
    assert "The provided continue parameter is too old" in said
    names = kubectl("get", "jobs", "-l", "n in (1,3),n!=0,n", "-o", "name").split()
    assert names == ["job.batch/j1", "job.batch/j3"]
    assert kubectl("get", "jobs", "--field-selector=metadata.name=j3", "-o", "name").split() == ["job.batch/j3"]
    assert "field label not supported: spec.x" in kubectl.refused("get", "jobs", "--field-selector=spec.x=1")
    large = int(first["metadata"]["resourceVersion"]) + 10_000
    assert "Too large resource version" in kubectl.refused("get", "--raw", f"{JOBS_PATH}?resourceVersion={large}")


def test_rights_are_those_of_the_token(secure_cluster: Cluster, tmp_path: Path) -> None:
    cluster = secure_cluster
    token = cluster.token(
        Rule(("get", "list"), ("jobs",), ("batch",)), user="system:serviceaccount:oz:worker", namespace="default"
    )
    kubectl = Kubectl(cluster.write_kubeconfig(token), tmp_path)
    assert kubectl("get", "jobs", "-o", "name") == ""
    said = kubectl.refused("create", "-f", "-", stdin=text(job("a", container("true"))))
    cannot = 'User "system:serviceaccount:oz:worker" cannot create resource "jobs" in API group "batch"'
    assert f'jobs.batch is forbidden: {cannot} in the namespace "default"' in said
    assert 'cannot list resource "pods" in API group ""' in kubectl.refused("get", "pods")
    assert kubectl("auth", "can-i", "list", "jobs") == "yes\n"
    assert kubectl.run("auth", "can-i", "watch", "jobs").stdout == "no\n"
    assert kubectl.run("auth", "can-i", "get", "pods", "--subresource=log").stdout == "no\n"
    assert "jobs.batch" in kubectl("auth", "can-i", "--list")
    cluster.grant(token, Rule(("*",), ("*",)))
    assert kubectl("auth", "can-i", "watch", "jobs") == "yes\n"
    cluster.faults.expire(token)
    assert "You must be logged in to the server (Unauthorized)" in kubectl.refused("get", "jobs")
    cluster.faults.renew(token)
    kubectl("get", "jobs")


def test_tls_takes_tokens_and_nothing_else(secure_cluster: Cluster, tmp_path: Path) -> None:
    cluster = secure_cluster
    kubectl = Kubectl(cluster.kubeconfig, tmp_path)
    kubectl("create", "-f", "-", stdin=text(job("a", container("true"))))
    ended(cluster, "a")
    kubectl("get", "--raw", f"{JOBS_PATH}?watch=1&timeoutSeconds=1")
    anonymous = cluster.write_kubeconfig("wrong")
    assert "Unauthorized" in Kubectl(anonymous, tmp_path).refused("get", "jobs")
    other = tmp_path / "other-ca.pem"
    trustme.CA().cert_pem.write_to_path(str(other))
    stranger = Kubectl(cluster.kubeconfig, tmp_path)
    assert "certificate signed by unknown authority" in stranger.refused(
        f"--certificate-authority={other}", "get", "jobs"
    )


def test_admission_refuses_in_the_words_of_a_cluster(cluster: Cluster, kubectl: Kubectl) -> None:
    hook = cluster.add_webhook("policy.example", lambda resource, obj: "no Jobs today" if resource == JOBS else None)
    obj = text(job("a", container("true")))
    said = kubectl.refused("create", "-f", "-", stdin=obj)
    assert 'admission webhook "policy.example" denied the request: no Jobs today' in said
    cluster.api.webhooks.remove(hook)
    cluster.add_quota("default", count__jobs_batch="1")
    kubectl("create", "-f", "-", stdin=obj)
    said = kubectl.refused("create", "-f", "-", stdin=text(job("b", container("true"))))
    counts = ", ".join(f"{word}: count/jobs.batch=1" for word in ("requested", "used", "limited"))
    assert f'jobs.batch "b" is forbidden: exceeded quota: quota, {counts}' in said


def test_namespaces_end_with_what_is_in_them(cluster: Cluster, kubectl: Kubectl) -> None:
    before = cluster.census()
    kubectl("create", "namespace", "n2")
    kubectl("-n", "n2", "create", "-f", "-", stdin=text(job("a", container("trap 'exit 0' TERM; sleep 600 & wait"))))
    kubectl("-n", "n2", "create", "secret", "generic", "s", "--from-literal=a=b")
    eventually(lambda: cluster.census().processes)
    kubectl("delete", "namespace", "n2")
    assert 'namespaces "n2" not found' in kubectl.refused(
        "-n", "n2", "create", "-f", "-", stdin=text(job("a", container("true")))
    )
    back_to(cluster, before)


def test_the_journal_counts_requests(cluster: Cluster, kubectl: Kubectl) -> None:
    kubectl("create", "-f", "-", stdin=text(job("a", container("true"))))
    assert cluster.journal.count("create", "jobs", agent="kubectl") == 1
    assert cluster.journal.seen("create", "jobs")[0].code == 201
    kubectl.refused("get", "job", "nobody")
    assert cluster.journal.seen("get", "jobs", path="nobody")[-1].code == 404


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("$(A)", "1"),
        ("$$(A)", "$(A)"),
        ("$$$(A)", "$1"),
        ("$(NO)", "$(NO)"),
        ("$A $", "$A $"),
        ("a$(A", "a$(A"),
        ("$$", "$"),
        ("$(A)$(B)", "12"),
        ("$($(A))", "$($(A))"),
        ("%$(B)%$", "%2%$"),
    ],
)
def test_expansion_is_that_of_the_kubelet(given: str, expected: str) -> None:
    assert expand(given, {"A": "1", "B": "2"}) == expected
