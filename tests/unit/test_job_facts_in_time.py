"""What may heal has its time, no more and no less, before it is an end."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from oz_worker.backends import job_facts
from oz_worker.backends.job_facts import (
    ANNOUNCED_SECONDS,
    JOB_SECONDS,
    LEAVING_SECONDS,
    NO_WAITS,
    Seen,
    judge,
)
from oz_worker.backends.job_waits import Limits
from oz_worker.model import Reason
from tests.unit.job_things import (
    COMPLETE,
    FAILED,
    LATE,
    LIMITS,
    NO_PODS,
    PLACED,
    RUNNING,
    UNSCHEDULED,
    Thing,
    a_job,
    a_pod,
    an_event,
    disruption,
    in_the_end,
    over,
    pending,
    state,
)


class Slow(NamedTuple):
    pods: tuple[Thing, ...]
    after: float | None  # None: never
    reason: Reason | None = None
    words: tuple[str, ...] = ()
    events: tuple[Thing, ...] = ()
    ran: bool = False
    job: Thing = RUNNING
    limits: Limits = LIMITS
    code: int | None = None


MOUNT = an_event("FailedMount", 'MountVolume.SetUp failed for volume "x" : configmap "x" not found')
DENIED = 'Error creating: admission webhook "policy.example" denied the request: no'

SLOW: dict[str, Slow] = {
    "running": Slow((a_pod(state()),), None),
    "starting": Slow((pending(),), None),
    "no pod yet": Slow((), None),
    "running, another container cannot be pulled": Slow(
        (a_pod(state(), others={"x": state(waiting="ImagePullBackOff")}),), None
    ),
    "starting, another container cannot be pulled": Slow((pending(others={"x": state(waiting="ErrImagePull")}),), None),
    "the agent is over, the rest goes on, 0": Slow(
        (a_pod(state(code=0), others={"x": state()}),), JOB_SECONDS, ran=True, code=0
    ),
    "the agent is over, the rest goes on, 3": Slow(
        (a_pod(state(code=3), others={"x": state()}),), JOB_SECONDS, Reason.CONTAINER_EXIT, ran=True, code=3
    ),
    "the pod failed": Slow((over(state(code=3)),), JOB_SECONDS, Reason.CONTAINER_EXIT, ran=True, code=3),
    "the pod succeeded": Slow((over(state(code=0), "Succeeded"),), JOB_SECONDS, ran=True, code=0),
    "the pod is evicted": Slow((over(state(code=0), reason="Evicted"),), JOB_SECONDS, Reason.EVICTED, ran=True, code=0),
    "an init container failed": Slow(
        (pending(inits={"setup": state(code=1)}),), JOB_SECONDS, Reason.INIT_CONTAINER, code=1
    ),
    "the pod is gone": Slow((job_facts.gone(a_pod(state())),), JOB_SECONDS, Reason.JOB_FAILED, ran=True),
    "the pod does not go": Slow(
        (a_pod(state(), leaving=LATE, conditions=disruption("DeletionByTaintManager", "NoExecute taint")),),
        30 + LEAVING_SECONDS,
        Reason.EVICTED,
        ("node-1", "NoExecute taint", "probably lost"),
        ran=True,
    ),
    "the node is to be disrupted": Slow(
        (a_pod(state(), conditions=disruption("EvictionByEvictionAPI")),), ANNOUNCED_SECONDS, Reason.EVICTED, ran=True
    ),
    "unschedulable": Slow(
        (pending(None, conditions=UNSCHEDULED, node=""),),
        30.0,
        Reason.UNSCHEDULABLE,
        ("No node took the pod ns/p for 30s", "1 Insufficient cpu.", "unschedulable_timeout"),
    ),
    "unschedulable, for ever": Slow(
        (pending(None, conditions=UNSCHEDULED, node=""),), None, limits=LIMITS._replace(unschedulable=0.0)
    ),
    "gated": Slow((pending(None, conditions={"PodScheduled": ("False", "SchedulingGated", "")}, node=""),), None),
    "no scheduler": Slow(
        (pending(None, conditions={}, node=""),), 60.0, Reason.UNSCHEDULABLE, ("No scheduler looked",)
    ),
    "invalid image": Slow(
        (pending(state(waiting="InvalidImageName", text="couldn't parse image name")),),
        0.0,
        Reason.INVALID_IMAGE,
        ("img:1", "couldn't parse image name", "Write it like"),
    ),
    "image, back-off": Slow(
        (pending(state(waiting="ImagePullBackOff", text='Back-off pulling image "img:1"')),),
        600.0,
        Reason.IMAGE_PULL,
        ("container task of pod ns/p", 'Back-off pulling image "img:1".', "imagePullSecrets"),
    ),
    "image, network": Slow(
        (pending(state(waiting="ErrImagePull", text="dial tcp: lookup r.test: no such host")),),
        600.0,
        Reason.IMAGE_PULL,
    ),
    "image, not found": Slow(
        (pending(state(waiting="ErrImagePull", text="img:1: manifest unknown")),), 60.0, Reason.IMAGE_PULL
    ),
    "image, not found, a short limit": Slow(
        (pending(state(waiting="ErrImagePull", text="img:1: not found")),),
        5.0,
        Reason.IMAGE_PULL,
        limits=LIMITS._replace(image_pull=5.0),
    ),
    "image, not found, as only an event says": Slow(
        (pending(state(waiting="ImagePullBackOff", text="Back-off")),),
        60.0,
        Reason.IMAGE_PULL,
        ("Back-off", "pull access denied"),
        (an_event("Failed", 'Failed to pull image "img:1": pull access denied'),),
    ),
    "image, never to be pulled": Slow(
        (pending(state(waiting="ErrImageNeverPull", text="not present with pull policy of Never")),),
        60.0,
        Reason.IMAGE_PULL,
    ),
    "image of a sidecar": Slow(
        (pending(inits={"copy-sidecar-0": state(waiting="ImagePullBackOff")}),), 600.0, Reason.IMAGE_PULL, ("side:1",)
    ),
    "image of a native sidecar": Slow(
        (pending(inits={"mesh": state(waiting="ImagePullBackOff")}, native=["mesh"]),), 600.0, Reason.IMAGE_PULL
    ),
    "image, for ever": Slow(
        (pending(state(waiting="ErrImagePull", text="not found")),), None, limits=LIMITS._replace(image_pull=0.0)
    ),
    "configuration": Slow(
        (pending(state(waiting="CreateContainerConfigError", text='secret "s" not found')),),
        60.0,
        Reason.CONTAINER_CREATE,
        ('secret "s" not found', "(CreateContainerConfigError)"),
    ),
    "a native sidecar does not get up": Slow(
        (pending(inits={"mesh": state(waiting="CrashLoopBackOff")}, native=["mesh"]),), 300.0, Reason.INIT_CONTAINER
    ),
    "mount": Slow((pending(),), 310.0, Reason.VOLUME_MOUNT, ('configmap "x" not found', "for 5m"), (MOUNT,)),
    "mount, a short limit": Slow(
        (pending(),), 2.5, Reason.VOLUME_MOUNT, (), (MOUNT,), limits=LIMITS._replace(volume_mount=2.0)
    ),
    "mount, healed as an event says": Slow((pending(),), None, events=(MOUNT, an_event("Pulling", "pulling"))),
    "mount, healed as the pod says": Slow(
        (pending(conditions={**PLACED, "PodReadyToStartContainers": ("True", "", "")}),), None, events=(MOUNT,)
    ),
    "mount, for ever": Slow((pending(),), None, events=(MOUNT,), limits=LIMITS._replace(volume_mount=0.0)),
    "mount, but an init container has run": Slow((pending(inits={"setup": state(code=0)}),), None, events=(MOUNT,)),
    "image, on a node of its own choice": Slow(
        (pending(state(waiting="InvalidImageName"), conditions={}),), 0.0, Reason.INVALID_IMAGE
    ),
    "mount of another pod": Slow((pending(),), None, events=({**MOUNT, "involvedObject": {"uid": "another"}},)),
    "sandbox": Slow(
        (pending(),), 310.0, Reason.CONTAINER_CREATE, ("cni",), (an_event("FailedCreatePodSandBox", "cni is down"),)
    ),
    "quota": Slow(
        (),
        33.0,
        Reason.UNSCHEDULABLE,
        ("No pod could be made for the Job ns/j", "exceeded quota: q"),
        (an_event("FailedCreate", 'Error creating: pods "j-x" is forbidden: exceeded quota: q', "job-uid"),),
        job=NO_PODS,
    ),
    "admission": Slow(
        (),
        63.0,
        Reason.JOB_CREATE,
        ("denied the request: no.",),
        (an_event("FailedCreate", DENIED, "job-uid"),),
        job=NO_PODS,
    ),
    "a webhook that is down": Slow(
        (),
        603.0,
        Reason.JOB_CREATE,
        ("failed calling webhook",),
        (an_event("FailedCreate", 'Error creating: failed calling webhook "w": connection refused', "job-uid"),),
        job=NO_PODS,
    ),
    "no service account": Slow(
        (),
        63.0,
        Reason.JOB_CREATE,
        ('serviceaccount "oz" not found', "Make that service account"),
        (an_event("FailedCreate", 'error looking up service account ns/oz: serviceaccount "oz" not found', "job-uid"),),
        job=NO_PODS,
    ),
    "suspended": Slow((), None, job=a_job(made_pods=False, suspend=True)),
}


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("name", SLOW)
def test_what_can_heal_has_its_time_and_no_more(name: str, fresh: bool) -> None:
    case = SLOW[name]
    told = in_the_end(case.job, *case.pods, events=case.events, limits=case.limits, fresh=fresh)
    if case.after is None:
        assert told is None
        return
    assert told is not None
    facts = told.facts
    assert told.after == pytest.approx(case.after, abs=0.5)
    assert (facts.reason, facts.code, facts.agent_started) == (case.reason, case.code, case.ran)
    for words in case.words:
        assert words in facts.detail
    assert bool(facts.remains) == ("probably lost" in facts.detail)
    if facts.reason is not None:
        assert facts.detail.endswith(".")


def test_what_may_be_old_ends_nothing_but_what_the_job_says_itself_does() -> None:
    stuck = pending(None, conditions=UNSCHEDULED, node="")
    first = judge(Seen(RUNNING, (stuck,), (), NO_WAITS, fresh=False), LIMITS, 0.0)
    late = judge(Seen(RUNNING, (stuck,), (), first.waits, fresh=False), LIMITS, 500.0)
    assert (late.facts, late.wants_fresh, late.wants_events) == (None, True, True)
    runs = judge(Seen(RUNNING, (a_pod(state()),), (), late.waits), LIMITS, 501.0)
    assert (runs.facts, runs.look_at) == (None, float("inf"))
    for job in (COMPLETE, FAILED):
        assert judge(Seen(job, (over(state(code=0)),), (), NO_WAITS, fresh=False), LIMITS, 0.0).facts is not None


def test_what_healed_in_between_has_its_whole_time_again() -> None:
    stuck, placed = pending(None, conditions=UNSCHEDULED, node=""), pending()
    waits = NO_WAITS
    for clock, pod in ((0.0, stuck), (29.0, stuck), (29.5, placed), (29.6, stuck), (59.0, stuck)):
        verdict = judge(Seen(RUNNING, (pod,), (), waits), LIMITS, clock)
        assert verdict.facts is None
        waits = verdict.waits
    assert judge(Seen(RUNNING, (stuck,), (), waits), LIMITS, 59.7).facts is not None


def test_back_off_and_pull_take_turns_and_count_as_one() -> None:
    waits = NO_WAITS
    for clock in range(0, 600, 10):
        reason = "ErrImagePull" if clock % 20 else "ImagePullBackOff"
        pod = pending(state(waiting=reason, text="connection refused"))
        verdict = judge(Seen(RUNNING, (pod,), (), waits), LIMITS, float(clock))
        assert verdict.facts is None
        waits = verdict.waits
    assert judge(Seen(RUNNING, (pod,), (), waits), LIMITS, 600.0).facts is not None


def test_a_mount_that_is_not_complained_of_any_more_has_healed_in_silence() -> None:
    """An image that is long in coming looks the same, and old clusters tell nothing more."""
    waits, limits = NO_WAITS, LIMITS._replace(volume_mount=200.0)
    for clock in range(0, 2000, 50):
        verdict = judge(Seen(RUNNING, (pending(),), (MOUNT,), waits), limits, float(clock))
        assert verdict.facts is None
        waits = verdict.waits


def test_a_mount_that_is_complained_of_again_and_again_has_not() -> None:
    waits, ended = NO_WAITS, None
    for clock in range(0, 400, 50):
        event = {**MOUNT, "lastTimestamp": f"2026-01-01T00:{clock // 60:02}:{clock % 60:02}Z"}
        verdict = judge(Seen(RUNNING, (pending(),), (event,), waits), LIMITS, float(clock))
        ended, waits = verdict.facts, verdict.waits
        if ended is not None:
            break
    assert ended is not None
    assert (clock, ended.reason) == (300, Reason.VOLUME_MOUNT)


def test_events_are_wanted_only_where_they_tell_more() -> None:
    def wants(*pods: Thing, job: Thing = RUNNING, after: float = 60.0) -> bool:
        first = judge(Seen(job, pods, (), NO_WAITS), LIMITS, 0.0)
        return judge(Seen(job, pods, (), first.waits), LIMITS, after).wants_events

    assert not wants(a_pod(state()))
    assert not wants(pending(), after=5.0)
    assert wants(pending())
    assert wants(job=NO_PODS)
    assert not wants(job=NO_PODS, after=1.0)
    assert not wants(job=RUNNING)
    assert wants(pending(state(waiting="ErrImagePull")), after=0.0)
    assert not wants(pending(None, conditions=UNSCHEDULED, node=""), after=20.0)
    assert not wants(over(state(code=1)), after=20.0)
    assert not wants(over(state(waiting="ErrImagePull"), reason="Evicted"), after=20.0)
