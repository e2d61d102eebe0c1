"""What is proven before the first task, and what `check` tries: permissions, admission, the image, a root container."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable

import pytest
import yaml

from oz_worker.backends.job_object import ROLE, ROLE_PREFLIGHT
from oz_worker.devplane.server import ControlPlane
from oz_worker.errors import NotUsable
from tests.checks.asked import Answer, asked
from tests.cluster.access import Rule
from tests.cluster.cluster import Cluster
from tests.cluster.resources import EVENTS, JOBS, PODS
from tests.hosting import eventually
from tests.kubernetes.kubernetes_site import KubernetesSite, options_for, pod_template
from tests.rig import ROOT

VERBS = ("create", "get", "list", "watch", "delete", "patch")
ALL = (
    Rule(VERBS, ("jobs",)),
    Rule(("list", "watch"), ("pods",)),
    Rule(("get",), ("pods/log",)),
    Rule(("list",), ("events",)),
)
ON: dict[str, Any] = {"preflight": True, "preflight_timeout": 20.0}


def role() -> tuple[Rule, ...]:
    """The Role that is shipped."""
    documents = yaml.safe_load_all((ROOT / "deploy/kubernetes/rbac.yaml").read_text())
    (rules,) = [document["rules"] for document in documents if document["kind"] == "Role"]
    return tuple(Rule(tuple(r["verbs"]), tuple(r["resources"]), tuple(r["apiGroups"])) for r in rules)


def not_usable(site: KubernetesSite, **options: Any) -> str:
    with pytest.raises(NotUsable) as caught:
        site.closed(**{**ON, **options}).open()
    eventually(lambda: site.jobs() == [], "a preflight Job is left")
    return str(caught.value)


def test_the_shipped_role_is_enough_for_everything(guarded: KubernetesSite, caplog: pytest.LogCaptureFixture) -> None:
    site = guarded
    backend = site.open(**ON, env_in_secret=True, unschedulable_timeout=1.0, kubeconfig=site.allow(*role()))
    assert [line for line in caplog.messages if "may not" in line] == []
    hold = site.cluster.faults.hold_pods()
    unit = site.unit("exit 1")
    backend.prepare(unit)
    backend.start(unit)
    unit.wait_for_end_or_stop(60)
    assert backend.stragglers(unit) == ""
    hold.end()
    assert backend.clean_up(unit, keep=False) == ""


def test_a_preflight_looks_like_a_task_and_is_removed(site: KubernetesSite) -> None:
    seen: list[dict[str, Any]] = []
    site.cluster.add_webhook(
        "look.example", lambda resource, obj: seen.append(obj) if resource in (JOBS, PODS) else None
    )
    site.open(**ON, extra_labels={"team": "a"}, extra_annotations={"note": "b"})
    job, pod = seen
    for one in (job, pod):
        assert one["metadata"]["labels"]["team"] == "a"
        assert one["metadata"]["labels"][ROLE] == ROLE_PREFLIGHT
        assert one["metadata"]["annotations"]["note"] == "b"
    assert job["spec"]["ttlSecondsAfterFinished"]
    assert job["spec"]["activeDeadlineSeconds"]
    eventually(lambda: site.jobs() == [])


@pytest.mark.parametrize(
    ("verb", "resource"),
    [("create", "jobs"), ("get", "jobs"), ("list", "jobs"), ("delete", "jobs"), ("list", "pods")],
    ids=lambda word: word,
)
def test_a_verb_that_is_missing_is_named(guarded: KubernetesSite, verb: str, resource: str) -> None:
    rules = [
        rule._replace(verbs=tuple(v for v in rule.verbs if v != verb or resource not in rule.resources)) for rule in ALL
    ]
    said = not_usable(guarded, kubeconfig=guarded.allow(*rules))
    assert f"this account may not {verb} {resource} in the namespace default" in said
    assert "rbac.yaml" in said


def test_a_secret_s_verb_is_asked_for_where_it_is_needed(guarded: KubernetesSite) -> None:
    kubeconfig = guarded.allow(*ALL)
    assert "this account may not create secrets in" in not_usable(guarded, kubeconfig=kubeconfig, env_in_secret=True)
    guarded.open(**ON, kubeconfig=kubeconfig)


def test_what_is_only_good_to_have_is_warned_of(guarded: KubernetesSite, caplog: pytest.LogCaptureFixture) -> None:
    kubeconfig = guarded.allow(Rule(("create", "get", "list", "delete"), ("jobs",)), Rule(("list",), ("pods",)))
    guarded.open(**ON, kubeconfig=kubeconfig)
    for name in ("watch jobs", "watch pods", "get pods/log", "list events", "patch jobs"):
        assert any(f"may not {name} " in line for line in caplog.messages), name


def no_root(resource: Any, obj: dict[str, Any]) -> str | None:
    """Pod Security, restricted: no container may be root."""
    containers = obj["spec"].get("initContainers", ()) if resource == PODS else ()
    roots = [one for one in containers if (one.get("securityContext") or {}).get("runAsUser") == 0]
    return "violates PodSecurity restricted: runAsUser=0" if roots else None


FAULTS: dict[str, tuple[Callable[[KubernetesSite], Any], dict[str, Any], str]] = {
    "image": (lambda site: None, {"preflight_image": "registry.example/none:1"}, "registry.example/none:1"),
    "admission of the Job": (
        lambda site: site.cluster.add_webhook("p.example", lambda r, obj: "not here" if r == JOBS else None),
        {},
        'admission webhook "p.example" denied the request: not here',
    ),
    "a root container": (lambda site: site.cluster.add_webhook("p.example", no_root), {}, "runAsUser=0"),
    "a service account": (
        lambda site: None,
        {"pod_template": {"serviceAccountName": "nobody"}},
        'serviceaccount "nobody" not found',
    ),
    "an unknown field": (lambda site: None, {"pod_template": {"bogus": 1}}, 'unknown field "spec.template.spec.bogus"'),
    "no namespace": (lambda site: None, {"namespace": "nowhere"}, 'namespaces "nowhere" not found'),
}


@pytest.mark.parametrize(("begin", "options", "words"), FAULTS.values(), ids=FAULTS)
def test_what_would_stop_every_task_stops_the_start(
    site: KubernetesSite, begin: Callable[[KubernetesSite], Any], options: dict[str, Any], words: str
) -> None:
    begin(site)
    assert words in not_usable(site, preflight_timeout=5.0, **options)


@pytest.mark.parametrize("fault", ["image", "a root container", "a service account"])
def test_a_cluster_that_answers_slowly_is_heard_to_the_end(site: KubernetesSite, fault: str) -> None:
    begin, options, words = FAULTS[fault]
    begin(site)
    with site.cluster.faults.slow(3.0, "get", "jobs"):  # two looks fit in, the second one is the last
        assert words in not_usable(site, preflight_timeout=5.0, **options)


def test_in_a_namespace_full_of_events_the_words_of_the_cluster_are_found(site: KubernetesSite) -> None:
    about = {"kind": "Pod", "namespace": "default", "name": "other", "uid": "other"}
    for number in range(600):
        event = {"metadata": {"name": f"a-{number:03}"}, "involvedObject": about, "reason": "Odd", "message": "m"}
        site.cluster.api.create(EVENTS, "default", {"kind": "Event", "apiVersion": "v1", **event})
    said = not_usable(site, preflight_timeout=5.0, pod_template={"serviceAccountName": "nobody"})
    assert 'serviceaccount "nobody" not found' in said


def test_image_volumes_are_tried_by_mounting_one(site: KubernetesSite) -> None:
    site.open(**ON, use_image_volumes=True)
    assert "registry.example/none:1" in not_usable(
        site, use_image_volumes=True, preflight_image="registry.example/none:1", preflight_timeout=5.0
    )


def test_no_room_is_said_and_does_not_stop_the_start(site: KubernetesSite, caplog: pytest.LogCaptureFixture) -> None:
    hold = site.cluster.faults.hold_pods()
    site.open(preflight=True, preflight_timeout=4.0)
    assert any("found no room for now" in line and "Insufficient cpu" in line for line in caplog.messages)
    hold.end()
    eventually(lambda: site.jobs() == [])


def test_what_a_killed_preflight_left_is_removed_by_the_next(site: KubernetesSite, tmp_path: Path) -> None:
    hold = site.cluster.faults.hold_pods()
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from oz_worker.backends.kubernetes import Kubernetes\n"
        "from oz_worker.settings import KubernetesOptions\n"
        "from tests.hosting import INSTANCE\n"
        "from tests.kubernetes.kubernetes_site import WORKER\n"
        "options = KubernetesOptions(kubeconfig=sys.argv[1], preflight_image='busybox')\n"
        "Kubernetes(options, worker_id=WORKER, instance=INSTANCE, instance_dir=Path(sys.argv[2]),"
        " host_environ=dict(os.environ)).open()\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script, str(site.cluster.kubeconfig), str(tmp_path)], cwd=ROOT)
    try:
        eventually(lambda: len(site.pods()) == 1)
    finally:
        child.kill()
        child.wait()
    assert len(site.jobs()) == 1
    hold.end()
    site.open(**ON)
    eventually(lambda: site.jobs() == [])


# -- check


def check(cluster: Cluster, place: Path, **options: Any) -> Answer:
    """`check` with a server that is well."""
    chosen = {**options_for(cluster, place), "api_timeout": "10s", "preflight_timeout": "5s", **options}
    with ControlPlane() as plane:
        config = {"worker_id": "w", "web_socket_url": plane.url, "backend": {"kubernetes": chosen}}
        return asked(place, config, "--state-dir", str(place / "state"), WARP_API_KEY=plane.key)


def test_check_tries_cluster_permissions_and_image(guarded: KubernetesSite, tmp_path: Path) -> None:
    done = check(guarded.cluster, tmp_path, pod_template=pod_template(tmp_path))
    assert (done.code, set(done.results().values())) == (0, {"ok"}), done.all_text
    assert done.tests["cluster"]["said"].startswith("Kubernetes v1.32.0, kubernetes namespace default of ")
    assert done.tests["permissions"]["said"] == "all that is needed"
    assert done.tests["image"]["said"] == "busybox was pulled and run as root in an init container"
    eventually(lambda: guarded.jobs() == [])


def test_check_says_what_is_wrong_with_exit_3(guarded: KubernetesSite, tmp_path: Path) -> None:
    done = check(guarded.cluster, tmp_path, kubeconfig=guarded.allow())
    assert done.code == 3
    said = done.tests["permissions"]["said"]
    assert "this account may not create jobs, get jobs, list jobs, delete jobs, list pods" in said
    assert done.results()["image"] == "skipped"
    done = check(guarded.cluster, tmp_path, preflight_image="registry.example/none:1")
    assert done.code == 3
    assert "registry.example/none:1" in done.tests["image"]["said"]
    done = check(guarded.cluster, tmp_path, kubeconfig=str(tmp_path / "none"))
    assert "does not exist" in done.tests["cluster"]["said"]
    assert done.results()["permissions"] == "skipped"


def test_a_check_that_is_told_to_stop_leaves_no_job(site: KubernetesSite, tmp_path: Path) -> None:
    hold = site.cluster.faults.hold_pods()
    config = tmp_path / "config.yaml"
    options = {**options_for(site.cluster, tmp_path), "api_timeout": "10s"}
    config.write_text(yaml.safe_dump({"worker_id": "w", "backend": {"kubernetes": options}}))
    words = [sys.executable, "-m", "oz_worker", "check", "--config-file", str(config), "--state-dir", str(tmp_path)]
    child = subprocess.Popen(words, env={**os.environ, "WARP_API_KEY": "wk-1"}, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        eventually(lambda: len(site.jobs()) == 1)
        child.terminate()
        assert child.wait(60) == 143
    finally:
        child.kill()
        child.wait()
    assert site.jobs() == []
    hold.end()
