"""Names, labels and annotations of what a task has in a cluster."""

from __future__ import annotations

import re
from typing import Any, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oz_worker.backends import job_object
from oz_worker.backends.base import Unit
from oz_worker.errors import TaskFault
from oz_worker.model import Key, Reason, unit_name
from oz_worker.settings import KubernetesOptions
from tests.unit.job_orders import KEY, PLAIN, UNIT, WHOSE, job, spec


def test_the_names_and_labels_are_those_of_the_existing_worker_and_ours() -> None:
    made = job(KubernetesOptions(extra_labels={"team": "a", "oz-task-id": "b"}, extra_annotations={"x/y": "z"}))
    labels = made["metadata"]["labels"]
    assert made["metadata"]["name"] == "oz-task-task-1-exec-abcdefgh"
    assert labels == {
        "team": "a",
        "oz-worker-id": "my-worker",
        "oz-worker-hash": "61b6053823f2528f",
        "oz-task-id": "task-1",
        "oz-task-hash": "15e66171bb9efb19",
        "oz-execution-id": "exec-abcdefgh",
        "oz-execution-hash": "c62f22d0b34833b4",
        "oz-worker-instance": "inst",
        "oz-worker-role": "task",
        "oz-worker-unit": UNIT,
    }
    ids = {"oz.warp.dev/task-id": "Task 1", "oz.warp.dev/execution-id": "Exec-ABCDEFGH"}
    ids["oz.warp.dev/worker-id"] = "My Worker"
    assert made["metadata"]["annotations"] == {"x/y": "z", **ids}
    assert made["spec"]["template"]["metadata"]["labels"] == labels
    assert made["spec"]["template"]["metadata"]["annotations"].items() >= {"x/y": "z", **ids}.items()


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (Key("run-1"), "oz-task-run-1-exec-run-1"),
        (Key("run-1", "   "), "oz-task-run-1-exec-run-1"),
        (Key("Ünï", "é"), "oz-task-n-exec-exec"),
        (Key("---", "--------"), "oz-task-run-exec-exec"),
        (Key("a" * 100, "0123456789"), f"oz-task-{'a' * 41}-exec-23456789"),
        (Key("a" * 40 + "--b", "0123456789"), f"oz-task-{'a' * 40}-exec-23456789"),
        (Key("a_b.c", "1/2"), "oz-task-a-b-c-exec-1-2"),
    ],
)
def test_the_name_of_a_job(key: Key, name: str) -> None:
    assert job_object.job_name(key) == name


ANY_TEXT = st.text(max_size=120)


@settings(deadline=None)
@given(task=ANY_TEXT, execution=ANY_TEXT, worker=ANY_TEXT, instance=st.from_regex(r"[a-z0-9-]{1,40}", fullmatch=True))
def test_names_and_labels_are_always_valid_and_ids_come_back(
    task: str, execution: str, worker: str, instance: str
) -> None:
    key = Key(task, execution)
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", job_object.job_name(key))
    found = job_object.labels(PLAIN, worker_id=worker, instance=instance, key=key, role="task", unit=unit_name(key, 1))
    for value in found.values():
        assert re.fullmatch(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?", value)
    notes = job_object.annotations_for(PLAIN, worker_id=worker, key=key)
    thing = {"metadata": {"labels": found, "annotations": notes}}
    assert job_object.key_of(thing) == (key if task else None)
    assert job_object.unit_of(thing) == unit_name(key, 1)
    wanted = job_object.selector(worker_id=worker, instance=instance)
    assert dict(part.split("=") for part in wanted.split(",")).items() <= found.items()


@settings(deadline=None)
@given(st.lists(st.from_regex(r"[a-z0-9-]{1,40}", fullmatch=True), min_size=2, max_size=2, unique=True))
def test_two_instances_never_select_each_other_s(instances: list[str]) -> None:
    one, other = (job_object.selector(worker_id="w", instance=instance) for instance in instances)
    assert one != other


def test_a_selector_has_a_role_or_none() -> None:
    assert job_object.selector(worker_id="w", instance="i").endswith(",oz-worker-instance=i,oz-worker-role=task")
    assert "role" not in job_object.selector(worker_id="w", instance="i", role="")


@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"metadata": None},
        {"metadata": []},
        {"metadata": {"labels": [], "annotations": "x"}},
        {"metadata": {"annotations": {"oz.warp.dev/task-id": 1}, "labels": {"oz-worker-unit": 1}}},
    ],
)
def test_what_is_no_task_s_has_no_key_and_no_unit(odd: Mapping[str, Any]) -> None:
    assert (job_object.key_of(odd), job_object.unit_of(odd)) == (None, "")


def test_a_job_without_its_label_is_the_first_attempt_s() -> None:
    thing = {"metadata": {"annotations": job_object.annotations_for(PLAIN, worker_id="w", key=KEY)}}
    assert job_object.unit_of(thing) == unit_name(KEY, 1)


@pytest.mark.parametrize(
    ("key", "told"),
    [
        (Key("t\ud800"), "the task id 't\\ud800' is not valid UTF-8"),
        (Key("t", "e" * 5000), "the execution id is longer than 4096 characters"),
    ],
)
def test_ids_that_would_not_come_back_are_refused(key: Key, told: str) -> None:
    wanted = spec(key=key)
    with pytest.raises(TaskFault, match=re.escape(told)) as caught:
        job_object.job(PLAIN, Unit("u", "inst", key, wanted), wanted, **WHOSE)
    assert caught.value.facts.reason is Reason.JOB_CREATE
