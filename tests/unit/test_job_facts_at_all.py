"""Jobs that are gone, and anything at all that a server may send."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oz_worker.backends import job_facts
from oz_worker.backends.base import Unit
from oz_worker.backends.job_facts import (
    NO_WAITS,
    Seen,
    judge,
)
from oz_worker.backends.job_object import job as make_job
from oz_worker.model import ExitFacts, Key, Reason, TaskSpec
from oz_worker.settings import KubernetesOptions
from tests.unit.job_things import (
    COMPLETE,
    CREATING,
    DEADLINE,
    EARLY,
    FAILED,
    LATE,
    LIMITS,
    NO_PODS,
    PLACED,
    RUNNING,
    Thing,
    a_pod,
    disruption,
    in_the_end,
    over,
    pending,
    state,
)

GONE: dict[str, tuple[Thing | None, tuple[Thing, ...], Reason | None, int | None, bool]] = {
    "complete": (COMPLETE, (), None, 0, True),
    "failed": (FAILED, (over(state(code=3), leaving=LATE),), Reason.JOB_FAILED, 3, True),
    "failed, its pod had ended before": (
        FAILED, (over(state(code=3, finishedAt=EARLY), leaving=LATE),), Reason.CONTAINER_EXIT, 3, True
    ),
    "removed while it ran": (RUNNING, (a_pod(state(), leaving=LATE),), Reason.JOB_WATCH, None, True),
    "removed, the agent obeyed with 0": (
        RUNNING, (over(state(code=0), "Succeeded", leaving=LATE),), Reason.JOB_WATCH, 0, True
    ),
    "removed after the agent had ended well": (RUNNING, (over(state(code=0), "Succeeded"),), None, 0, True),
    "removed before it began": (RUNNING, (pending(leaving=LATE),), Reason.JOB_WATCH, None, False),
    "removed before it had a pod": (NO_PODS, (), Reason.JOB_WATCH, None, False),
    "nothing is known": (None, (), Reason.JOB_WATCH, None, True),
    "evicted, then removed": (
        RUNNING, (over(state(code=0), leaving=LATE, reason="Evicted"),), Reason.EVICTED, 0, True
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GONE)
def test_a_job_that_is_gone_is_judged_by_its_last_state(name: str) -> None:
    job, pods, reason, code, ran = GONE[name]
    facts = job_facts.vanished(job, pods)
    assert (facts.reason, facts.code, facts.agent_started) == (reason, code, ran)


def test_small_facts_name_the_cure() -> None:
    assert not job_facts.never_ran().agent_started
    assert job_facts.unproven().reason is Reason.JOB_WATCH
    made = job_facts.not_created("The Job could not be created: jobs.batch is forbidden.")
    assert made.detail == "The Job could not be created: jobs.batch is forbidden; mend that and run the task again."
    taken = job_facts.taken(RUNNING, "worker w")
    assert taken.detail.startswith("The Job ns/j exists already and belongs to worker w;")
    full = job_facts.no_room(OSError(28, "No space left on device", "/state"))
    assert (full.reason, full.agent_started) == (Reason.JOB_CREATE, False)
    assert "/state cannot be written: No space left on device" in full.detail


def test_what_is_kept_of_a_job_holds_no_variable_and_is_small() -> None:
    key = Key("t", "e")
    spec = TaskSpec(key, "t", ("agent",), {"TOKEN": "hush"})
    made = make_job(KubernetesOptions(), Unit("u", "i", key, spec), spec, worker_id="w", instance="i")
    kept = job_facts.pruned({**made, "status": RUNNING["status"]})
    assert "hush" not in repr(kept)
    assert kept["metadata"]["labels"] == made["metadata"]["labels"]
    assert kept["spec"]["ttlSecondsAfterFinished"] == 86400
    assert job_facts.pruned(kept) == kept


def test_what_lives_what_began_and_what_failed() -> None:
    assert job_facts.is_alive(a_pod(state()))
    assert not job_facts.is_alive(job_facts.gone(a_pod(state())))
    assert not job_facts.is_alive(over(state(code=0), "Succeeded"))
    assert job_facts.agent_started(a_pod(state()))
    assert not job_facts.agent_started(pending())
    assert job_facts.has_failed(FAILED)
    assert not job_facts.has_failed(COMPLETE)


NAMES = st.sampled_from(
    [
        "metadata",
        "spec",
        "status",
        "conditions",
        "type",
        "reason",
        "message",
        "containerStatuses",
        "initContainerStatuses",
        "state",
        "waiting",
        "terminated",
        "running",
        "exitCode",
        "signal",
        "finishedAt",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "ownerReferences",
        "uid",
        "name",
        "phase",
        "nodeName",
        "containers",
        "initContainers",
        "restartPolicy",
        "involvedObject",
        "lastTimestamp",
        "active",
    ]
)
WORDS = st.sampled_from(
    [
        "True",
        "False",
        "Failed",
        "Complete",
        "Pending",
        "Running",
        "Succeeded",
        "task",
        "Evicted",
        "ErrImagePull",
        "OOMKilled",
        "StartError",
        "Unschedulable",
        "PodScheduled",
        "DisruptionTarget",
        "DeadlineExceeded",
        "0001-01-01T00:00:00Z",
        "2026-01-01T00:00:00Z",
        "FailedMount",
        "Job",
        "u",
    ]
)
ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | WORDS | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(max_size=2), inner, max_size=5),
    max_leaves=30,
)
OBJECT = st.dictionaries(NAMES, ODD, max_size=4)


@settings(deadline=None)
@given(job=st.none() | OBJECT, pods=st.lists(OBJECT, max_size=2), events=st.lists(OBJECT, max_size=2))
def test_no_object_of_a_server_makes_a_verdict_fail(job: Thing | None, pods: list[Thing], events: list[Thing]) -> None:
    waits = NO_WAITS
    for clock in (0.0, 50.0, 5000.0):
        verdict = judge(Seen(job, pods, events, waits), LIMITS, clock)
        waits = verdict.waits
    job_facts.vanished(job, pods)
    for pod in pods:
        assert job_facts.pruned(job_facts.pruned(pod)) == job_facts.pruned(pod)


TASK_STATES = st.sampled_from(
    [None, CREATING, state(), *(state(code=code, reason=why) for code in (0, 1, 137) for why in ("Error", "OOMKilled"))]
)


@settings(deadline=None)
@given(
    task=TASK_STATES,
    phase=st.sampled_from(["Pending", "Running", "Succeeded", "Failed", "Unknown"]),
    leaving=st.sampled_from(["", EARLY, LATE]),
    reason=st.sampled_from(["", "Evicted", "Terminated"]),
    disrupted=st.booleans(),
    gone=st.booleans(),
    job=st.sampled_from([RUNNING, FAILED, DEADLINE]),
)
def test_success_without_the_job_s_word_is_an_agent_that_ended_with_0_and_was_left_in_peace(
    task: Thing | None, phase: str, leaving: str, reason: str, disrupted: bool, gone: bool, job: Thing
) -> None:
    conditions = disruption("EvictionByEvictionAPI") if disrupted else PLACED
    pod = a_pod(task, phase=phase, leaving=leaving, reason=reason, conditions=conditions)
    told = in_the_end(job, job_facts.gone(pod) if gone else pod)
    peace = not (leaving or reason or disrupted or job is DEADLINE)
    ended_well = task is not None and task.get("terminated", {}).get("exitCode") == 0
    if told is not None and told.facts.reason is None:
        assert peace
        assert ended_well or (phase == "Succeeded" and not (task or {}).get("terminated"))
    if peace and ended_well:
        assert told is not None
        assert told.facts == ExitFacts(code=0)
    if told is not None and not told.facts.agent_started:
        assert task is None or "waiting" in task


def test_a_preemption_that_was_given_up_ends_no_agent_that_runs() -> None:
    """The mark stays on the pod until the cluster's own controller takes it off, 2 minutes later."""
    marked = a_pod(state(), conditions=disruption("PreemptionByScheduler"))
    began = judge(Seen(RUNNING, [marked], [], NO_WAITS), LIMITS, 0.0)
    assert judge(Seen(RUNNING, [marked], [], began.waits), LIMITS, 130.0).facts is None
