"""A Job's life: what it is made of, names that are taken, answers that are lost, Secrets, what a stop leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from oz_worker.backends import job_stop
from oz_worker.backends.base import Unit
from oz_worker.backends.job_object import INSTANCE as INSTANCE_LABEL
from oz_worker.backends.job_object import UNIT, job, job_name
from oz_worker.errors import Stopped, TaskFault
from oz_worker.model import Cause, Key, Reason, unit_name
from oz_worker.settings import KubernetesOptions
from tests.cluster.access import Rule
from tests.cluster.resources import JOBS, SECRETS
from tests.cluster.test_cluster_rig import CLIENTS
from tests.hosting import INSTANCE, eventually, written
from tests.kubernetes.kubernetes_site import WORKER, KubernetesSite, Starting, ended, options_for, pod_template

LOST_ANSWER = """case "$*" in *"create --raw"*"/jobs?"*)
    [ -e {mark} ] || { touch {mark}; "$REAL" "$@" > /dev/null; echo "error: unexpected EOF" >&2; exit 1; };;
esac"""


def again(unit: Unit) -> Unit:
    return Unit(unit.name, unit.instance, unit.key)


def fault(site: KubernetesSite, **options: Any) -> TaskFault:
    backend = site.open(**options)
    unit = site.unit("exit 0")
    backend.prepare(unit)
    with pytest.raises(TaskFault) as caught:
        backend.start(unit)
    assert not caught.value.facts.agent_started
    assert backend.clean_up(unit, keep=False) == ""
    assert backend.units() == []
    return caught.value


def test_one_request_makes_a_task_and_two_see_it_to_its_end(site: KubernetesSite) -> None:
    backend = site.open()
    eventually(lambda: len(site.cluster.faults.watches()) == 2)
    before = site.cluster.journal.count()
    ended(site.started(backend, "exit 0"))
    made = site.cluster.journal.seen()[before:]
    assert [(one.verb, one.resource) for one in made if one.agent.startswith("kubectl")] == [("create", "jobs")]


def test_the_output_is_fetched_at_the_end_and_cut_with_one_line_that_says_so(site: KubernetesSite) -> None:
    backend = site.open()
    unit = site.started(backend, "yes 0123456789abcde | head -c 1600000; echo last; exit 1")
    assert ended(unit).code == 1
    assert backend.tail(unit, 25).endswith(b"last\n")
    assert backend.collect(unit) == ""
    (output,) = site.root.glob(f"state/*/units/{unit.name}/output.log")
    assert 1_000_000 < output.stat().st_size <= 1 << 20
    *lines, last = output.read_text().splitlines()
    assert last == "[oz_worker: output over 1048576 bytes; what came after is gone]"
    assert set(lines) == {"0123456789abcde"}
    assert backend.clean_up(unit, keep=False) == ""


@pytest.mark.parametrize("program", CLIENTS, ids=lambda path: path.name)
def test_every_kubectl_will_do(site: KubernetesSite, program: Path) -> None:
    backend = site.open(kubectl_path=str(program), preflight=True, unschedulable_timeout=1.0)
    unit = site.started(backend, "exit 4")
    assert ended(unit).code == 4
    assert backend.tail(unit, 100) in (b"", b"up\n"), "in a cluster that is not ours the agent says so"
    assert backend.clean_up(unit, keep=False) == ""
    hold = site.cluster.faults.hold_pods()
    unit = site.unit("exit 0")
    backend.prepare(unit)
    backend.start(unit)
    assert ended(unit).reason is Reason.UNSCHEDULABLE
    assert backend.stragglers(unit) == ""
    hold.end()
    stopped = site.job(unit)
    assert stopped is not None
    assert stopped["spec"]["activeDeadlineSeconds"] == 1


def test_what_is_given_arrives_to_the_letter(site: KubernetesSite) -> None:
    odd = "$HOME $(HOME) $$(HOME) `id` ' \" \\ $"
    backend = site.open(setup_command=f'echo "$(echo a)$$" > {site.root}/setup; printf \'%s\' "$ODD" > {site.root}/env')
    unit = site.unit(
        f"printf '%s' \"$ODD\" > {site.root}/odd; echo $(echo b) > {site.root}/sub", environment={"ODD": odd}
    )
    backend.prepare(unit)
    backend.start(unit)
    assert ended(unit).code == 0
    assert (site.root / "odd").read_text() == odd
    assert (site.root / "env").read_text() == odd
    assert (site.root / "sub").read_text() == "b\n"
    assert (site.root / "setup").read_text().startswith("a")
    assert (site.root / "setup").read_text().strip()[1:].isdecimal()


def test_teardown_runs_after_a_normal_end_and_after_a_stop(site: KubernetesSite) -> None:
    template = {**pod_template(site.root), "terminationGracePeriodSeconds": 20}
    backend = site.open(teardown_command=f"echo torn >> {site.root}/torn", pod_template=template)
    assert ended(site.started(backend, "exit 5")).code == 5
    assert (site.root / "torn").read_text() == "torn\n"
    unit = site.started(backend, "while :; do sleep 0.1; done")
    unit.order_stop(Cause.CANCEL, 1)
    assert backend.stop(unit).remains == ""
    assert (site.root / "torn").read_text() == "torn\ntorn\n"


def test_the_output_of_each_container_is_told_and_bounded(site: KubernetesSite) -> None:
    backend = site.open(setup_command="echo from setup")
    unit = site.started(backend, "yes 0123456789abcdef | head -n 200000; echo the end; exit 1")
    ended(unit)
    told = backend.tail(unit, 400)
    assert len(told) <= 400
    assert told.startswith(b"--- container setup ---\nfrom setup\n--- container task ---\n")
    assert told.endswith(b"0123456789abcdef\nthe end\n")
    assert backend.collect(unit) == ""
    (kept,) = (site.root / "state" / INSTANCE / "units" / unit.name).glob("output.log")
    assert kept.stat().st_mode & 0o777 == 0o600
    assert b"from setup" in kept.read_bytes()[:100]
    assert kept.stat().st_size <= 1 << 20
    assert backend.clean_up(unit, keep=False) == ""
    assert not kept.exists()


def test_a_lost_answer_makes_no_second_job(site: KubernetesSite) -> None:
    kubectl = site.fake_kubectl(LOST_ANSWER.replace("{mark}", str(site.root / "lost")))
    backend = site.open(kubectl_path=kubectl)
    unit = site.started(backend, f"echo run >> {site.root}/runs; exit 6")
    assert ended(unit).code == 6
    assert (site.root / "runs").read_text() == "run\n"
    assert site.cluster.journal.count("create", "jobs") == 2


def test_a_cancel_that_cannot_be_proven_says_so_at_its_limit_and_is_proven_later(
    site: KubernetesSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule 11: the pod has a longer grace than the worker waits for."""
    monkeypatch.setattr(job_stop, "PROOF_SECONDS", 2.0)
    backend = site.open(pod_template={**pod_template(site.root), "terminationGracePeriodSeconds": 3600})
    unit = site.started(backend, f"trap '' TERM; {site.go('end')}")
    unit.order_stop(Cause.CANCEL, 0.5)
    facts = backend.stop(unit)
    assert facts.remains.startswith(f"Job {job_name(unit.key)} in the namespace default")
    assert site.running(unit)
    site.let("end")
    eventually(lambda: backend.stop(unit).remains == "")
    assert site.job(unit) is None
    assert backend.clean_up(unit, keep=False) == ""


