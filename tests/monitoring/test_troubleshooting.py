"""docs/troubleshooting.md: whatever the worker can say has a place there, and every link into it leads somewhere."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest

from oz_worker import check
from oz_worker.config.load import Loaded
from oz_worker.errors import ExitCode
from oz_worker.instruments import CATALOGUE, REASONS
from oz_worker.model import Refusal
from oz_worker.settings import (
    BackendOptions,
    CommandOptions,
    DirectOptions,
    DockerOptions,
    KubernetesOptions,
    Settings,
)
from tests.monitoring.promtool import MONITORING, ROOT
from tests.monitoring.test_alerts import ALERTS, anchors
from tests.rig import Rig

PAGE = ROOT / "docs" / "troubleshooting.md"
TEXT = PAGE.read_text()
MONITORED = (ROOT / "docs" / "monitoring.md").read_text()


@pytest.mark.parametrize("reason", REASONS)
def test_every_failure_reason_has_a_heading_and_says_something(reason: str) -> None:
    section = re.search(rf"^### [^\n]*`{reason}`[^\n]*\n\n(\S[^\n]+)", TEXT, re.MULTILINE)
    assert section is not None
    assert len(section[1]) > 30


def test_no_heading_is_about_a_reason_that_does_not_exist() -> None:
    named = {reason for heading in re.findall(r"^### (.*`.*)$", TEXT, re.MULTILINE) for reason in heading.split("`")}
    assert {reason for reason in named if reason.strip(" ,")} == set(REASONS)


@pytest.mark.parametrize("refusal", Refusal, ids=lambda refusal: refusal.label)
def test_every_rejection_has_a_line_with_its_label_and_its_words(refusal: Refusal) -> None:
    assert re.search(rf"^\| `{refusal.label}` \| {refusal.wire} \| .{{10,}}", TEXT, re.MULTILINE)


def test_every_exit_code_has_a_line() -> None:
    section = TEXT.partition("\n## Exit codes")[2].partition("\n## ")[0]
    codes = {int(code) for row in re.findall(r"^\| ([\d, ]+) \|", section, re.MULTILINE) for code in row.split(",")}
    assert codes == {int(code) for code in ExitCode} | {130, 137, 143}


@pytest.mark.parametrize(
    "options", [DirectOptions(), DockerOptions(), KubernetesOptions(), CommandOptions(cancel_command="x")]
)
def test_the_table_of_check_has_its_tests_in_their_order_and_no_others(options: BackendOptions, tmp_path: Path) -> None:
    backend = type(options).__name__.removesuffix("Options").lower()
    settings = Settings(worker_id="w", backend=backend, options=options, state_dir=str(tmp_path))
    with contextlib.ExitStack() as stack:
        tests = [probe.name for probe in check._probes(Loaded(settings, (), {"api_key": "x"}), {}, stack)]
    table = TEXT.partition("\n## What check tries")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]+) \| (\w*) *\|", table, re.MULTILINE)
    assert [name for names, of in rows if of in ("", backend) for name in re.findall(r"`(\w+)`", names)] == tests


def test_every_metric_and_alert_is_explained() -> None:
    rows = dict(re.findall(r"^\| `(oz_worker_\w+)` \| [^|]* \|([^|]*)\|", MONITORED, re.MULTILINE))
    assert set(rows) == {each.name for each in CATALOGUE}
    assert [each.name for each in CATALOGUE for label in each.labels if f"`{label}`" not in rows[each.name]] == []
    severities = dict(re.findall(r"^\| `(OzWorker\w+)` \| .* \| (\w+) \|$", MONITORED, re.MULTILINE))
    assert severities == {name: rule["labels"]["severity"] for name, rule in ALERTS.items()}


def test_every_link_into_a_page_finds_its_heading() -> None:
    missing = []
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for file, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", page.read_text()):
            target = (page.parent / file).resolve() if file else page
            if anchor not in anchors(target):
                missing.append(f"{page.name}: {file}#{anchor}")
    assert missing == []


def test_every_shipped_file_is_named_in_the_page_about_monitoring() -> None:
    assert [path.name for path in MONITORING.iterdir() if f"deploy/monitoring/{path.name}" not in MONITORED] == []


def test_the_command_of_an_alert_works_beside_the_shipped_unit_once_its_file_names_the_state(rig: Rig) -> None:
    """systemd tells the place of the state to the worker, not to whoever asks about it."""
    del rig.config["state_dir"]
    worker = rig.start(env={"STATE_DIRECTORY": f"{rig.state_dir}:{rig.workspaces}"})
    rig.plane.down()
    worker.wait_log("disconnected|Next try in")  # the second when it was cut in its handshake
    told = ALERTS["OzWorkerDisconnected"]["annotations"]["description"]
    (command,) = re.findall(r"python -m oz_worker (status [^`]*)`", told)
    words = command.replace("FILE", str(rig.place / "config.yaml")).split()
    assert rig.run_command(*words).returncode == 3
    (cure,) = re.findall("write `(state_dir: .*)` into the file", worker.log)
    with (rig.place / "config.yaml").open("a") as file:
        file.write(f"{cure}\n")
    assert "link: disconnected for " in rig.run_command(*words).stdout
