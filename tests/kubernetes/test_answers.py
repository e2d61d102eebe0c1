"""Answers that are easily taken for what they are not: the wrong reading of each ends, loses or leaves a task."""

from __future__ import annotations

import os
from typing import Any

import pytest

from oz_worker.backends import job_start, job_watch, kubernetes
from oz_worker.backends.job_watch import Ears, JobWatch
from oz_worker.clusters import cluster_for
from oz_worker.errors import TaskFault
from oz_worker.model import Cause, Reason
from oz_worker.settings import KubernetesOptions
from tests.audit import guard
from tests.hosting import INSTANCE, eventually, written
from tests.kubernetes.kubernetes_site import KubernetesSite, Starting, ended, options_for


def test_two_changes_of_a_quota_at_once_refuse_no_job(site: KubernetesSite) -> None:
    """409 on a creation: a quota's counter was written by somebody else in the same moment, as on GKE."""
    backend = site.open()
    unit = site.unit("exit 3")
    with site.cluster.faults.fail(409, "create", "jobs", times=2):
        starting = Starting(backend, unit)
        starting.over()
    assert starting.error is None
    assert ended(unit).code == 3
    assert backend.clean_up(unit, keep=False) == ""


@pytest.mark.parametrize("code", [404, 409])
def test_a_deletion_that_is_refused_is_no_proof(site: KubernetesSite, code: int) -> None:
    """A proxy that lost its server says 404 to everything; 409 is also said of two changes at once."""
    backend = site.open()
    unit = site.started(backend, "while :; do sleep 0.1; done")
    with site.cluster.faults.fail(code, "delete", "jobs", times=1):
        unit.order_stop(Cause.CANCEL, 1)
        facts = backend.stop(unit)
    assert facts.remains == ""
    assert site.job(unit) is None
    assert not site.running(unit)


def test_a_proxy_without_its_server_ends_no_task_that_is_taken_up(site: KubernetesSite) -> None:
    first = site.open()
    unit = site.started(first, f"{site.go('end')}; exit 3")
    first.close()
    second = site.open()
    again = site.unit("", key=unit.key)
    with site.cluster.faults.fail(404, "get", "jobs", times=1):
        second.attach(again)
    assert again.facts is None
    site.let("end")
    assert ended(again).code == 3


def test_a_long_refusal_is_one(site: KubernetesSite) -> None:
    """The words at the beginning say what it is, however many follow."""
    text = 'admission webhook "policy.example.com" denied the request: ' + "no such pods here; " * 200
    backend = site.open()
    unit = site.unit("exit 3")
    with site.cluster.faults.fail(400, "create", "jobs", message=text):
        starting = Starting(backend, unit)
        starting.over()
    assert starting.error is not None
    assert "policy.example.com" in str(starting.error)
    assert len(str(starting.error)) < 3000


def test_watches_that_end_at_once_without_a_line_are_no_reason_to_wait_for_ever(site: KubernetesSite) -> None:
    """A proxy may hold streams back and end them cleanly: the silence of all of them counts together."""
    body = 'case "$*" in *watch=1*) sleep 0.5; exit 0 ;; esac'
    options = KubernetesOptions(**options_for(site.cluster, site.root, kubectl_path=site.fake_kubectl(body)))
    door = cluster_for(options, {"PATH": os.environ["PATH"]}, instance="mute", instance_dir=site.root)
    lists: list[str] = []

    def listed(kind: str, things: list[dict[str, Any]], began: float) -> None:
        lists.append(kind)

    never = float("inf")
    ears = Ears(
        listed, lambda kind, change, thing: None, lambda: never, lambda: True, lambda s, why: None, lambda: None
    )
    watch = JobWatch(door, "a=b", ears, lambda name, error: None, silent_seconds=2.0)
    watch.start()
    try:
        eventually(lambda: lists.count("jobs") > 1 and lists.count("pods") > 1)
    finally:
        watch.stop(10)


def test_a_job_that_goes_before_its_creation_is_answered(site: KubernetesSite) -> None:
    """Removed by hand while the answer was on its way: nothing else will ever be told of it."""
    body = f"""
case " $* " in *" create "*)
  "$REAL" "$@" > {site.root}/answer || exit
  while [ ! -e {site.root}/deleted ]; do sleep 0.05; done
  cat {site.root}/answer
  exit ;;
esac"""
    guard().allow(site.root / "answer")
    backend = site.open(kubectl_path=site.fake_kubectl(body))
    eventually(lambda: len(site.cluster.faults.watches()) == 2)
    unit = site.unit("while :; do sleep 0.1; done")
    with site.cluster.faults.lose_events(lambda thing: "containers" in thing["spec"]):  # it had no pod yet
        starting = Starting(backend, unit)
        eventually(lambda: site.job(unit))
        site.cluster.faults.delete_job("default", site.jobs()[0]["metadata"]["name"], policy="Foreground")
        eventually(lambda: site.job(unit) is None)
        (site.root / "deleted").touch()
        starting.over()
    assert ended(unit).reason is Reason.JOB_WATCH
    assert backend.clean_up(unit, keep=False) == ""


@pytest.mark.parametrize("kind", ["jobs", "secrets"])
def test_a_creation_that_nobody_answered_is_not_told_as_one_that_never_was(
    site: KubernetesSite, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Job was made, and then the cluster was away for longer than it is waited for: its agent runs there."""
    monkeypatch.setattr(kubernetes, "START_SECONDS", 1.0)
    monkeypatch.setattr(kubernetes, "PROOF_SECONDS", 1.0)
    back, away = site.root / "back", site.root / "away"
    body = f"""
if [ -e {away} ] && [ ! -e {back} ]; then echo "Unable to connect to the server: EOF" >&2; exit 1; fi
case " $* " in *" create --raw "*/{kind}*)
  : > {away}
  "$REAL" "$@" > /dev/null
  echo "Unable to connect to the server: EOF" >&2
  exit 1 ;;
