"""What the documents and the shipped units say, held against the program."""

from __future__ import annotations

import configparser
import plistlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from oz_worker.config import flags, paths, schema
from oz_worker.config.load import load
from oz_worker.errors import ExitCode

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
SHIPPED = [*PAGES, *sorted(path for path in (ROOT / "deploy").rglob("*") if path.is_file())]
UNITS = sorted((ROOT / "deploy").glob("*.service"))
FOREIGN_FLAGS = {
    # of pip, make, systemd, useradd, docker, kubectl, oz, pytest and our scripts
    *("--no-index", "--find-links", "--wheel-dir", "--target", "--upgrade", "--system", "--create-home", "--home-dir"),
    *("--now", "--user", "--kill-whom", "--signal", "--host", "--run-id", "--mcp", "--runs", "--load", "--jobs"),
    *("--quick", "--only", "--directory", "--namespace", "--group-add", "--raw"),
}
ALL_TESTS = sorted((ROOT / "tests").rglob("*.py"))
OWED = {*range(1, 72), 73, 78}
"""The numbers of the failures for which a test must stand in docs/failures_of_the_predecessor.md."""


def own_flags() -> set[str]:
    names = {name for rows in flags._PER_COMMAND.values() for flag in rows for name in flag.names}
    return names | {"--version", "--help"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_that_exist(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", SHIPPED, ids=lambda page: page.name)
def test_every_flag_that_is_named_exists(page: Path) -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page.read_text()))
    assert named - own_flags() - FOREIGN_FLAGS == set()


@pytest.mark.parametrize("page", SHIPPED, ids=lambda page: page.name)
def test_every_file_of_ours_that_is_named_exists(page: Path) -> None:
    ours = "oz_worker|tests|scripts|docs|deploy|config|engine|link|dialects|backends|observe|devplane"
    named = re.findall(rf"`((?:{ours})/[\w./]*)`", page.read_text())
    missing = [name for name in named if not (ROOT / name).exists() and not (ROOT / "oz_worker" / name).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_example_configuration_loads(page: Path, tmp_path: Path) -> None:
    for number, text in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)):
        document = {"worker_id": "example", **yaml.safe_load(text)}
        document.pop("api_key_file", None)  # names a file of the reader's machine
        path = tmp_path / f"{number}.yaml"
        path.write_text(yaml.safe_dump(document))
        loaded = load(flags.parse(["--config-file", str(path)]), {"WARP_API_KEY": "wk-1", "HOME": str(tmp_path)})
        assert loaded.warnings == ()


def test_the_readme_has_every_exit_code_and_command() -> None:
    readme = (ROOT / "README.md").read_text()
    table = {int(code) for row in re.findall(r"^\| ([\d, ]+) \|", readme, re.MULTILINE) for code in row.split(",")}
    assert table == {int(code) for code in ExitCode} | {130, 143}
    assert [command for command in flags.COMMANDS if not re.search(rf"\b{command}\b", readme)] == []


def test_every_key_of_the_configuration_stands_in_the_example() -> None:
    example = (ROOT / "config.example.yaml").read_text()
    keys = {
        *schema.TOP,
        *schema.LINK,
        *schema.EXIT_AFTER,
        *schema.DIRECT,
        *schema.COMMAND,
        *schema.DOCKER,
        *schema.KUBERNETES,
    }
    assert [key for key in keys if not re.search(rf"^[# ]*{key}:", example, re.MULTILINE)] == []