def test_the_same_execution_is_adopted_and_not_run_again(site: KubernetesSite) -> None:
    first = site.open()
    unit = site.started(first, f"echo run >> {site.root}/runs; {site.go('end')}; exit 8")
    second = site.open(state="other-disk")
    twin = Unit(unit.name, unit.instance, unit.key, unit.spec)
    second.prepare(twin)
    second.start(twin)
    site.let("end")
    assert (ended(twin).code, ended(unit).code) == (8, 8)
    assert (site.root / "runs").read_text() == "run\n"
    assert second.clean_up(twin, keep=False) == ""


@pytest.mark.parametrize("same_attempt", [True, False])
def test_a_stale_job_is_replaced(site: KubernetesSite, same_attempt: bool) -> None:
    first = site.open()
    old = site.unit("exit 1", key=Key("task", "run-1"))
    first.prepare(old)
    first.start(old)
    ended(old)
    first.clean_up(old, keep=False)
    kept = site.job(old)
    assert kept is not None, "a failed Job is kept"
    first.close()
    second = site.open()
    new = site.unit("exit 0", key=old.key)
    new.name = unit_name(old.key, 1 if same_attempt else 2)
    second.prepare(new)
    second.start(new)
    assert ended(new).code == 0
    made = site.job(new)
    assert made is not None
    assert made["metadata"]["uid"] != kept["metadata"]["uid"]
    assert made["metadata"]["labels"][UNIT] == new.name
    assert second.clean_up(new, keep=False) == ""


