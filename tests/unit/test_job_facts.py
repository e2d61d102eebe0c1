"""What a cluster shows of a Job that has ended, and what is made of it: the reason, the code, the words."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from oz_worker.backends import job_facts
from oz_worker.backends.job_facts import (
    POD_SECONDS,
)
from oz_worker.model import Reason
from tests.unit.job_things import (
    COMPLETE,
    CREATING,
    DEADLINE,
    EARLY,
    FAILED,
    LATE,
    RUNNING,
    Thing,
    a_job,
    a_pod,
    disruption,
    in_the_end,
    now,
    over,
    state,
)


class Case(NamedTuple):
    job: Thing
    pods: tuple[Thing, ...]
    reason: Reason | None
    code: int | None
    words: tuple[str, ...] = ()
    ran: bool = True


ENDS: dict[str, Case] = {
    "complete": Case(COMPLETE, (), None, 0),
    "complete, though the pod looks bad": Case(
        COMPLETE, (over(state(code=137), reason="Evicted", conditions=disruption("DeletionByTaintManager")),), None, 0
    ),
    "complete, though a native sidecar failed": Case(
        COMPLETE, (a_pod(state(code=0), inits={"mesh": state(code=1)}, native=["mesh"]),), None, 0
    ),
    "exit": Case(
        FAILED,
        (over(state(code=3)),),
        Reason.CONTAINER_EXIT,
        3,
        ("container task of pod ns/p ended with exit code 3", "output says why."),
    ),
    "exit with words": Case(
        FAILED,
        (over(state(code=127, message="no entrypoint\n")),),
        Reason.CONTAINER_EXIT,
        127,
        ("no entrypoint.", "/agent"),
    ),
    "term": Case(FAILED, (over(state(code=143)),), Reason.CONTAINER_EXIT, 143, ("SIGTERM", "asked it to stop")),
    "signal recorded": Case(FAILED, (over(state(code=0, signal=9)),), Reason.CONTAINER_EXIT, 137, ("SIGKILL",)),
    "no such signal": Case(FAILED, (over(state(code=250)),), Reason.CONTAINER_EXIT, 250, ("exit code 250",)),
    "oom": Case(
        FAILED, (over(state(code=137, reason="OOMKilled")),), Reason.CONTAINER_OOM, 137, ("memory", "instance shape")
    ),
    "oom of a child, the agent went on": Case(
        FAILED, (over(state(code=0, reason="OOMKilled"), others={"x": state(code=1)}),), None, 0
    ),
    "no shell": Case(
        FAILED,
        (over(state(code=128, reason="StartError", message='exec: "/bin/sh": no such file')),),
        Reason.CONTAINER_START,
        128,
        ('exec: "/bin/sh": no such file.', "img:1 needs /bin/sh"),
        ran=False,
    ),
    "another container failed, not the agent": Case(
        FAILED, (over(state(code=0), others={"helper": state(code=5)}),), None, 0
    ),
    "init": Case(
        FAILED,
        (over(state(waiting="PodInitializing"), inits={"mine": state(code=4, message="hm")}),),
        Reason.INIT_CONTAINER,
        4,
        ("init container mine in pod ns/p ended with exit code 4", "hm."),
        ran=False,
    ),
    "setup": Case(
        FAILED,
        (over(state(waiting="PodInitializing"), inits={"setup": state(code=2)}),),
        Reason.INIT_CONTAINER,
        2,
        ("setup_command in pod ns/p ended with exit code 2",),
        ran=False,
    ),
    "copy out of memory": Case(
        FAILED,
        (over(CREATING, inits={"copy-sidecar-0": state(code=137, reason="OOMKilled")}),),
        Reason.INIT_CONTAINER,
        137,
        ("copy of the sidecar image side:1", "ran out of memory and was killed", "/bin/sh and cp", "use_image_volumes"),
        ran=False,
    ),
    "a native sidecar's code decides nothing": Case(
        FAILED, (over(state(code=6), inits={"mesh": state(code=1)}, native=["mesh"]),), Reason.CONTAINER_EXIT, 6
    ),
    "evicted, 137": Case(
        FAILED,
        (over(state(code=137), reason="Evicted", message="The node was low on resource: memory."),),
        Reason.EVICTED,
        137,
        ("pod ns/p", "low on resource: memory", "run the task again"),
    ),
    "evicted, 0": Case(FAILED, (over(state(code=0), reason="Evicted"),), Reason.EVICTED, 0),
    "evicted, full": Case(
        FAILED,
        (over(state(code=137), reason="Evicted", message='Usage of EmptyDir volume "workspace" exceeds the limit'),),
        Reason.EVICTED,
        137,
        ("workspace_size_limit",),
    ),
    "evicted before it began": Case(
        FAILED, (over(CREATING, reason="Evicted"),), Reason.EVICTED, None, ("evicted",), ran=False
    ),
    "an agent that says evict": Case(
        FAILED, (over(state(code=1, message="could not evict the cache")),), Reason.CONTAINER_EXIT, 1
    ),
    "preempted": Case(
        FAILED,
        (
            over(
                state(code=143),
                leaving=LATE,
                conditions=disruption("PreemptionByScheduler", "default-scheduler: preempting"),
            ),
        ),
        Reason.EVICTED,
        143,
        ("higher priority", "default-scheduler: preempting"),
    ),
    "preempted, the agent ended with 0": Case(
        FAILED, (over(state(code=0), "Succeeded", conditions=disruption("PreemptionByScheduler")),), Reason.EVICTED, 0
    ),
    "node gone": Case(
        FAILED,
        (over(state(code=137), conditions=disruption("DeletionByPodGC")),),
        Reason.EVICTED,
        137,
        ("node is gone",),
    ),
    "node shut down": Case(
        FAILED, (over(state(code=143), reason="Terminated"),), Reason.EVICTED, 143, ("its node shut down",)
    ),
    "deadline": Case(
        DEADLINE,
        (a_pod(state(), leaving=LATE),),
        Reason.ACTIVE_DEADLINE,
        None,
        ("Job ns/j ran longer", "backend.kubernetes.active_deadline_seconds"),
    ),
    "deadline, the agent ended with 0": Case(DEADLINE, (over(state(code=0), leaving=LATE),), Reason.ACTIVE_DEADLINE, 0),
    "deadline before the agent began": Case(
        DEADLINE,
        (a_pod(state(waiting="ImagePullBackOff", text="back-off pulling"), phase="Pending"),),
        Reason.ACTIVE_DEADLINE,
        None,
        ("still waiting then: back-off pulling",),
        ran=False,
    ),
    "deadline without a pod": Case(
        a_job(("Failed", "DeadlineExceeded", ""), made_pods=False), (), Reason.ACTIVE_DEADLINE, None, ran=False
    ),
    "an agent that says deadline": Case(
        FAILED, (over(state(code=1, message="deadline exceeded")),), Reason.CONTAINER_EXIT, 1
    ),
    "the template's own deadline": Case(
        FAILED, (over(state(code=143), reason="DeadlineExceeded"),), Reason.ACTIVE_DEADLINE, 143, ("pod_template",)
    ),
    "refused by the node": Case(
        FAILED,
        (over(CREATING, reason="OutOfcpu", message="Pod was rejected: Node didn't have enough resource: cpu"),),
        Reason.UNSCHEDULABLE,
        None,
        ("node node-1 refused the pod ns/p (OutOfcpu)", "enough resource: cpu"),
        ran=False,
    ),
    "refused by the node, no container known": Case(
        FAILED, (a_pod(None, phase="Failed", reason="UnexpectedAdmissionError"),), Reason.UNSCHEDULABLE, None, ran=False
    ),
    "failed before it began, nobody says why": Case(
        FAILED, (over(CREATING),), Reason.JOB_FAILED, None, ("in the pod ns/p.", "kubectl describe job j"), ran=False
    ),
    "failed while something ran in it, nobody says why": Case(
        FAILED,
        (over(None, reason="Odd", inits={"setup": state()}),),
        Reason.JOB_FAILED,
        None,
        ("Odd", "in the pod ns/p."),
    ),
    "init, nothing known of the agent": Case(
        FAILED, (over(None, inits={"mine": state(code=1)}),), Reason.INIT_CONTAINER, 1, ran=False
    ),
    "removed on its node, nothing known of the agent": Case(
        FAILED, (job_facts.gone(a_pod(None, phase="Pending")),), Reason.JOB_FAILED, None
    ),
    "removed while it ran": Case(
        FAILED,
        (over(state(code=143), leaving="2026-01-01T00:30:00Z"),),
        Reason.JOB_FAILED,
        143,
        ("pod ns/p was removed from outside",),
    ),
    "removed while it ran, the agent ended with 0": Case(
        FAILED, (over(state(code=0), "Succeeded", leaving="2026-01-01T00:30:00Z"),), Reason.JOB_FAILED, 0
    ),
    "ended by itself, removed later": Case(
        FAILED, (over(state(code=9, finishedAt=EARLY), leaving=LATE),), Reason.CONTAINER_EXIT, 9
    ),
    "gone without a word": Case(FAILED, (job_facts.gone(a_pod(state())),), Reason.JOB_FAILED, None, ("removed",)),
    "gone before it began": Case(
        FAILED, (job_facts.gone(a_pod(CREATING, phase="Pending")),), Reason.JOB_FAILED, None, ran=False
    ),
}


@pytest.mark.parametrize("name", ENDS)
def test_an_end_has_its_reason_its_code_and_its_words(name: str) -> None:
    case = ENDS[name]
    for pods in (case.pods, tuple(map(job_facts.pruned, case.pods))):
        facts = now(job_facts.pruned(case.job), *pods)
        assert facts is not None
        assert (facts.reason, facts.code, facts.agent_started) == (case.reason, case.code, case.ran)
        assert facts.oom == ("OOMKilled" in repr(case.pods) and case.code != 0)
        for words in case.words:
            assert words in facts.detail
        assert "None" not in facts.detail
        assert "  " not in facts.detail
        if facts.reason is not None:
            assert facts.detail[0].isupper() or facts.detail.startswith("setup_command")
            assert facts.detail.endswith(".")


def test_a_job_that_failed_waits_a_moment_for_its_pod_to_show_how() -> None:
    told = in_the_end(FAILED, a_pod(state()))
    assert told is not None
    assert told.facts.reason is Reason.JOB_FAILED
    assert told.after == pytest.approx(POD_SECONDS, abs=0.1)
    assert "BackoffLimitExceeded" in told.facts.detail
    without = in_the_end(FAILED)
    assert without is not None
    assert without.facts.agent_started
    assert "its pod is gone" in without.facts.detail


def test_pods_of_an_earlier_job_of_the_name_are_not_looked_at() -> None:
    old = over(state(code=3), uid="old")
    old["metadata"]["ownerReferences"][0]["uid"] = "another"
    assert now(RUNNING, old) is None
    assert in_the_end(RUNNING, old) is None
