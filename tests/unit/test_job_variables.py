"""Variables and arguments arrive in a container literally, and in no Job where they are to be in a Secret."""

from __future__ import annotations

import base64
import re
from typing import Any, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oz_worker.backends import job_object
from oz_worker.backends.base import Unit
from oz_worker.backends.job_env import MCP_VARIABLE, escaped
from oz_worker.model import Reason
from oz_worker.settings import KubernetesOptions
from tests.unit.job_orders import KEY, MCP, PLAIN, UNIT, WHOSE, job, named, names, refused, secret, spec


def expanded(text: str, known: Mapping[str, str]) -> str:
    """What a kubelet makes of *text*, by the words of Kubernetes' documentation of variables in commands.

    `$(NAME)` stands for the variable, where there is one; `$$` is a `$` that begins no reference; all else stays.
    """
    found, at = "", 0
    while at < len(text):
        close = text.find(")", at)
        if text.startswith("$$", at):
            found, at = found + "$", at + 2
        elif text.startswith("$(", at) and close > 0:
            name = text[at + 2 : close]
            found, at = found + known.get(name, f"$({name})"), close + 1
        else:
            found, at = found + text[at], at + 1
    return found


SIGNS = st.text(st.sampled_from("$()AB {}\\'\"\nü"), max_size=30)


@settings(deadline=None)
@given(SIGNS | st.text())
def test_an_escaped_text_arrives_literally(text: str) -> None:
    assert expanded(escaped(text), {"A": "wrong", "B": "wrong", "": "wrong"}) == text


@settings(deadline=None)
@given(argv=st.lists(SIGNS, max_size=4), values=st.dictionaries(st.sampled_from("ABCD"), SIGNS), hide=st.booleans())
def test_what_a_container_is_given_is_what_was_meant(argv: list[str], values: dict[str, str], hide: bool) -> None:
    options = KubernetesOptions(env_in_secret=hide, setup_command="s $$ $(A)")
    wanted = spec(argv=("agent", *argv, "--mcp", MCP), mcp=MCP, environment=values, sidecars=())
    unit = Unit(UNIT, "inst", KEY, wanted)
    made = job_object.job(options, unit, wanted, **WHOSE)["spec"]["template"]["spec"]
    kept = job_object.secret(options, unit, wanted, job_uid="u", **WHOSE)
    seen: dict[str, str] = {}
    for entry in named(made["containers"])["env"]:
        if "valueFrom" in entry:
            assert kept is not None
            reference = entry["valueFrom"]["secretKeyRef"]
            assert reference["name"] == kept["metadata"]["name"]
            seen[entry["name"]] = base64.b64decode(kept["data"][reference["key"]]).decode()
        else:
            seen[entry["name"]] = expanded(entry["value"], seen)
    assert {name: seen[name] for name in values} == values
    assert [expanded(each, seen) for each in named(made["containers"])["args"]] == ["agent", *argv, "--mcp", MCP]
    assert expanded(named(made["initContainers"], "setup")["command"][2], seen) == "s $$ $(A)"
    assert (kept is not None) == hide


def test_with_a_secret_nothing_of_the_task_s_variables_stands_in_the_job() -> None:
    options = KubernetesOptions(env_in_secret=True, setup_command="true", environment={"E": "operators"})
    hidden: dict[str, Any] = {
        "environment": {"TOKEN": "hush-hush", "odd name/": "also hushed"},
        "argv": ("agent", "--mcp", MCP),
    }
    made = job(options, mcp=MCP, **hidden)
    for value in ("hush", "operators", "TASK_ID) $", escaped(MCP)):
        assert value not in repr(made)
    task = named(made["spec"]["template"]["spec"]["containers"])
    assert task["args"] == ["agent", "--mcp", f"$({MCP_VARIABLE})"]
    assert task["command"][2].startswith(f"unset {MCP_VARIABLE}\n")
    setup = named(made["spec"]["template"]["spec"]["initContainers"], "setup")
    assert MCP_VARIABLE not in names(setup["env"])
    kept = secret(options, mcp=MCP, **hidden)
    assert kept is not None
    assert kept["immutable"] is True
    assert kept["metadata"]["name"] == made["metadata"]["name"]
    assert kept["metadata"]["labels"] == made["metadata"]["labels"]
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": made["metadata"]["name"], "uid": "uid-1"}
    assert kept["metadata"]["ownerReferences"] == [owner]
    assert all(re.fullmatch(r"[-._a-zA-Z0-9]+", name) and name.startswith(f"{UNIT}.") for name in kept["data"])


def test_without_variables_or_without_the_option_there_is_no_secret() -> None:
    assert secret(PLAIN) is None
    assert secret(KubernetesOptions(env_in_secret=True), environment={}) is None


@pytest.mark.parametrize("hide", [False, True])
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"environment": {"": "x"}}, "a variable cannot have the name ''"),
        ({"environment": {"A=B": "x"}}, "a variable cannot have the name 'A=B'"),
        ({"environment": {"A": "x\0"}}, "the variable A has a NUL byte in it; remove it"),
        ({"environment": {"A": "\udcff"}}, "the variable A is not valid UTF-8"),
        ({"argv": ("agent", "x\0")}, "argument 2 has a NUL byte in it"),
    ],
)
def test_what_no_container_can_be_given_is_named(hide: bool, changes: dict[str, Any], told: str) -> None:
    reason, detail = refused(KubernetesOptions(env_in_secret=hide), **changes)
    assert reason is Reason.JOB_CREATE
    assert told in detail
