"""A task's variables and arguments on their way into a pod, so that each arrives as it is.

The kubelet replaces `$(NAME)` and `$$` in commands, arguments and values of variables, but not in what comes from a
Secret. So every `$` of ours is doubled, and nothing in a Secret is.
"""

from __future__ import annotations

import base64
import re
from typing import Any, Mapping, NamedTuple

from oz_worker.backends.container_order import WORKSPACE
from oz_worker.backends.environ import doubled
from oz_worker.backends.job_scripts import ENVIRONMENT_FILE
from oz_worker.model import TaskSpec
from oz_worker.settings import KubernetesOptions

MCP_VARIABLE = "OZ_WORKER_MCP"
"""Brings the JSON behind `--mcp` from the Secret into the arguments; the wrapper forgets it at once."""
_SECRET_KEY = re.compile(r"[-._a-zA-Z0-9]{1,200}")


class Hidden(NamedTuple):
    """What stands in a task's Secret: `keys` has the key of each variable, `data` the value of each key."""

    keys: Mapping[str, str]
    data: Mapping[str, str]


def escaped(text: str) -> str:
    """*text* as the kubelet must read it to give the container exactly *text*."""
    return text.replace("$", "$$")


def hidden(options: KubernetesOptions, unit_name: str, spec: TaskSpec) -> Hidden:
    """What goes into the Secret of the unit; nothing without `env_in_secret`.

    The keys carry the unit's name: a pod that still finds the Secret of an earlier attempt waits for its own, instead
    of starting with old values. Raises ValueError for a variable that no container can be given.
    """
    if not options.env_in_secret:
        return Hidden({}, {})
    values = {**_given(options, spec), **({MCP_VARIABLE: spec.mcp} if _mcp_at(spec) else {})}
    keys = {
        name: f"{unit_name}.{name if _SECRET_KEY.fullmatch(name) else number}" for number, name in enumerate(values)
    }
    return Hidden(keys, {keys[name]: base64.b64encode(value.encode()).decode() for name, value in values.items()})


def arguments(spec: TaskSpec, away: Hidden) -> list[str]:
    """The agent's arguments. Raises ValueError for one that no program can be given."""
    found = [escaped(_text(argument, f"argument {number}")) for number, argument in enumerate(spec.argv, 1)]
    if MCP_VARIABLE in away.keys:
        found[_mcp_at(spec)] = f"$({MCP_VARIABLE})"
    return found


def variables(options: KubernetesOptions, spec: TaskSpec, away: Hidden, secret_name: str) -> list[dict[str, Any]]:
    """The entries of `env` that the worker sets, in the order of oz.md 7; what is *away* refers to the Secret."""
    own = doubled(
        {
            "OZ_ENVIRONMENT_FILE": ENVIRONMENT_FILE,
            "OZ_WORKSPACE_ROOT": WORKSPACE,
            "OZ_WORKER_BACKEND": "kubernetes",
            "OZ_RUN_ID": spec.run_id,
        }
    )
    given = {**_given(options, spec), **({MCP_VARIABLE: ""} if MCP_VARIABLE in away.keys else {})}
    entries = []
    for name, value in {**given, **own}.items():
        if name in away.keys and name not in own:
            reference = {"name": secret_name, "key": away.keys[name]}
            entries.append({"name": name, "valueFrom": {"secretKeyRef": reference}})
        else:
            entries.append({"name": name, "value": escaped(value)})
    return entries


def _given(options: KubernetesOptions, spec: TaskSpec) -> dict[str, str]:
    """The task's variables and those of `-e`, which win, each once."""
    given = {**spec.environment, **options.environment}
    for name, value in given.items():
        if not name or "=" in name:
            raise ValueError(f"a variable cannot have the name {name!r}; give it one without an equals sign")
        _text(name, "the name of a variable")
        _text(value, f"the variable {name}")
    return given


def _mcp_at(spec: TaskSpec) -> int:
    """Where in the arguments the JSON of MCP stands; 0, which it never is, for nowhere."""
    places = (at for at in range(1, len(spec.argv)) if spec.argv[at - 1 : at + 1] == ("--mcp", spec.mcp))
    return next(places, 0) if spec.mcp else 0


def _text(value: str, what: str) -> str:
    if "\0" in value:
        raise ValueError(f"{what} has a NUL byte in it; remove it")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} is not valid UTF-8, which is all that Kubernetes takes; encode it") from None
    return value
