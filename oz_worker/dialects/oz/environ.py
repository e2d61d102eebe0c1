"""The environment every task has (oz.md 7, "Common"), and which of its values are secrets."""

from __future__ import annotations

from oz_worker.dialects.oz.frames import Assignment
from oz_worker.known import in_address
from oz_worker.ordinary import is_ordinary
from oz_worker.redact import held_in
from oz_worker.spellings import SHORTEST


def common(assignment: Assignment, *, server_root_url: str) -> dict[str, str]:
    """The variables in their order; `env_vars` come last and may override the others."""
    variables = {"TASK_ID": assignment.task_id, "GIT_TERMINAL_PROMPT": "0", "GH_PROMPT_DISABLED": "1"}
    if server_root_url:
        variables["WARP_SERVER_ROOT_URL"] = server_root_url
    variables.update(assignment.env_vars)
    return variables


def secrets(assignment: Assignment) -> tuple[str, ...]:
    """Values of `env_vars`, credentials in names of images, what may be one in the configuration of MCP servers."""
    given = assignment.env_vars.items()
    values = [value for name, value in given if len(value) >= SHORTEST and not is_ordinary(name, value)]
    for image in (assignment.docker_image, *(sidecar.image for sidecar in assignment.sidecars)):
        values += in_address(image)
    if assignment.config is not None:
        values += held_in(assignment.config.mcp_servers)
    return tuple(dict.fromkeys(values))
