"""The registry, its catalogue, and the page that Prometheus reads, to the letter."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path
from typing import Iterator

from hypothesis import given
from hypothesis import strategies as st

import oz_worker
from oz_worker import instruments
from oz_worker.engine import verdict
from oz_worker.meters import Instrument, Kind, Meters
from oz_worker.model import ExitFacts, Key, Reason
from oz_worker.observe.prometheus import exposition, number
from oz_worker.observe.resource import attributes

PACKAGE = Path(oz_worker.__file__).parent
SCOPE = (
    'otel_scope_name="github.com/warpdotdev/oz-agent-worker",otel_scope_schema_url="",otel_scope_version=""'  # as Go's
)


def full() -> Meters:
    """A registry in which everything has a value."""
    meters = Meters(instruments.CATALOGUE)
    for each in instruments.CATALOGUE:
        labels = {label: f'a "quoted" \\ {label}\nof two lines' for label in each.labels}
        if each.kind is Kind.HISTOGRAM:
            meters.observe(each.name, 0.3, **labels)
        else:
            meters.count(each.name, 1, **labels)
    return meters


def test_the_page_is_what_the_existing_workers_exporter_writes() -> None:
    """Order of families, series and labels, numbers, escapes, types, cumulative buckets, target_info."""
    meters = Meters(
        (
            Instrument("up_total", Kind.COUNTER, "Help with a \\ and\ntwo lines.", ("reason", "a")),
            Instrument("seconds", Kind.HISTOGRAM, "H.", ("zone",), unit="s", bounds=(0.0, 0.25, 5.0, 1e6)),
            Instrument("active", Kind.UP_DOWN, "A.", (), instruments.ONE),
            Instrument("nothing", Kind.GAUGE, "Never set."),
        )
    )
    meters.count("up_total", reason="b", a='say "hi"\\\n')
    meters.count("up_total", 2.5, reason="a", a="z")
    meters.count("up_total", 12_345_678, reason="a", a="y")
    for value in (0, 0.25, 0.26, 5, 7_000_000):
        meters.observe("seconds", value, zone="eu")
    page = exposition(
        meters.snapshot(), {"service.name": "s", "worker.id": 'w"', "a.b": "1", "a_b": "2", "9x": "\ud800"}
    )
    assert page == "".join(
        line.replace("SCOPE", SCOPE) + "\n"
        for line in (
            "# HELP active A.",
            "# TYPE active gauge",
            "active{SCOPE} 0",
            "# HELP seconds H.",
            "# TYPE seconds histogram",
            'seconds_bucket{SCOPE,zone="eu",le="0"} 1',
            'seconds_bucket{SCOPE,zone="eu",le="0.25"} 2',
            'seconds_bucket{SCOPE,zone="eu",le="5"} 4',
            'seconds_bucket{SCOPE,zone="eu",le="1e+06"} 4',
            'seconds_bucket{SCOPE,zone="eu",le="+Inf"} 5',
            'seconds_sum{SCOPE,zone="eu"} 7.00000551e+06',
            'seconds_count{SCOPE,zone="eu"} 5',
            "# HELP target_info Target metadata",
            "# TYPE target_info gauge",
            'target_info{a_b="1;2",key_9x="?",service_name="s",worker_id="w\\""} 1',
            "# HELP up_total Help with a \\\\ and\\ntwo lines.",
            "# TYPE up_total counter",
            'up_total{a="say \\"hi\\"\\\\\\n",SCOPE,reason="b"} 1',
            'up_total{a="y",SCOPE,reason="a"} 1.2345678e+07',
            'up_total{a="z",SCOPE,reason="a"} 2.5',
        )
    )


def test_promtool_finds_nothing_to_say_of_everything_there_is() -> None:
    resource, _ = attributes({}, version="1", worker_id="w", backend="direct")
    page = exposition(full().snapshot(), resource)
    done = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    for each in instruments.CATALOGUE:
        assert f"# TYPE {each.name} " in page


@given(st.floats())
def test_numbers_are_written_as_go_does_and_lose_nothing(value: float) -> None:
    text = number(value)
    if value != value:
        assert text == "NaN"
        return
    assert float(text) == value
    assert re.fullmatch(r"[+-]Inf|-?(\d{1,6}|\d{1,6}\.\d*[1-9]|\d(\.\d*[1-9])?e[+-]\d{2,3})", text), text


def test_the_existing_dashboards_find_everything_primed_at_its_name() -> None:
    """oz.md 14: names, kinds, labels, and 0 from the first scrape on for all but the histogram."""
    meters = Meters(instruments.CATALOGUE)
    known = {each.name.removeprefix("oz_worker_"): (each.kind, each.labels) for each in instruments.EXISTING}
    assert known == {
        "connected": (Kind.GAUGE, ()),
        "tasks_active": (Kind.UP_DOWN, ()),
        "tasks_max_concurrent": (Kind.GAUGE, ()),
        "tasks_claimed_total": (Kind.COUNTER, ()),
        "tasks_rejected_total": (Kind.COUNTER, ("reason",)),
        "tasks_completed_total": (Kind.COUNTER, ("result",)),
        "task_duration_seconds": (Kind.HISTOGRAM, ("result",)),
        "task_failures_total": (Kind.COUNTER, ("phase", "reason")),
        "websocket_reconnects_total": (Kind.COUNTER, ("reason",)),
        "info": (Kind.GAUGE, ("version", "backend", "worker_id")),
    }
    primed = {family.instrument.name: family for family in meters.snapshot()}
    failures = primed["oz_worker_task_failures_total"].points
    assert len(failures) == 3 * (len(Reason) + 1)  # and agent_oom
    results = primed["oz_worker_tasks_completed_total"].points
    assert [dict(point.labels)["result"] for point in results] == ["cancelled", "dispatched", "failed", "succeeded"]
    assert {point.value for family in primed.values() for point in family.points} == {0}
    assert primed["oz_worker_task_duration_seconds"].distributions == ()
    duration = primed["oz_worker_task_duration_seconds"].instrument
    assert duration.unit == "s"
    assert duration.bounds == (0, 5, 10, 25, 50, 75, 100, 250, 500, 750, 1000, 2500, 5000, 7500, 10000)


def _counted() -> Iterator[tuple[str, frozenset[str], str]]:
    """Name, labels and place of everything that the product counts, sets, observes or computes."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
                first = node.args[0]
                if isinstance(first, ast.Constant) and str(first.value).startswith("oz_worker_"):
                    labels = frozenset(str(keyword.arg) for keyword in node.keywords)
                    yield str(first.value), labels, f"{path.name}:{node.lineno}"


