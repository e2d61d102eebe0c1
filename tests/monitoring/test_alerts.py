"""The shipped alert rules, run by `promtool`: each fires under its fault, names the worker, and is quiet without it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from oz_worker.config import flags
from tests.monitoring.promtool import MONITORING, ROOT, RULES, Series, check_series, promtool, worker

FIRING = 'count by (alertname, worker_id) (ALERTS{alertstate="firing"})'
OTHER = worker("other")
"""A healthy worker beside the one at fault: it keeps the fleet from being empty, and no alert may name it."""
GROUP = yaml.safe_load(RULES.read_text())["groups"][0]
ALERTS: dict[str, Any] = {rule["alert"]: rule for rule in GROUP["rules"] if "alert" in rule}


class Case(NamedTuple):
    """What is scraped, and which alerts fire for which worker at which minute; at no other one that is named."""

    series: list[Series]
    fires: dict[int, set[tuple[str, str]]]


def gone(series: list[Series]) -> list[Series]:
    """Targets that are taken out of Prometheus after 20 minutes, as service discovery does it."""
    return [each._replace(values="1x20 stale") for each in series]


def only(alert: str, quiet: int, firing: int, **changed: str) -> Case:
    """One worker has a fault: nothing fires at minute *quiet*, and *alert* alone at minute *firing*."""
    return Case([*worker("ill", given=changed), *OTHER], {quiet: set(), firing: {(alert, "ill")}})


FAULTS = {
    "disconnected": only("OzWorkerDisconnected", 31, 33, connected="1x29 0x90"),
    "flapping": only(
        "OzWorkerReconnectStorm", 33, 40, websocket_reconnects_total__remote_close="0x29 1+1x90", connected="1x29 1x90"
    ),
    "backend down": only("OzWorkerBackendDown", 34, 36, backend_up="1x29 0x90"),
    "disk full": only("OzWorkerRejecting", 29, 32, tasks_rejected_total__disk="0x29 1x90"),
    "backend rejects": only("OzWorkerRejecting", 29, 32, tasks_rejected_total__backend="0x29 1x90"),
    "full and turned away": Case(
        [*worker("ill", tasks_active="4x120", tasks_rejected_total__at_capacity="0x29 1+1x90"), *OTHER],
        {
            29: set(),
            44: {("OzWorkerSaturated", "ill")},
            50: {("OzWorkerSaturated", "ill"), ("OzWorkerRejectingAtCapacity", "ill")},
        },
    ),
    "saturated": only("OzWorkerSaturated", 59, 62, tasks_active="3x29 4x90"),
    "half of all tasks fail": only(
        "OzWorkerFailureRate",
        31,
        60,
        tasks_completed_total__succeeded="0x29 0+1x90",
        tasks_completed_total__failed="0x29 0+1x90",
        task_failures_total__backend__agent_invocation="0x29 0+1x90",
    ),
    "dispatchers fail": only(
        "OzWorkerFailureRate",
        31,
        60,
        tasks_completed_total__dispatched="0x29 0+3x90",
        task_failures_total__backend__dispatch_command="0x29 0+1x90",
    ),
    "images": only(
        "OzWorkerImagePullsFailing",
        33,
        50,
        tasks_completed_total__succeeded="0+10x120",
        task_failures_total__backend__image_pull="0x29 1x5 2x5 3x90",
    ),
    "sidecar images": only(
        "OzWorkerImagePullsFailing",
        33,
        50,
        tasks_completed_total__succeeded="0+10x120",
        task_failures_total__backend__sidecar_prep="0x29 1x5 2x5 3x90",
    ),
    "container out of memory": only(
        "OzWorkerOutOfMemory", 29, 31, task_failures_total__backend__container_oom="0x29 1x90"
    ),
    "agent out of memory": only("OzWorkerOutOfMemory", 29, 31, task_failures_total__backend__agent_oom="0x29 1x90"),
    "no room": only("OzWorkerUnschedulable", 29, 31, task_failures_total__backend__unschedulable="0x29 1x90"),
    "reports wait": only("OzWorkerOutboxNotDraining", 38, 45, outbox_oldest_seconds="0x29 0+60x90"),
    "log lines are lost": only("OzWorkerLogLinesLost", 29, 33, log_lines_dropped_total="0x29 40x90"),
    "watchdog": only(
        # The process leaves, is scraped in vain for a minute, and the next one knows of it.
        "OzWorkerWatchdogTripped",
        29,
        33,
        up="1x29 0 1x90",
        connected="1x29 _ 1x90",
        watchdog_trips_total="0x29 _ 1x90",
    ),
    "gone without a word": only(
        "OzWorkerNotScraped", 34, 36, up="1x29 0x90", connected="1x29 stale", info="1x29 stale", backend_up="1x29 stale"
    ),
    "all disconnected": Case(
        [*worker("one", connected="1x29 0x90"), *worker("two", connected="1x29 0x90")],
        {
            31: set(),
            34: {("OzWorkerDisconnected", "one"), ("OzWorkerDisconnected", "two")},
            36: {("OzWorkerDisconnected", "one"), ("OzWorkerDisconnected", "two"), ("OzWorkerFleetEmpty", "")},
        },
    ),
    "all gone": Case(
        [*gone(worker("one")), *gone(worker("two"))],
        {24: set(), 27: {("OzWorkerFleetEmpty", "")}},
    ),
    "never there": Case([], {4: set(), 6: {("OzWorkerFleetEmpty", "")}}),
    "reports wait because there is no connection": only(
        "OzWorkerDisconnected", 31, 60, connected="1x29 0x90", outbox_oldest_seconds="0x29 0+60x90"
    ),
    # Pushed series of the process before do not go stale at once: two of everything, and the rules hold all the same.
    "upgraded, pushed": Case(
        [
            *worker("ill", connected="1x29 0x90"),
            *(each for each in worker("ill", version="0.2.0") if each.metric == "oz_worker_info"),
            *OTHER,
        ],
        {31: set(), 33: {("OzWorkerDisconnected", "ill")}},
    ),
    "one of many": Case(
        [
            *(each for number in range(12) for each in worker("pool", f"host-{number}:9464")),
            *worker("ill", tasks_rejected_total__disk="0x29 1x90"),
        ],
        {29: set(), 32: {("OzWorkerRejecting", "ill")}},
    ),
}


DAY = 1440
RESTARTED = {
    # Ten hours of history, a minute without an answer, and a process that counts from 0.
    "tasks_completed_total__succeeded": "0+1x600 _ 0+1x838",
    "tasks_completed_total__failed": "0x100 1x300 2x198 _ 0x838",
    "task_failures_total__backend__agent_invocation": "0x100 1x300 2x198 _ 0x838",
    "task_failures_total__backend__container_exit": "7x600 _ 0x838",
    "task_failures_total__backend__container_oom": "9x600 _ 0x838",
    "task_failures_total__backend__image_pull": "9x600 _ 0x838",
    "task_failures_total__backend__graceful_shutdown": "0x598 5 _ 0x838",
    "tasks_rejected_total__at_capacity": "9x600 _ 0x838",
    "tasks_rejected_total__draining": "0x590 1+1x9 _ 0x838",
    "websocket_reconnects_total__remote_close": "0x200 1x399 _ 0x838",
    "websocket_reconnects_total__dial_failed": "0x200 1+1x3 5x395 _ 0x838",
    "watchdog_trips_total": "3x600 _ 0x838",
    "log_lines_dropped_total": "40x600 _ 0x838",
    "connected": "1x200 0 1x398 _ 0 1x837",
    "up": "1x599 0 1x838",
    "tasks_active": "0x50 4x25 1x100 4x20 0x402 _ 3x60 4x20 1x757",
    "outbox_oldest_seconds": "0x200 60 0 30 0x396 _ 90 0x837",
    "backend_up": "1x300 0x3 1x295 _ 1x838",
}
HEALTHY = {
    "a day with a restart, a reconnect, two failures and full hours": [
        *worker("day", minutes=DAY, given=RESTARTED),
        *worker("other", minutes=DAY),
    ],
    "idle": worker("idle"),
    "unlimited": worker("open", limit=0, tasks_active="500x120"),
    "a single reconnect": worker("once", connected="1x29 0 1x90", websocket_reconnects_total__remote_close="0x29 1x90"),
    "a server that is away for a minute, dialled often": [
        *worker("once", connected="1x29 0x1 1x90", websocket_reconnects_total__dial_failed="0x29 3 6x90"),
        *OTHER,
    ],
    "stopped with five tasks, started again": worker(
        "stopped",
        connected="1x30 _ 1x90",
        task_failures_total__backend__graceful_shutdown="0x29 5 _ 0x90",
        tasks_completed_total__failed="0x29 5 _ 0x90",
        tasks_completed_total__succeeded="1x30 _ 0x90",
    ),
    "cancelled, and cleaned up with trouble": worker(
        "cancelled",
        tasks_completed_total__cancelled="0+3x120",
        task_failures_total__cleanup__cleanup="0+3x120",
    ),
    "two failures in a quiet hour": worker(
        "quiet",
        tasks_completed_total__failed="0x29 1x5 2x90",
        task_failures_total__backend__container_exit="0x29 1x5 2x90",
    ),
    "one image that nobody has": worker(
        "typo", tasks_completed_total__succeeded="0+1x120", task_failures_total__backend__image_pull="0x29 1x90"
    ),
    "a pod is replaced by one of another address": [
        *gone(worker("moved", "10.0.0.1:9464")),
        *worker("moved", "10.0.0.2:9464", silent="_x20"),
    ],
    "scaled down": [*gone(worker("less")), *OTHER],
    "one of two with one name is full": [
        *worker("pool", "a:9464", tasks_active="4x120"),
        *worker("pool", "b:9464", tasks_active="1x120"),
    ],
    "one of two with one name is unlimited": [
        *worker("pool", "a:9464", tasks_active="4x120"),
        *worker("pool", "b:9464", limit=0, tasks_active="9x120"),
    ],
    "hands over to a runtime": worker("hand", backend="command", tasks_completed_total__dispatched="0+5x120"),
    "one dispatcher in thirty fails": worker(
        "hand",
        backend="command",
        tasks_completed_total__dispatched="0+3x120",
        task_failures_total__backend__dispatch_command="0x9 1x9 2x9 3x9 4x9 5x9 6x9 7x9 8x9 9x9 10x9 11x9",
    ),
    "drains": worker("drain", tasks_rejected_total__draining="0+1x120", tasks_rejected_total__one_shot="0+1x120"),
}


def expected(case: Case) -> dict[str, dict[int, dict[str, float]]]:
    def sample(alert: str, name: str) -> str:
        return f'{{alertname="{alert}"' + (f', worker_id="{name}"}}' if name else "}")

    return {FIRING: {at: {sample(*pair): 1.0 for pair in pairs} for at, pairs in case.fires.items()}}


@pytest.mark.parametrize("case", FAULTS.values(), ids=FAULTS)
def test_an_alert_fires_under_its_fault_alone(case: Case, tmp_path: Path) -> None:
    check_series(case.series, expected(case), tmp_path)


@pytest.mark.parametrize("series", HEALTHY.values(), ids=HEALTHY)
def test_no_alert_fires_without_a_fault(series: list[Series], tmp_path: Path) -> None:
    last = DAY if any("1440" in each.values or "838" in each.values for each in series) else 110
    check_series(series, expected(Case(series, {minute: set() for minute in range(2, last, 2)})), tmp_path)


def test_every_alert_has_a_fault_above() -> None:
    shown = {alert for case in FAULTS.values() for pairs in case.fires.values() for alert, _worker in pairs}
    assert shown == set(ALERTS)


@pytest.mark.parametrize("alert", ALERTS.values(), ids=ALERTS)
def test_every_alert_says_what_to_do_next(alert: dict[str, Any]) -> None:
    said = alert["annotations"]
    assert alert["labels"]["severity"] in ("critical", "warning", "info")
    assert set(said) == {"summary", "description", "runbook_url"}
    commands = re.findall(r"`([^`]+)`", said["description"])
    assert commands, "no command to run"
    for command in (each for each in commands if "-m oz_worker" in each):
        flags.parse(re.sub(r"\{\{.*?\}\}", "w", command).split("-m oz_worker ")[1].split())
    page, _, anchor = said["runbook_url"].partition("#")
    assert anchor in anchors(ROOT / page)


def anchors(page: Path) -> set[str]:
    """Where links into a page may lead: its headings, as GitHub and Grafana spell them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_promtool_finds_no_fault_in_the_files() -> None:
    promtool("check", "rules", str(RULES))
    promtool("check", "config", str(MONITORING / "prometheus.yml"))