esac"""
    backend = site.open(kubectl_path=site.fake_kubectl(body), env_in_secret=kind == "secrets")
    unit = site.unit(f"echo up > {site.root}/up; while :; do sleep 0.1; done")
    backend.prepare(unit)
    with pytest.raises(TaskFault) as fault:
        backend.start(unit)
    written(site.root / "up")
    facts = fault.value.facts
    assert facts.reason is Reason.JOB_CREATE
    assert facts.agent_started
    assert "Job" in facts.remains
    back.touch()
    unit.order_stop(Cause.SHUTDOWN, 0)
    eventually(lambda: backend.stop(unit).remains == "")
    assert not site.running(unit)
    eventually(lambda: backend.clean_up(unit, keep=False) == "")


def test_a_disk_that_is_full_behind_the_secret_ends_nothing(site: KubernetesSite) -> None:
    """The agent may run by then: only what a kill -9 would ask for cannot be noted."""
    mark = site.root / "state" / INSTANCE / "units" / "*" / "secret-made"
    body = f"""
case " $* " in *" create --raw "*/secrets*)
  for unit in {mark.parent}; do mkdir "$unit/{mark.name}"; done ;;
esac"""
    backend = site.open(kubectl_path=site.fake_kubectl(body), env_in_secret=True)
    unit = site.started(backend, f"{site.go('end')}; exit 3")
    site.let("end")
    assert ended(unit).code == 3
    assert backend.clean_up(unit, keep=False) == ""


def test_a_watch_that_was_forbidden_for_a_while_comes_back(
    site: KubernetesSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RBAC that is mended, or an authorizer that was not ready, is noticed without a restart."""
    monkeypatch.setattr(job_watch, "TRY_AGAIN_SECONDS", 6.0)
    text = 'jobs.batch is forbidden: User "worker" cannot watch resource "jobs" in API group "batch"'
    with site.cluster.faults.fail(403, "watch", message=text) as fault:
        backend = site.open()
        eventually(lambda: fault.met >= 2)
    unit = site.started(backend, f"{site.go('end')}; exit 3")
    eventually(lambda: {watch.asked.resource.plural for watch in site.cluster.faults.watches()} == {"jobs", "pods"})
    site.let("end")
    assert ended(unit).code == 3
    assert backend.clean_up(unit, keep=False) == ""


def test_a_hiccup_during_the_preflight_is_no_reason_to_give_up(site: KubernetesSite) -> None:
    with site.cluster.faults.fail(500, "get", "jobs", times=1) as fault:
        site.open(preflight=True)
        assert fault.met
    eventually(lambda: site.jobs() == [])


def test_a_job_that_is_taken_up_keeps_its_secret(site: KubernetesSite, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another worker of this id, which a rollout lets live a moment longer, was given the same execution before."""
    monkeypatch.setattr(job_start, "_GONE_SECONDS", 2.0)
    first = site.open(env_in_secret=True)
    unit = site.started(first, f"{site.go('end')}; exit 3")
    second = site.open(env_in_secret=True, state="other")
    again = site.unit("exit 9", key=unit.key)
    starting = Starting(second, again)
    starting.over()
    assert starting.error is None
    assert site.running(unit)
    site.let("end")
    assert (ended(unit).code, ended(again).code) == (3, 3)
    for backend, one in ((first, unit), (second, again)):
        assert backend.clean_up(one, keep=False) == ""


@pytest.mark.parametrize("answer", ["{}", '{"message": "please log in"}', '{"kind": "JobList", "items": 5}', "[]"])
def test_what_is_no_list_is_not_taken_for_an_empty_one(site: KubernetesSite, answer: str) -> None:
    """A proxy that wants a login may say so with status 200: nobody's Job is gone by that."""
    body = f"""
if [ -e {site.root}/odd ]; then
  case "$*" in *watch=1*) exit 1 ;; *limit=500*) echo '{answer}'; exit 0 ;; esac
fi"""
    backend = site.open(kubectl_path=site.fake_kubectl(body))
    unit = site.started(backend, f"{site.go('end')}; exit 3")
    eventually(lambda: len(site.cluster.faults.watches()) == 2)
    (site.root / "odd").touch()
    site.cluster.faults.end_watches("gone")
    eventually(backend.unavailable)
    assert unit.facts is None
    (site.root / "odd").unlink()
    site.let("end")
    assert ended(unit).code == 3
    eventually(lambda: backend.clean_up(unit, keep=False) == "")


def test_events_that_hang_delay_no_other_task(site: KubernetesSite) -> None:
    """One task has no image, and why is asked for; the thread that asks serves all the others, too."""
    image = site.cluster.images.add("oz-test/none:1")
    site.cluster.images.missing(image, "dial tcp: i/o timeout")
    backend = site.open(api_timeout=18.0)
    with site.cluster.faults.hang("list", "events") as fault:
        stuck = site.unit("exit 0", docker_image=image)
        backend.prepare(stuck)
        backend.start(stuck)
        unit = site.started(backend, f"{site.go('end')}; exit 3")
        eventually(lambda: fault.met)
        site.let("end")
        eventually(lambda: not site.running(unit))
        eventually(lambda: unit.facts, patience=10)
    assert ended(unit).code == 3
    stuck.order_stop(Cause.CANCEL, 1)
    assert backend.stop(stuck).remains == ""
    for one in (unit, stuck):
        assert backend.clean_up(one, keep=False) == ""