def test_what_is_counted_stands_in_the_catalogue_with_these_labels() -> None:
    """A name that is in no catalogue would be counted and never be seen."""
    known = {each.name: frozenset(each.labels) for each in instruments.CATALOGUE}
    found = list(_counted())
    wrong = [entry for entry in found if known.get(entry[0]) != entry[1]]
    assert wrong == []
    assert set(known) == {name for name, _, _ in found}


def test_a_reading_that_fails_or_has_nothing_to_say_is_absent_and_hurts_no_other() -> None:
    meters = Meters(instruments.CATALOGUE)
    meters.compute("oz_worker_slots_free", lambda: None)
    meters.compute("oz_worker_backend_up", lambda: 1 / 0)
    meters.compute("oz_worker_outbox_rows", lambda: 7)
    meters.count("a_name_that_nobody_knows")
    found = {family.instrument.name: family.points for family in meters.snapshot()}
    assert found["oz_worker_slots_free"] == found["oz_worker_backend_up"] == ()
    assert [point.value for point in found["oz_worker_outbox_rows"]] == [7]
    assert "a_name_that_nobody_knows" not in found


def test_a_label_outside_its_closed_set_is_counted_as_unknown_and_free_ones_are_free() -> None:
    """Whoever counts: a label may come from a database that somebody else wrote."""
    meters = Meters(instruments.CATALOGUE)
    before = {family.instrument.name: {point.labels for point in family.points} for family in meters.snapshot()}
    meters.count("oz_worker_task_failures_total", phase="backend", reason="")
    meters.count("oz_worker_task_failures_total", phase="backend", reason="task-4711")
    meters.observe("oz_worker_task_duration_seconds", 1, result="\n")
    meters.observe("oz_worker_image_pull_seconds", 1, result="failed")
    meters.set("oz_worker_info", 1, version="any", backend="thing", worker_id="at all")
    meters.compute("oz_worker_frames_refused_total", lambda: 3, kind="odd")
    found = {family.instrument.name: family for family in meters.snapshot()}
    failures = found["oz_worker_task_failures_total"].points
    assert [dict(point.labels) for point in failures if point.value == 2] == [{"phase": "backend", "reason": "unknown"}]
    assert {point.labels for point in failures} == before["oz_worker_task_failures_total"]
    for name, result in (("task_duration", "unknown"), ("image_pull", "failed")):
        (observed,) = found[f"oz_worker_{name}_seconds"].distributions
        assert observed.labels == (("result", result),)
    assert [dict(point.labels)["worker_id"] for point in found["oz_worker_info"].points] == ["at all"]
    assert meters.snapshot() == tuple(found.values())
    assert (("kind", "unknown"),) in {point.labels for point in found["oz_worker_frames_refused_total"].points}


def test_failures_are_told_apart_by_whose_they_are() -> None:
    """The labels that alerts go by: memory on the host, and whether the sandbox or the agent in it failed (#112)."""
    key = Key("t", "e")
    killed = ExitFacts(code=137, reason=Reason.AGENT_INVOCATION, oom=True)
    assert verdict.judge(key, killed, None).metric_reason == "agent_oom"
    assert verdict.judge(key, killed, None).report.reason is Reason.AGENT_INVOCATION  # the server knows no other
    for reason, agent_started, seconds, expected in (
        ("image_pull", False, 1800.0, True),
        ("unschedulable", False, 10.0, True),
        ("agent_invocation", False, 1.0, True),  # not launchable
        ("agent_invocation", True, 1.0, False),
        ("agent_oom", True, 1.0, False),
        ("evicted", True, 299.0, True),
        ("evicted", True, 301.0, False),
        ("graceful_shutdown", False, 1.0, False),
        ("task_timeout", False, 1.0, False),
        ("unknown", False, 1.0, False),  # accepted, and the worker was killed before its start
    ):
        assert verdict.failed_to_start(reason, agent_started=agent_started, seconds=seconds) == expected, reason


def test_the_resource_is_ours_then_the_operators() -> None:
    own = {"version": "2", "worker_id": "w", "backend": "docker"}
    found, warnings = attributes(
        {"OTEL_RESOURCE_ATTRIBUTES": "service.name=no, team = a%2Cb ,", "OTEL_SERVICE_NAME": " fleet "}, **own
    )
    assert (found["service.name"], found["team"], found["worker.backend"], warnings) == ("fleet", "a,b", "docker", [])
    for bad in ("team", "=x", "te am=x", "ok=1,team=%ff"):
        found, warnings = attributes({"OTEL_RESOURCE_ATTRIBUTES": bad}, **own)
        assert found == {
            "service.name": "oz-agent-worker",
            "service.version": "2",
            "worker.id": "w",
            "worker.backend": "docker",
        }
        assert len(warnings) == 1
        assert warnings[0].startswith("OTEL_RESOURCE_ATTRIBUTES is not used: ")
