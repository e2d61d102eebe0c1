"""The weather of a cluster: an API that is away or strict, watches that end in every way. No healthy task fails."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

from oz_worker.backends import job_facts
from oz_worker.backends.base import Unit
from oz_worker.backends.job_watch import Ears, JobWatch
from oz_worker.backends.kubernetes import Kubernetes
from oz_worker.clusters import cluster_for
from oz_worker.errors import NotUsable
from oz_worker.model import Cause, Reason
from oz_worker.settings import KubernetesOptions
from tests.cluster.access import Rule
from tests.cluster.cluster import Cluster
from tests.cluster.resources import JOBS
from tests.hosting import eventually
from tests.kubernetes.kubernetes_site import KubernetesSite, Starting, ended, options_for

ALL = ("create", "get", "list", "watch", "delete", "patch")


def is_seen_by_two_watches(site: KubernetesSite) -> None:
    eventually(lambda: {watch.asked.resource.plural for watch in site.cluster.faults.watches()} == {"jobs", "pods"})


def cleaned(backend: Kubernetes, unit: Unit) -> None:
    eventually(lambda: backend.clean_up(unit, keep=False) == "")


@contextlib.contextmanager
def refused(site: KubernetesSite) -> Iterator[None]:
    with site.cluster.faults.down():
        yield


@contextlib.contextmanager
def hung(site: KubernetesSite) -> Iterator[None]:
    with site.cluster.faults.hang():
        site.cluster.faults.end_watches("reset")
        yield


def failing(code: int, **more: Any) -> Callable[[KubernetesSite], contextlib.AbstractContextManager[None]]:
    @contextlib.contextmanager
    def fail(site: KubernetesSite) -> Iterator[None]:
        with site.cluster.faults.fail(code, **more):
            site.cluster.faults.end_watches("reset")
            yield

    return fail


AWAY = {
    "refused": refused,
    "hung": hung,
    "500": failing(500),
    "429": failing(429, retry_after=1),
    "503": failing(503),
    "504": failing(504),
    "502 of a proxy": failing(502, message="<html>bad gateway</html>"),
}


@pytest.mark.parametrize("away", AWAY.values(), ids=AWAY)
def test_an_api_that_is_away_fails_no_task_and_takes_no_new_ones(site: KubernetesSite, away: Any) -> None:
    backend = site.open(api_timeout=2.0)
    running = site.started(backend, f"{site.go('end')}; exit 3")
    ending = site.started(backend, f"{site.go('soon')}; exit 4")
    is_seen_by_two_watches(site)
    with away(site):
        eventually(backend.unavailable)
        site.let("soon")
        waiting = Starting(backend, unit := site.unit("exit 5"))
        time.sleep(1.0)  # several tries, all in vain
        assert (running.facts, ending.facts, unit.facts) == (None, None, None)
        assert "removed later" in backend.clean_up(site.unit("never"), keep=False)
    waiting.over()
    assert waiting.error is None
    assert ended(ending).code == 4
    assert ended(unit).code == 5
    eventually(lambda: not backend.unavailable())
    site.let("end")
    assert ended(running).code == 3
    for one in (running, ending, unit):
        cleaned(backend, one)


def test_a_cancel_while_the_api_is_away_is_done_when_it_is_back(site: KubernetesSite) -> None:
    backend = site.open(api_timeout=2.0)
    unit = site.started(backend, "while :; do sleep 0.1; done")
    stopped: list[Any] = []
    with site.cluster.faults.down():
        unit.order_stop(Cause.CANCEL, 1)
        stopping = threading.Thread(target=lambda: stopped.append(backend.stop(unit)))
        stopping.start()
        stopping.join(1.0)
        assert stopping.is_alive()
    stopping.join(60)
    assert stopped[0].remains == ""
    assert site.job(unit) is None
    assert not site.running(unit)


HOW = ["end", "reset", "gone", "error", "garbage"]


@pytest.mark.parametrize("how", HOW)
def test_a_watch_may_end_in_any_way(site: KubernetesSite, how: str) -> None:
    backend = site.open()
    unit = site.started(backend, f"{site.go('end')}; exit 3")
    is_seen_by_two_watches(site)
    listed = site.cluster.journal.count("list", "jobs")
    assert site.cluster.faults.end_watches(how) == 2
    is_seen_by_two_watches(site)
    site.let("end")
    assert ended(unit).code == 3
    assert (site.cluster.journal.count("list", "jobs") == listed) == (how == "end"), "a clean end costs no list"


def test_what_happens_between_two_watches_is_not_lost(site: KubernetesSite) -> None:
    backend = site.open()
    units = [site.started(backend, f"{site.go('end')}; exit {code}") for code in (0, 3)]
    is_seen_by_two_watches(site)
    with site.cluster.faults.hang("watch"):
        site.cluster.faults.end_watches("end")
        site.let("end")
        eventually(lambda: not any(site.running(unit) for unit in units))
    assert [ended(unit).code for unit in units] == [0, 3]


def test_a_version_that_is_forgotten_is_listed_again(site: KubernetesSite) -> None:
    backend = site.open()
    unit = site.started(backend, f"{site.go('end')}; exit 3")
    is_seen_by_two_watches(site)
    with site.cluster.faults.hang("watch"):
        site.cluster.faults.end_watches("end")
        site.let("end")
        eventually(lambda: not site.running(unit))
        site.cluster.faults.forget_history()
    assert ended(unit).code == 3


def test_an_event_that_is_lost_is_made_good_by_the_next_list(site: KubernetesSite) -> None:
    backend = site.open()
    unit = site.started(backend, f"{site.go('end')}; exit 3")
    is_seen_by_two_watches(site)
    with site.cluster.faults.lose_events():
        site.let("end")
        eventually(lambda: not site.running(unit))
        eventually(lambda: (site.job(unit) or {})["status"].get("conditions"))
        assert unit.facts is None
    site.cluster.faults.end_watches("gone")
    assert ended(unit).code == 3


def test_a_watch_that_says_nothing_is_given_up(cluster: Cluster, tmp_path: Path) -> None:
    options = KubernetesOptions(**options_for(cluster, tmp_path))
    door = cluster_for(options, {"PATH": "/usr/bin:/bin"}, instance="silence", instance_dir=tmp_path)
    lists: list[str] = []

    def listed(kind: str, things: list[dict[str, Any]], began: float) -> None:
        lists.append(kind)

    never = float("inf")
    ears = Ears(
        listed, lambda kind, change, thing: None, lambda: never, lambda: True, lambda s, why: None, lambda: None
    )
    deaths: list[str] = []
    watch = JobWatch(door, "a=b", ears, lambda name, error: deaths.append(name), silent_seconds=2.0)
    watch.start()
    try:
        eventually(lambda: len(cluster.faults.watches()) == 2)
        cluster.faults.silence_watches()
        eventually(lambda: lists.count("jobs") > 1 and lists.count("pods") > 1)
    finally:
        watch.stop(10)
    assert deaths == []


def test_without_the_verb_watch_jobs_are_listed_and_it_is_said_once(
    guarded: KubernetesSite, caplog: pytest.LogCaptureFixture
) -> None:
    site = guarded
    kubeconfig = site.allow(Rule(("create", "get", "list", "delete"), ("*",)))
    backend = site.open(kubeconfig=kubeconfig)
    units = [site.started(backend, "exit 3"), site.started(backend, "exit 0")]
    assert [ended(unit).code for unit in units] == [3, 0]
    said = "grant the verb `watch`"
    eventually(lambda: any(said in line for line in caplog.messages))
    listed = site.cluster.journal.count("list", "pods")
    eventually(lambda: site.cluster.journal.count("list", "pods") > listed)
    assert site.cluster.faults.watches() == []
    assert len([line for line in caplog.messages if said in line]) == 1
    assert backend.unavailable() == ""


def test_a_token_that_expires_fails_no_task(guarded: KubernetesSite) -> None:
    site = guarded
    token = site.cluster.token(Rule(ALL, ("*",)))
    backend = site.open(kubeconfig=str(site.cluster.write_kubeconfig(token)))
    unit = site.started(backend, f"{site.go('end')}; exit 3")
    is_seen_by_two_watches(site)
    site.cluster.faults.expire(token)
    site.cluster.faults.end_watches("reset")
    eventually(lambda: "does not accept these credentials" in backend.unavailable())
    site.let("end")
    eventually(lambda: not site.running(unit))
    assert unit.facts is None
    site.cluster.faults.renew(token)
    assert ended(unit).code == 3


def test_rights_that_are_taken_away_are_told_and_fail_no_task(
    guarded: KubernetesSite, caplog: pytest.LogCaptureFixture
) -> None:
    """What a namespace that is deleted together with its Role looks like; but a right can come back."""
    site = guarded
    token = site.cluster.token(Rule(ALL, ("*",)))
    kubeconfig = str(site.cluster.write_kubeconfig(token))
    backend = site.open(kubeconfig=kubeconfig)
    unit = site.started(backend, f"{site.go('end')}; exit 3")
    is_seen_by_two_watches(site)
    site.cluster.grant(token)
    site.cluster.faults.end_watches("reset")
    eventually(lambda: backend.unavailable().startswith("the cluster refuses to say how the tasks are: "))
    for words in ('cannot list resource "', "give this account its Role in the namespace default back", "cancel its"):
        assert words in backend.unavailable()
    assert len([line for line in caplog.messages if "refuses to say how the tasks are" in line]) == 1
    with pytest.raises(NotUsable, match="give this account its Role"):
        backend.recover()
    site.let("end")
    eventually(lambda: not site.running(unit))
    assert unit.facts is None
    site.cluster.grant(token, Rule(ALL, ("*",)))
    assert ended(unit).code == 3
    eventually(lambda: not backend.unavailable())


def test_a_job_deleted_by_hand_is_told_as_that(site: KubernetesSite) -> None:
    backend = site.open()
    unit = site.started(backend, "while :; do sleep 0.1; done")
    name = site.jobs()[0]["metadata"]["name"]
    site.cluster.faults.delete_job("default", name, policy="Foreground")
    facts = ended(unit)
    assert facts.reason is Reason.JOB_WATCH
    assert f"Job default/{name} was removed from outside" in facts.detail
    assert backend.clean_up(unit, keep=False) == ""


@pytest.mark.parametrize(("code", "reason"), [(0, None), (7, Reason.CONTAINER_EXIT)])
def test_what_a_ttl_removed_before_anybody_looked(site: KubernetesSite, code: int, reason: Reason | None) -> None:
    """The watch still tells of it, in order, when it goes on from where it was."""
    backend = site.open(ttl_seconds_after_finished=0)
    unit = site.started(backend, f"{site.go('end')}; exit {code}")
    is_seen_by_two_watches(site)
    with site.cluster.faults.hang("watch"):
        site.cluster.faults.end_watches("end")
        site.let("end")
        eventually(lambda: site.job(unit) is None)
    facts = ended(unit)
    assert (facts.code, facts.reason) == (code, reason)


def test_a_lost_node_is_told_as_that_and_holds_the_slot_until_it_is_proven(site: KubernetesSite) -> None:
    backend = site.open()
    is_seen_by_two_watches(site)
    unit = site.started(backend, "while :; do sleep 0.1; done")
    site.cluster.faults.lose_node("node-1", unknown=True)
    site.cluster.faults.taint_manager("node-1")
    site.cluster.faults.collect_pods("node-1")
    facts = ended(unit)
    assert facts.reason is Reason.EVICTED, facts
    assert facts.code != 0
    left = {kind: count for kind, count in site.before.objects.items() if kind != "nodes"}
    site.before = site.before._replace(objects=left)


def test_a_node_that_says_nothing_is_called_lost_and_what_ran_there_remains(
    site: KubernetesSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_facts, "LEAVING_SECONDS", 2.0)
    backend = site.open()
    is_seen_by_two_watches(site)
    unit = site.started(backend, "while :; do sleep 0.1; done")
    site.cluster.faults.lose_node("node-1")
    site.cluster.faults.taint_manager("node-1")
    facts = ended(unit)
    assert (facts.reason, facts.code) == (Reason.EVICTED, None)
    assert "probably lost" in facts.detail
    assert "node-1" in facts.remains, "the slot waits"
    site.cluster.faults.find_node("node-1")
    eventually(lambda: backend.stop(unit).remains == "")
    cleaned(backend, unit)


def test_what_heals_in_time_runs(site: KubernetesSite) -> None:
    backend = site.open(unschedulable_timeout=60.0, volume_mount_timeout=60.0, image_pull_timeout=60.0)
    cluster = site.cluster
    image = cluster.images.add("oz-test/late:1")
    cluster.images.missing(image, "dial tcp: i/o timeout")
    hold, mounts = cluster.faults.hold_pods(), cluster.faults.fail_mounts("place")
    unit = site.unit("exit 6", docker_image=image)
    backend.prepare(unit)
    backend.start(unit)
    eventually(lambda: site.pods(unit) and site.pods(unit)[0]["status"].get("conditions"))
    hold.end()
    eventually(lambda: site.pods(unit)[0]["spec"].get("nodeName"))
    mounts.end()
    eventually(lambda: image in " ".join(cluster.images.pulls))
    cluster.images.heal(image)
    assert ended(unit).code == 6


def test_a_container_of_the_template_that_never_ends_holds_nothing_up(site: KubernetesSite) -> None:
    template = {**options_for(site.cluster, site.root)["pod_template"]}
    template["containers"] = [
        *template["containers"],
        {"name": "proxy", "image": "busybox", "command": ["sh", "-c", "while :; do sleep 0.1; done"]},
    ]
    backend = site.open(pod_template=template)
    unit = site.started(backend, "exit 0")
    assert ended(unit).code == 0
    assert backend.stragglers(unit) == ""
    assert backend.clean_up(unit, keep=False) == ""
    eventually(lambda: site.cluster.store.objects(JOBS, "default")[0] == [])


def test_an_outage_is_not_time_that_a_pod_had_to_start(site: KubernetesSite) -> None:
    """While the API is away no scheduler, no kubelet and no controller can do anything for it."""
    backend = site.open(api_timeout=2.0, unschedulable_timeout=15.0)
    is_seen_by_two_watches(site)
    hold = site.cluster.faults.hold_pods()
    unit = site.unit("exit 6")
    backend.prepare(unit)
    backend.start(unit)
    eventually(lambda: site.pods(unit) and site.pods(unit)[0]["status"].get("conditions"))
    with site.cluster.faults.down():
        eventually(backend.unavailable)
        time.sleep(17)
    eventually(lambda: not backend.unavailable())
    time.sleep(1)
    hold.end()
    assert ended(unit).code == 6
    cleaned(backend, unit)
