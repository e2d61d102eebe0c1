"""A worker that comes after another: on the same disk, on an empty one, with the report sent or not."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from oz_worker.backends.base import Unit
from oz_worker.backends.job_object import job_name
from oz_worker.model import Key
from tests.cluster.resources import JOBS
from tests.faults.stuck import page, port_of
from tests.hosting import eventually
from tests.kubernetes.conftest import KubernetesRig
from tests.kubernetes.kubernetes_site import KubernetesSite, ended
from tests.rig import SAFETY, until

RUN = "echo run >> $HOME/runs; while [ ! -e $HOME/go ]; do sleep 0.05; done; "


def condition(job: dict[str, Any], kind: str) -> bool:
    return any(one["type"] == kind and one["status"] == "True" for one in job["status"].get("conditions") or ())


@pytest.mark.parametrize(("code", "state"), [(0, "completed"), (7, "failed")])
def test_a_worker_with_an_empty_disk_finds_what_runs(kubernetes_rig: KubernetesRig, code: int, state: str) -> None:
    rig = kubernetes_rig
    worker = rig.start()
    task = rig.submit(f"{RUN} exit {code}")
    rig.written("runs")
    worker.kill()
    rig.lose_the_disk()
    worker = rig.start()
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(task)
    assert task.state == state
    assert (task.terminal.exit_code or 0) == code
    assert (rig.place / "runs").read_text() == "run\n"
    rig.settled()
    assert worker.stop() == 0
    rig.audit()


@pytest.mark.parametrize(("code", "state"), [(0, "completed"), (7, "failed")])
def test_a_worker_with_an_empty_disk_reports_what_ended_meanwhile(
    kubernetes_rig: KubernetesRig, code: int, state: str
) -> None:
    rig = kubernetes_rig
    worker = rig.start()
    task = rig.submit(f"{RUN} exit {code}")
    rig.written("runs")
    worker.kill()
    rig.lose_the_disk()
    (rig.place / "go").touch()
    until(lambda: not rig.active(), "the end of the Job")
    worker = rig.start()
    rig.plane.wait_acknowledged(task)
    assert task.state == state
    if not code:
        until(lambda: rig.jobs() == [], "the removal of the Job that ended well")
    assert worker.stop() == 0
    rig.audit()


def test_a_cluster_that_answers_no_more_during_the_start_is_waited_for(kubernetes_rig: KubernetesRig) -> None:
    """A restart by a supervisor would mend nothing. Told to stop it leaves, and nothing is lost."""
    rig = kubernetes_rig
    worker = rig.start("--health-listen", "127.0.0.1:0")
    task = rig.submit(f"{RUN} exit 7")
    rig.written("runs")
    worker.kill()
    rig.log.unlink()
    waits = "what runs already cannot be found out: kubectl get: the server is currently unable to handle the request"
    with rig.cluster.faults.fail(503, "list", "jobs"):
        worker = rig.start("--health-listen", "127.0.0.1:0", connected=False)
        worker.wait_log(f"{waits}. Next try in")
        until(lambda: f"takes no task: starting: {waits}\n" in rig.explained(), "the reason beside it")
        assert page(port_of(worker), "/readyz") == (503, f"starting: {waits}\n")
        assert page(port_of(worker), "/healthz").status == 200
        assert worker.stop() == 0
        rig.log.unlink()
        worker = rig.start(connected=False)
        worker.wait_log(waits)
    rig.plane.wait_connected(SAFETY, after=1)
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(task)
    assert task.terminal.exit_code == 7
    assert (rig.place / "runs").read_text() == "run\n"
    assert worker.stop() == 0
    rig.audit()


def test_a_job_that_ended_well_stays_until_its_report_was_read(kubernetes_rig: KubernetesRig) -> None:
    rig = kubernetes_rig
    worker = rig.start()
    task = rig.submit(f"{RUN} exit 0")
    rig.written("runs")
    rig.plane.down()
    (rig.place / "go").touch()
    until(lambda: rig.query("SELECT 1 FROM tasks WHERE state = 'ended'"), "the end, which cannot be delivered")
    (kept,) = rig.jobs()
    assert condition(kept, "Complete")
    worker.kill()
    rig.lose_the_disk()  # with the report in it
    rig.plane.up()
    worker = rig.start()
    rig.plane.wait_acknowledged(task)
    assert task.state == "completed"
    until(lambda: rig.jobs() == [], "the removal of the Job")
    assert worker.stop() == 0
    rig.audit()


def test_a_report_that_is_read_after_a_restart_removes_the_job(kubernetes_rig: KubernetesRig) -> None:
    rig = kubernetes_rig
    worker = rig.start()
    task = rig.submit(f"{RUN} exit 0")
    rig.written("runs")
    rig.plane.down()
    (rig.place / "go").touch()
    until(lambda: rig.query("SELECT 1 FROM tasks WHERE state = 'ended'"), "the end, which cannot be delivered")
    worker.kill()
    rig.plane.up()
    worker = rig.start()
    rig.plane.wait_acknowledged(task)
    until(lambda: rig.jobs() == [], "the removal of the Job")
    rig.settled()
    assert worker.stop() == 0
    rig.audit()


def test_what_is_found_counts_against_the_limit(kubernetes_rig: KubernetesRig) -> None:
    rig = kubernetes_rig
    rig.config["max_concurrent_tasks"] = 2
    worker = rig.start()
    tasks = [rig.submit(f"{RUN} exit 0") for _ in range(2)]
    until(lambda: len(rig.active()) == 2, "both Jobs")
    worker.kill()
    rig.lose_the_disk()
    worker = rig.start()
    more = rig.submit("exit 0")
    rig.plane.wait_for(lambda: more.state == "rejected", 40, "the rejection")
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(*tasks)
    rig.settled()
    assert worker.stop() == 0
    rig.audit()


def aged(site: KubernetesSite, unit: Unit, minutes: float) -> None:
    """Let the unit's Job have ended so long ago."""
    then = (datetime.now(timezone.utc) - timedelta(minutes=minutes)).strftime("%Y-%m-%dT%H:%M:%SZ")

    def age(job: dict[str, Any]) -> None:
        for one in job["status"]["conditions"]:
            one["lastTransitionTime"] = then

    site.cluster.api.change(JOBS, "default", job_name(unit.key), age)


