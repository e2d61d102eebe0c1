"""The environment every task has (oz.md 7, "Common"), and which of its values are secrets."""

from __future__ import annotations

from oz_worker.dialects.oz.frames import Assignment
from oz_worker.redact import SHORTEST, held_in


def common(assignment: Assignment, *, server_root_url: str) -> dict[str, str]:
    """The variables in their order; `env_vars` come last and may override the others."""
    variables = {"TASK_ID": assignment.task_id, "GIT_TERMINAL_PROMPT": "0", "GH_PROMPT_DISABLED": "1"}
    if server_root_url:
        variables["WARP_SERVER_ROOT_URL"] = server_root_url
    variables.update(assignment.env_vars)
    return variables


def secrets(assignment: Assignment) -> tuple[str, ...]:
    """What must never be shown: all values of `env_vars`, and what may be one in the configuration of MCP servers."""
    values = [value for value in assignment.env_vars.values() if len(value) >= SHORTEST]
    if assignment.config is not None:
        values += held_in(assignment.config.mcp_servers)
    return tuple(dict.fromkeys(values))
