"""Bad input: one clear sentence at the start, with its exit code, or at the task; nothing is left in the cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from oz_worker.errors import TaskFault
from oz_worker.model import Key, Reason, Sidecar
from tests.kubernetes.conftest import KubernetesRig
from tests.kubernetes.kubernetes_site import KubernetesSite, ended

START: dict[str, tuple[int, Any, str]] = {
    "no such kubeconfig": (3, {"kubeconfig": "/nonexistent/config"}, "kubeconfig /nonexistent/config does not exist"),
    "no such context": (3, {"context": "nowhere"}, 'context "nowhere" does not exist; correct backend.kubernetes'),
    "no such program": (3, {"kubectl_path": "/nonexistent/kubectl"}, "kubectl_path /nonexistent/kubectl is no program"),
    "a template that is a list": (2, {"pod_template": []}, "`pod_template`: expected a mapping"),
    "a template of text": (2, {"pod_template": "x"}, "`pod_template`: expected a mapping"),
    "a label": (2, {"extra_labels": {"team": "a b"}}, "'a b' cannot be a label"),
    "a label that is too long": (2, {"extra_labels": {"team": "x" * 64}}, "cannot be a label"),
    "the name of a label": (2, {"extra_labels": {"a b": "c"}}, "'a b' is not a key"),
    "a deadline": (2, {"active_deadline_seconds": -5}, "`active_deadline_seconds`: '-5' is out of range"),
    "a time to live": (2, {"ttl_seconds_after_finished": -1}, "`ttl_seconds_after_finished`: '-1' is out of"),
    "a quantity": (2, {"workspace_size_limit": "much"}, "'much' is not a quantity"),
    "a namespace": (2, {"namespace": "My_Space"}, "'My_Space' is not a namespace"),
}


@pytest.mark.parametrize(("exit_code", "options", "words"), START.values(), ids=START)
def test_a_mistake_is_one_sentence_at_the_start(
    kubernetes_rig: KubernetesRig, exit_code: int, options: dict[str, Any], words: str
) -> None:
    rig = kubernetes_rig
    rig.kubernetes.update(options)
    worker = rig.start(connected=False)
    assert worker.exit_code() == exit_code, worker.log
    assert [line for line in worker.log.splitlines() if words in line], worker.log
    assert len(worker.log.splitlines()) <= 3, worker.log
    assert "Traceback" not in worker.log
    assert rig.jobs() == []


def test_a_broken_kubeconfig(kubernetes_rig: KubernetesRig) -> None:
    rig = kubernetes_rig
    (rig.place / "broken").write_text("a: [")
    rig.kubernetes["kubeconfig"] = str(rig.place / "broken")
    worker = rig.start(connected=False)
    assert worker.exit_code() == 3
    assert "error loading config file" in worker.log
    assert "correct backend.kubernetes.kubeconfig" in worker.log


def test_an_api_server_that_is_unreachable(kubernetes_rig: KubernetesRig) -> None:
    rig = kubernetes_rig
    with rig.cluster.faults.down():
        worker = rig.start(connected=False)
        assert worker.exit_code() == 3
    assert "was refused - did you specify the right host or port?; check that its API server runs" in worker.log
    assert "Traceback" not in worker.log


def test_an_expired_token(guarded: KubernetesSite) -> None:
    from oz_worker.errors import NotUsable

    token = guarded.cluster.token()
    kubeconfig = guarded.cluster.write_kubeconfig(token)
    guarded.cluster.faults.expire(token)
    with pytest.raises(NotUsable, match=r"does not accept these credentials .* renew the token"):
        guarded.closed(kubeconfig=str(kubeconfig)).open()


TASK: dict[str, tuple[Reason, dict[str, Any], str]] = {
    "a sidecar without a path": (Reason.SIDECAR_PREP, {"sidecars": (Sidecar("image", ""),)}, "sidecar"),
    "a sidecar at the workspace": (Reason.SIDECAR_PREP, {"sidecars": (Sidecar("i", "/workspace"),)}, "/workspace"),
    "two sidecars at one place": (
        Reason.SIDECAR_PREP,
        {"sidecars": (Sidecar("i", "/a"), Sidecar("j", "/a/"))},
        "/a",
    ),
    "a variable without a name": (Reason.JOB_CREATE, {"environment": {"": "x"}}, "variable"),
}


@pytest.mark.parametrize(("reason", "spec", "words"), TASK.values(), ids=TASK)
def test_what_no_job_can_be_fails_the_task_alone(
    site: KubernetesSite, reason: Reason, spec: dict[str, Any], words: str
) -> None:
    backend = site.open()
    unit = site.unit("exit 0", **spec)
    backend.prepare(unit)
    with pytest.raises(TaskFault) as caught:
        backend.start(unit)
    assert caught.value.facts.reason is reason
    assert words in caught.value.facts.detail
    assert not caught.value.facts.agent_started
    assert backend.clean_up(unit, keep=False) == ""
    assert (site.jobs(), backend.units()) == ([], [])


@pytest.mark.parametrize(
    "key",
    [Key("x" * 500, "y" * 500), Key("---", "***"), Key("ÄÖÜ/..", "")],
    ids=["long", "only dashes", "no letters"],
)
def test_odd_ids_have_names_that_can_be(site: KubernetesSite, key: Key, tmp_path: Path) -> None:
    backend = site.open()
    unit = site.started(backend, "exit 0", key=key)
    assert ended(unit).code == 0
    assert backend.clean_up(unit, keep=False) == ""