def test_failed_jobs_of_which_no_trace_is_left_are_told_once_more_if_they_are_recent(site: KubernetesSite) -> None:
    first = site.open()
    units = [site.started(first, "exit 1") for _ in range(2)]
    for unit in units:
        ended(unit)
        assert first.clean_up(unit, keep=False) == ""
    first.close()
    aged(site, units[1], 11)
    second = site.open(state="other-disk")
    assert [found.name for found in second.recover()] == [units[0].name]
    assert second.units() == []
    taken = Unit(units[0].name, units[0].instance, units[0].key)
    second.attach(taken)
    assert ended(taken).code == 1


def test_an_old_failure_is_told_all_the_same_when_its_trace_is_here(site: KubernetesSite) -> None:
    first = site.open()
    unit = site.started(first, f"{site.go('end')}; exit 9")
    first.close()
    site.let("end")
    eventually(lambda: condition(site.job(unit) or {"status": {}}, "Failed"))
    aged(site, unit, 60)
    second = site.open()
    assert [found.name for found in second.recover()] == [unit.name]
    taken = Unit(unit.name, unit.instance, unit.key)
    second.attach(taken)
    assert ended(taken).code == 9
    assert second.clean_up(taken, keep=False) == ""


def test_raw_ids_come_back_from_annotations(site: KubernetesSite) -> None:
    first = site.open()
    key = Key("Täsk / with\tODD $(ids)", "run:1/ä")
    unit = site.started(first, f"{site.go('end')}; exit 0", key=key)
    first.close()
    second = site.open(state="other-disk")
    assert [(found.name, found.key) for found in second.recover()] == [(unit.name, key)]
    taken = Unit(unit.name, unit.instance, key)
    second.attach(taken)
    site.let("end")
    assert ended(taken).code == 0
    assert second.clean_up(taken, keep=False) == ""


def test_the_secrets_of_a_job_that_is_taken_up_are_read_from_it(site: KubernetesSite) -> None:
    first = site.open()
    unit = site.started(first, f"{site.go('end')}; exit 0", environment={"TOKEN": "s3cret$$value"})
    second = site.open(state="other-disk")
    second.recover()
    taken = Unit(unit.name, unit.instance, unit.key)
    second.attach(taken)
    assert taken.secrets is not None
    assert "s3cret$$value" in taken.secrets
    site.let("end")
    ended(taken)
    assert second.clean_up(taken, keep=False) == ""


def test_others_jobs_are_not_seen(site: KubernetesSite) -> None:
    first = site.open()
    unit = site.started(first, f"{site.go('end')}; exit 0")
    for other in ({"instance": "another"}, {"worker": "another-worker"}):
        assert site.open(state="other-disk", **other).recover() == []
    site.let("end")
    ended(unit)
    assert first.clean_up(unit, keep=False) == ""
