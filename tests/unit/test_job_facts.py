"""What a cluster shows of a Job, and what is made of it: the reason, the code, the words, and not before its time."""

from __future__ import annotations

from typing import Any, Mapping, NamedTuple, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oz_worker.backends import job_facts
from oz_worker.backends.base import Unit
from oz_worker.backends.job_facts import (
    ANNOUNCED_SECONDS,
    JOB_SECONDS,
    LEAVING_SECONDS,
    NO_WAITS,
    POD_SECONDS,
    Seen,
    judge,
)
from oz_worker.backends.job_object import job as make_job
from oz_worker.backends.job_waits import Limits
from oz_worker.model import ExitFacts, Key, Reason, TaskSpec
from oz_worker.settings import KubernetesOptions

LIMITS = Limits(unschedulable=30.0, volume_mount=300.0, image_pull=600.0)
EARLY, LATE = "2026-01-01T00:00:00Z", "2026-01-01T01:00:00Z"
EVENTS_SECONDS = 5.0
Thing = dict[str, Any]


# -- objects as the API has them


def a_job(*conditions: tuple[str, str, str], made_pods: bool = True, **spec: Any) -> Thing:
    status: Thing = {"startTime": EARLY, "active": 1 if made_pods else 0}
    status["conditions"] = [
        {"type": kind, "status": "True", "reason": reason, "message": text} for kind, reason, text in conditions
    ]
    return {"metadata": {"name": "j", "namespace": "ns", "uid": "job-uid"}, "spec": spec, "status": status}


FAILED = a_job(("Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit"))
DEADLINE = a_job(("Failed", "DeadlineExceeded", "Job was active longer than specified deadline"))
COMPLETE = a_job(("SuccessCriteriaMet", "CompletionsReached", ""), ("Complete", "CompletionsReached", ""))
RUNNING = a_job()


def state(**known: Any) -> Thing:
    """The state of a container: `running`, `waiting` with a reason and a message, `code` with a reason."""
    if "waiting" in known:
        return {"waiting": {"reason": known["waiting"], "message": known.get("text", "")}}
    if "code" in known:
        ended = {"exitCode": known["code"], "reason": known.get("reason", "Error"), "finishedAt": LATE}
        ended.update({name: known[name] for name in ("signal", "message", "finishedAt") if name in known})
        return {"terminated": ended}
    return {"running": {"startedAt": EARLY}}


def status_of(name: str, found: Thing, image: str = "img:1") -> Thing:
    return {"name": name, "image": image, "state": found, "lastState": {}, "restartCount": 0}


def condition(kind: str, status: str, reason: str, message: str) -> Thing:
    return {"type": kind, "status": status, "reason": reason, "message": message}


CREATING = state(waiting="ContainerCreating")
PLACED = {"PodScheduled": ("True", "", "")}


def a_pod(
    task: Thing | None = None,
    *,
    phase: str = "Running",
    inits: Mapping[str, Thing] = {},
    others: Mapping[str, Thing] = {},
    conditions: Mapping[str, tuple[str, str, str]] = PLACED,
    native: Sequence[str] = (),
    node: str = "node-1",
    leaving: str = "",
    uid: str = "pod-uid",
    **status: Any,
) -> Thing:
    metadata = {"name": "p", "namespace": "ns", "uid": uid, "creationTimestamp": EARLY}
    metadata["ownerReferences"] = [{"kind": "Job", "uid": "job-uid"}]  # type: ignore[assignment]
    if leaving:
        metadata.update({"deletionTimestamp": leaving, "deletionGracePeriodSeconds": 30})  # type: ignore[dict-item]
    spec = {
        "nodeName": node,
        "initContainers": [{"name": name, **({"restartPolicy": "Always"} if name in native else {})} for name in inits],
        "containers": [{"name": name} for name in ("task", *others)],
    }
    tasks = [status_of("task", task)] if task is not None else []
    full = {
        "phase": phase,
        "conditions": [condition(kind, *rest) for kind, rest in conditions.items()],
        "initContainerStatuses": [status_of(name, found, "side:1") for name, found in inits.items()],
        "containerStatuses": [*tasks, *(status_of(name, found, "other:1") for name, found in others.items())],
        **status,
    }
    return {"metadata": metadata, "spec": {k: v for k, v in spec.items() if v}, "status": full}


def an_event(reason: str, message: str, uid: str = "pod-uid", time: str = EARLY) -> Thing:
    return {"involvedObject": {"uid": uid, "name": "x"}, "reason": reason, "message": message, "lastTimestamp": time}


def disruption(reason: str, message: str = "") -> dict[str, tuple[str, str, str]]:
    return {**PLACED, "DisruptionTarget": ("True", reason, message)}


UNSCHEDULED = {"PodScheduled": ("False", "Unschedulable", "0/1 nodes are available: 1 Insufficient cpu.")}


# -- looking at them


def now(job: Thing | None, *pods: Thing, events: Sequence[Thing] = (), limits: Limits = LIMITS) -> ExitFacts | None:
    """The verdict at first sight."""
    return judge(Seen(job, pods, events, NO_WAITS), limits, 1000.0).facts


class Told(NamedTuple):
    facts: ExitFacts
    after: float


def in_the_end(
    job: Thing | None, *pods: Thing, events: Sequence[Thing] = (), limits: Limits = LIMITS, fresh: bool = True
) -> Told | None:
    """The verdict when nothing changes any more but the time of events, looked for as the verdicts ask.

    None when there is none in two hours.
    """
    clock, waits = 0.0, NO_WAITS
    told: Sequence[Thing] = ()
    read_at = -EVENTS_SECONDS
    while clock < 7200.0:
        verdict = judge(Seen(job, pods, told, waits, fresh), limits, clock)
        waits = verdict.waits
        if verdict.facts is not None:
            return Told(verdict.facts, clock)
        if verdict.wants_fresh and not fresh:
            fresh = True
        elif verdict.wants_events and clock >= read_at + EVENTS_SECONDS:
            told, read_at = [repeated(event, clock) for event in events], clock
        elif verdict.wants_events:
            clock = min(verdict.look_at, read_at + EVENTS_SECONDS)
        else:
            assert verdict.look_at > clock
            clock = verdict.look_at
    return None


def repeated(event: Thing, clock: float) -> Thing:
    """An event that is told of again every two minutes."""
    return {**event, "lastTimestamp": f"2026-01-01T{int(clock // 3600):02}:{int(clock // 120 * 2 % 60):02}:00Z"}


# -- what is an end at once


class Case(NamedTuple):
    job: Thing
    pods: tuple[Thing, ...]
    reason: Reason | None
    code: int | None
    words: tuple[str, ...] = ()
    ran: bool = True


def over(task: Thing | None, phase: str = "Failed", **more: Any) -> Thing:
    return a_pod(task, phase=phase, **more)


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


# -- what is an end only after a while


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


def pending(task: Thing | None = CREATING, **more: Any) -> Thing:
    return a_pod(task, phase="Pending", **more)


NO_PODS = a_job(made_pods=False)
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


# -- Jobs that are gone


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


# -- anything at all

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
