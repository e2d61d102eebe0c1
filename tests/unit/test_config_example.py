"""config.example.yaml is valid as it stands, and every key of the schema stands in it and nothing else."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from oz_worker.config import schema
from oz_worker.config.load import load
from oz_worker.config.nodes import parse
from oz_worker.config.reading import Reading
from oz_worker.settings import (
    CommandOptions,
    DirectOptions,
    DockerOptions,
    ExitAfter,
    KubernetesOptions,
    LinkOptions,
    Settings,
)

EXAMPLE = Path(__file__).parent.parent.parent / "config.example.yaml"
OPTIONS: dict[str, Any] = {
    "": Settings(worker_id="my-worker"),
    "link": LinkOptions(),
    "exit_after": ExitAfter(),
    "backend.direct": DirectOptions(),
    "backend.command": CommandOptions(),
    "backend.docker": DockerOptions(),
    "backend.kubernetes": KubernetesOptions(),
}


def test_the_example_loads_clean() -> None:
    settings, warnings, _ = load(argparse.Namespace(config_file=str(EXAMPLE)), {"WARP_API_KEY": "k"})
    assert warnings == ()
    assert settings.options == DirectOptions()


def uncommented() -> tuple[dict[str, schema.Given], Reading]:
    """Everything the example shows at once: `#key` and `#  deeper` are keys, `# prose` is prose."""
    text = re.sub(r"^( *)#(?=\S|  )", r"\1", EXAMPLE.read_text(), flags=re.MULTILINE)
    reading = Reading({"HOME": "/root", "SSH_AUTH_SOCK": "", "NPM_TOKEN": ""})
    tree = parse(text.encode(), "example", reading)
    assert tree is not None, reading.problems
    return schema.read(tree, reading), reading


def test_every_key_it_shows_is_known_and_every_known_key_is_shown() -> None:
    found, reading = uncommented()
    assert [line for line in reading.problems if "a second backend" not in line] == []
    assert reading.warnings == []
    known = set(schema.TOP) | {f"{group}.{key}" for group, section in schema.GROUPS.items() for key in section}
    known |= {f"backend.{name}.{key}" for name, section in schema.BACKENDS.items() for key in section}
    assert set(found) - {"backend"} == known


def test_the_defaults_it_shows_are_the_defaults() -> None:
    found, _ = uncommented()
    shown = 0
    for dotted, given in found.items():
        group, _, key = dotted.rpartition(".")
        default = getattr(OPTIONS[group], key, None) if dotted != "backend" else None
        if dotted not in ("worker_id", "exit_on_refusal") and isinstance(default, (int, float, str)) and default != "":
            assert given.value == default, dotted
            shown += 1
    assert shown > 50


def test_every_key_of_the_schema_is_an_option_and_every_option_has_a_key() -> None:
    sections = {"": schema.TOP, **schema.GROUPS}
    sections |= {f"backend.{name}": section for name, section in schema.BACKENDS.items()}
    without_key = {
        "": {"api_key", "backend", "options", "link", "exit_after"},
        "backend.kubernetes": {"environment"},  # -e alone; in the file it belongs into pod_template
    }
    for name, section in sections.items():
        assert set(section) == set(vars(OPTIONS[name])) - without_key.get(name, set()), name