@pytest.mark.parametrize(
    "flags_given",
    [("--control-plane", "cropscode")],
    ids=" ".join,
)
def test_what_is_not_in_this_version_is_refused_in_one_sentence(flags_given: tuple[str, ...], tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("worker_id: example\nbackend: {direct: {oz_path: /bin/true}}\n")
    command = [sys.executable, "-m", "oz_worker", "--config-file", str(config), "--state-dir", str(tmp_path / "state")]
    environment = {"WARP_API_KEY": "wk-1", "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [*command, *flags_given], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    said = [line for line in done.stderr.splitlines() if "not in this version" in line]
    assert (done.returncode, len(said)) == (ExitCode.NOT_USABLE, 1), done.stderr
    assert "Traceback" not in done.stderr


def named_tests(text: str) -> list[tuple[str, str]]:
    """File and name of each test in *text*: `test_file.py::test_name`, or `::test_name` for one more of that file."""
    file, found = "", []
    for named, test in re.findall(r"`([\w/]*\.py)?::(\w+)`", text):
        file = named or file
        found.append((file, test))
    return found


def missing(named: list[tuple[str, str]]) -> list[str]:
    """Those of the tests that no file of that name has; several directories may have one."""
    absent = []
    for file, test in named:
        texts = [path.read_text() for path in ALL_TESTS if file and path.as_posix().endswith(f"/{file}")]
        if not any(re.search(rf"^ *def {test}\(", text, re.MULTILINE) for text in texts):
            absent.append(f"{file}::{test}")
    return absent


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_a_page_names_exists(page: Path) -> None:
    assert missing([found for line in page.read_text().splitlines() for found in named_tests(line)]) == []


def test_every_failure_of_the_predecessor_names_the_tests_that_show_what_holds() -> None:
    table = (ROOT / "docs" / "failures_of_the_predecessor.md").read_text()
    shown = {int(row[1]): named_tests(row[0]) for row in re.finditer(r"^\| (\d+) \|.*$", table, re.MULTILINE)}
    assert set(shown) == OWED
    assert [number for number, named in shown.items() if not named] == []


def test_no_page_promises_something_for_later() -> None:
    assert [page.name for page in SHIPPED if re.search(r"\b(TODO|TBD|FIXME)\b", page.read_text())] == []


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_the_units_spare_running_tasks(unit: Path) -> None:
    parser = configparser.ConfigParser(strict=True, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(unit.read_text())
    service = parser["Service"]
    assert (service["KillMode"], service["OOMPolicy"], service["Delegate"]) == ("process", "continue", "yes")
    assert (service["Type"], service["LimitCORE"]) == ("notify", "0:infinity")
    assert service["WatchdogSec"]
    assert "--on-shutdown preserve" in service["ExecStart"]
    assert "-m oz_worker --config-file" in service["ExecStart"]


def test_the_state_of_the_service_is_found_beside_it() -> None:
    """The unit, the file that the page shows and the place where `status` looks by itself are one."""
    first = re.findall(r"^StateDirectory=(\S+)", UNITS[0].read_text(), re.MULTILINE)[0]
    assert f"/var/lib/{first}" == paths.SERVICE_STATE
    operations = (ROOT / "docs" / "operations.md").read_text()
    assert f"`state_dir: {paths.SERVICE_STATE}`" in operations


def test_there_are_units() -> None:
    assert len(UNITS) == 2


def test_the_launchd_agent_spares_running_tasks() -> None:
    agent = plistlib.loads((ROOT / "deploy" / "com.oz-worker.plist").read_bytes())
    assert agent["AbandonProcessGroup"] is True
    assert agent["KeepAlive"] == {"SuccessfulExit": False}
    words = agent["ProgramArguments"]
    assert words[words.index("--on-shutdown") + 1] == "preserve"
    flags.parse(words[words.index("oz_worker") + 1 :])


def test_the_lines_for_cron_are_command_lines_of_ours() -> None:
    lines = [
        line for line in (ROOT / "deploy" / "crontab.example").read_text().splitlines() if line[:1] in "0123456789*"
    ]
    jobs = [line.split("-m oz_worker ")[1].split(" 2>")[0].split() for line in lines if "-m oz_worker" in line]
    assert len(jobs) == 3
    for words in jobs:
        assert flags.parse(words).instance_id
