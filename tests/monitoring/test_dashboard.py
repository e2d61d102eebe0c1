"""The shipped dashboard: every query is PromQL, asks for what workers export, and shows it when there is any."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Iterator

import pytest
import yaml

from oz_worker.instruments import CATALOGUE
from oz_worker.meters import Instrument, Kind
from tests.monitoring.promtool import MONITORING, ROOT, RULES, Series, check_series, histogram, promtool, worker
from tests.monitoring.test_alerts import anchors

BOARD: dict[str, Any] = json.loads((MONITORING / "oz-worker.dashboard.json").read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
VARIABLES = {variable["name"]: variable for variable in BOARD["templating"]["list"]}
KNOWN = {each.name: each for each in CATALOGUE}
TARGET_LABELS = {"job", "instance", "le"}
"""What Prometheus itself adds."""
DEFINED = {rule.get("record") for rule in yaml.safe_load(RULES.read_text())["groups"][0]["rules"]}
MINUTES = 60


def expressions() -> Iterator[tuple[str, str]]:
    """Panel and query, with Grafana's variables filled in as it does for a choice of all and of one."""
    for panel in PANELS:
        for target in panel["targets"]:
            for workers in (".*", "(busy|other\\\\.one|calm)"):
                text = target["expr"].replace("$__rate_interval", "5m").replace("$__range", "1h")
                yield panel["title"], text.replace("$worker", workers).replace("$backend", ".*")


def pages() -> Iterator[tuple[str, str]]:
    """Everything that holds PromQL for people: where, and the query."""
    yield from expressions()
    for rule in yaml.safe_load(RULES.read_text())["groups"][0]["rules"]:
        yield rule.get("alert", rule.get("record")), rule["expr"]
    for text in re.findall(r"```promql\n(.*?)```", (ROOT / "docs" / "monitoring.md").read_text(), re.DOTALL):
        for query in filter(None, (line.partition(" # ")[0].strip() for line in text.splitlines())):
            yield "docs/monitoring.md", query


def unknown(query: str) -> Iterator[str]:
    """What *query* names and no worker has: metrics, labels, values of labels."""
    labels = {label for each in CATALOGUE for label in each.labels} | TARGET_LABELS
    for metric, inside in re.findall(r"\b(oz_worker_\w+)(?:\{([^}]*)\})?", query):
        each = _instrument(metric)
        if each is None:
            yield metric
            continue
        for label, values in re.findall(r'(\w+)\s*(?:=~|!=|!~|=)\s*"([^"]*)"', inside):
            if label not in (*each.labels, *TARGET_LABELS):
                yield f"{metric}.{label}"
            elif each.primed:
                primed = {marked[each.labels.index(label)] for marked in each.primed}
                yield from (f"{metric}.{label}={value}" for value in values.split("|") if value not in primed)
    for listed in re.findall(r"\b(?:by|on|without|group_left)\s*\(([^)]*)\)", query):
        yield from (label for label in re.findall(r"\w+", listed) if label not in labels)
    yield from (name for name in re.findall(r"\boz_worker:[\w:]+", query) if name not in DEFINED)


def _instrument(metric: str) -> Instrument | None:
    """The instrument of a series' name; a histogram has no series of its own name."""
    found = KNOWN.get(metric)
    if found is not None:
        return None if found.kind is Kind.HISTOGRAM else found
    of = KNOWN.get(re.sub(r"_(bucket|sum|count)$", "", metric))
    return of if of is not None and of.kind is Kind.HISTOGRAM else None


def test_everything_that_is_asked_for_is_exported() -> None:
    assert sorted({f"{where}: {name}" for where, query in pages() for name in unknown(query)}) == []


@pytest.mark.parametrize(
    "wrong",
    [
        "oz_worker_conected",
        "oz_worker_task_duration_seconds",
        'oz_worker_tasks_rejected_total{cause="disk"}',
        'oz_worker_tasks_rejected_total{reason=~"disk|full"}',
        "sum by (worker) (oz_worker_connected)",
        "oz_worker:nothing",
    ],
)
def test_a_name_that_nobody_exports_is_found(wrong: str) -> None:
    assert len(list(unknown(wrong))) == 1


def test_every_metric_of_ours_is_on_the_dashboard() -> None:
    shown = " ".join(query for _title, query in expressions())
    absent = [name for name in KNOWN if not re.search(rf"\b{name}(_bucket|_sum|_count)?\b", shown)]
    assert absent == []


def test_every_query_is_promql(tmp_path: Path) -> None:
    rules = [{"record": f"query:{number}", "expr": query} for number, (_where, query) in enumerate(pages())]
    path = tmp_path / "queries.yml"
    path.write_text(json.dumps({"groups": [{"name": "queries", "rules": rules}]}))
    promtool("check", "rules", str(path))


def busy(name: str, instance: str, limit: int = 4) -> list[Series]:
    """A worker to which everything happens all the time."""
    series = worker(name, instance, limit=limit, minutes=MINUTES)
    counters = {each.name for each in CATALOGUE if each.kind is Kind.COUNTER}
    found = [each._replace(values=f"0+1x{MINUTES}") if each.metric in counters else each for each in series]
    target = {"job": "oz-worker", "instance": instance}
    if limit:
        found.append(Series("oz_worker_slots_free", target, f"3x{MINUTES}"))
    for each in (each for each in CATALOGUE if each.kind is Kind.HISTOGRAM):
        labels = dict.fromkeys(each.labels, "succeeded")
        found += histogram(each.name, instance, MINUTES, **labels)
    return found


def test_every_panel_shows_something_and_none_trips_over_several_workers(tmp_path: Path) -> None:
    series = [*busy("busy", "a:9464"), *busy("busy", "b:9464"), *busy("other.one", "c:9464", limit=0)]
    # Disconnected workers have a panel of their own.
    series += worker("other.one", "d:9464", minutes=MINUTES, connected=f"0x{MINUTES}")
    # A pushed series of the version before the upgrade.
    series += [each for each in worker("busy", "a:9464", version="0.0.9", minutes=MINUTES) if "info" in each.metric]
    check_series(series, {f"count({query}) > bool 0": {50: {"{}": 1.0}} for _title, query in expressions()}, tmp_path)


def test_a_fleet_to_which_nothing_happened_shows_no_nonsense(tmp_path: Path) -> None:
    shown = dict(expressions())
    failed, disconnected = shown["Failed, of those that ended"], shown["Workers not connected"]
    check_series(worker("calm", minutes=MINUTES), {failed: {50: {}}, disconnected: {50: {"{}": 0.0}}}, tmp_path)


def test_the_dashboard_can_be_provisioned() -> None:
    assert BOARD["uid"] == "oz-worker"
    assert "id" not in BOARD  # an id belongs to one Grafana; `__inputs` would ask a person
    assert "__inputs" not in BOARD
    assert {name: variable["type"] for name, variable in VARIABLES.items()} == {
        "datasource": "datasource",
        "backend": "query",
        "worker": "query",
    }
    assert [VARIABLES[name]["definition"] for name in ("backend", "worker")] == [
        "label_values(oz_worker_info, backend)",
        'label_values(oz_worker_info{backend=~"$backend"}, worker_id)',
    ]
    numbers = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(numbers)) == len(numbers)
    for panel in PANELS:
        assert panel["title"]
        assert panel["description"]
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
        for page, anchor in re.findall(r"(docs/\w+\.md)#([\w-]+)", panel["description"]):
            assert anchor in anchors(ROOT / page)


def test_no_panel_lies_over_another() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not taken & cells, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