def put(site: KubernetesSite, unit: Unit, *, worker: str, instance: str, **labels: str | None) -> None:
    """A Job of somebody else with the unit's name, that waits for ever; a label of None is taken off."""
    assert unit.spec is not None
    options = KubernetesOptions(**options_for(site.cluster, site.root, pod_template={"nodeSelector": {"no": "such"}}))
    made = job(options, unit, unit.spec, worker_id=worker, instance=instance)
    for place in (made["metadata"], made["spec"]["template"]["metadata"]):
        place["labels"] = {k: v for k, v in {**place["labels"], **labels}.items() if v is not None}
    site.cluster.api.create(JOBS, "default", made)


def test_a_job_of_another_worker_is_left_alone_and_named(site: KubernetesSite) -> None:
    backend = site.open()
    unit = site.unit("exit 0")
    put(site, unit, worker="other-worker", instance="other")
    backend.prepare(unit)
    with pytest.raises(TaskFault) as caught:
        backend.start(unit)
    assert caught.value.facts.reason is Reason.JOB_CREATE
    assert "other-worker" in caught.value.facts.detail
    assert backend.clean_up(unit, keep=False) == ""
    left = site.job(unit)
    assert left is not None
    assert "deletionTimestamp" not in left["metadata"]


def test_a_job_that_oz_agent_worker_left_is_replaced_once_it_is_over(site: KubernetesSite) -> None:
    backend = site.open()
    unit = site.unit("exit 0")
    put(site, unit, worker=WORKER, instance="x", **{INSTANCE_LABEL: None, UNIT: None})
    backend.prepare(unit)
    with pytest.raises(TaskFault, match="oz-agent-worker"):
        backend.start(unit)
    site.cluster.api.change(
        JOBS, "default", job_name(unit.key), lambda obj: obj["spec"].update(activeDeadlineSeconds=1)
    )
    eventually(lambda: (site.job(unit) or {}).get("status", {}).get("conditions"))
    backend.prepare(unit)
    backend.start(unit)
    assert ended(unit).code == 0
    assert backend.clean_up(unit, keep=False) == ""


def test_what_the_server_refuses_is_told_in_its_words(site: KubernetesSite) -> None:
    unknown = fault(site, pod_template={**pod_template(site.root), "bogusField": 1})
    assert 'unknown field "spec.template.spec.bogusField"' in unknown.facts.detail
    site.cluster.add_webhook("policy.example", lambda resource, obj: "no agents here" if resource == JOBS else None)
    denied = fault(site)
    assert 'admission webhook "policy.example" denied the request: no agents here' in denied.facts.detail
    site.cluster.api.webhooks.clear()
    assert unknown.facts.reason is denied.facts.reason is Reason.JOB_CREATE


def test_what_is_forbidden_is_told_with_verb_and_resource(guarded: KubernetesSite) -> None:
    found = fault(guarded, kubeconfig=guarded.allow(Rule(("get", "list", "watch", "delete"), ("*",))))
    assert found.facts.reason is Reason.JOB_CREATE
    assert 'cannot create resource "jobs"' in found.facts.detail


def test_a_stop_while_the_server_thinks_leaves_nothing(site: KubernetesSite) -> None:
    backend = site.open()
    unit = site.unit(f"touch {site.root}/ran; {site.go('never')}")
    with site.cluster.faults.hang("create", "jobs") as hang:
        starting = Starting(backend, unit)
        eventually(lambda: hang.met)
        unit.order_stop(Cause.CANCEL, 1)
        starting.over()
        assert isinstance(starting.error, Stopped)
        assert backend.stop(unit).remains == ""
        assert backend.clean_up(unit, keep=False) == ""
    # The server goes on with a request whose client is dead.
    eventually(lambda: site.cluster.journal.count("delete", "jobs"))
    eventually(lambda: site.job(unit) is None)


def test_a_failed_job_that_still_runs_is_stopped_and_kept(site: KubernetesSite) -> None:
    backend = site.open(unschedulable_timeout=1.0)
    hold = site.cluster.faults.hold_pods()
    unit = site.unit(f"touch {site.root}/ran")
    backend.prepare(unit)
    backend.start(unit)
    assert ended(unit).reason is Reason.UNSCHEDULABLE
    assert backend.stragglers(unit) == ""
    hold.end()
    kept = site.job(unit)
    assert kept is not None
    assert (kept["spec"]["activeDeadlineSeconds"], kept["spec"].get("suspend", False)) == (1, False)
    assert backend.clean_up(unit, keep=False) == ""
    assert backend.units() == []
    assert not (site.root / "ran").exists()


def test_without_the_verb_patch_it_is_deleted(guarded: KubernetesSite) -> None:
    site = guarded
    kubeconfig = site.allow(Rule(("create", "get", "list", "watch", "delete"), ("*",)))
    backend = site.open(unschedulable_timeout=1.0, kubeconfig=kubeconfig)
    hold = site.cluster.faults.hold_pods()
    unit = site.unit("exit 0")
    backend.prepare(unit)
    backend.start(unit)
    assert ended(unit).reason is Reason.UNSCHEDULABLE
    assert backend.stragglers(unit) == ""
    hold.end()
    assert site.job(unit) is None
    assert backend.clean_up(unit, keep=False) == ""


def secrets(site: KubernetesSite) -> list[dict[str, Any]]:
    return [dict(one) for one in site.cluster.store.objects(SECRETS, "default")[0]]


def test_variables_in_a_secret_stand_in_no_job_and_go_with_it(guarded: KubernetesSite) -> None:
    site = guarded
    verbs = ("create", "get", "list", "watch", "delete")
    kubeconfig = site.allow(Rule(verbs, ("jobs", "pods", "pods/log")), Rule(("create",), ("secrets",)))
    backend = site.open(env_in_secret=True, kubeconfig=kubeconfig)
    unit = site.unit(f'printf %s "$TOKEN" > {site.root}/token; exit 0', environment={"TOKEN": "s3cret$(A)$$\nline"})
    backend.prepare(unit)
    backend.start(unit)
    assert ended(unit).code == 0
    assert (site.root / "token").read_text() == "s3cret$(A)$$\nline"
    (site.root / "token").unlink()
    assert "s3cret" not in json.dumps(site.jobs())
    assert [one["metadata"]["name"] for one in secrets(site)] == [job_name(unit.key)]
    assert backend.clean_up(unit, keep=False) == ""
    eventually(lambda: secrets(site) == [])


def test_a_secret_that_may_not_be_made_fails_the_task_and_leaves_nothing(guarded: KubernetesSite) -> None:
    found = fault(guarded, env_in_secret=True, kubeconfig=guarded.allow(Rule(("*",), ("jobs", "pods"))))
    assert 'cannot create resource "secrets"' in found.facts.detail
    eventually(lambda: guarded.jobs() == [])


@pytest.mark.parametrize("made", [False, True], ids=["no-secret", "secret"])
def test_a_kill_between_the_job_and_its_secret(site: KubernetesSite, made: bool) -> None:
    """The worker's death is the end of its first backend: the request for the Secret is never sent, or not answered."""
    body = 'case "$*" in *"create --raw"*"/secrets?"*) {real} touch {mark}; exec sleep 1000;; esac'
    real = '"$REAL" "$@" > /dev/null;' if made else ""
    mark = site.root / "asked"
    kubectl = site.fake_kubectl(body.replace("{real}", real).replace("{mark}", str(mark)))
    first = site.open(env_in_secret=True, kubectl_path=kubectl)
    unit = site.unit(f"echo up > {site.root}/up; {site.go('end')}; exit 3")
    starting = Starting(first, unit)
    eventually(mark.exists)
    if made:
        written(site.root / "up")
    second = site.open(env_in_secret=True)  # ends the helper, and finds
    assert [one.name for one in second.recover()] == [unit.name]
    taken = again(unit)
    second.attach(taken)
    if made:
        site.let("end")
        assert ended(taken).code == 3
        assert second.clean_up(taken, keep=False) == ""
    else:
        assert taken.facts is not None
        assert not taken.facts.agent_started
        assert site.job(unit) is None
        assert second.clean_up(taken, keep=False) == ""
        assert second.units() == []
    unit.order_stop(Cause.SHUTDOWN, 0)
    starting.over()


def test_secrets_stand_in_no_arguments(site: KubernetesSite) -> None:
    seen = site.root / "arguments"
    backend = site.open(kubectl_path=site.fake_kubectl(f'echo "$*" >> {seen}'), env_in_secret=True)
    ended(site.started(backend, "exit 1", environment={"TOKEN": "s3cret-value"}))
    assert "create --raw" in seen.read_text()
    assert "s3cret-value" not in seen.read_text()


def test_a_home_that_cannot_be_written_is_no_hindrance(site: KubernetesSite) -> None:
    backend = site.open(environ={"PATH": "/usr/bin:/bin", "HOME": "/proc"}, unschedulable_timeout=1.0)
    hold = site.cluster.faults.hold_pods()
    unit = site.unit("exit 0")
    backend.prepare(unit)
    backend.start(unit)
    ended(unit)
    assert backend.stragglers(unit) == ""  # by a patch, which needs discovery
    hold.end()
    assert (site.root / "state" / INSTANCE / "kubectl").is_dir()
