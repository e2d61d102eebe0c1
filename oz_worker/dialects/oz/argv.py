"""The `oz` command line of a task: oz.md section 6, in its order, to the letter."""

from __future__ import annotations

from oz_worker.dialects.oz.fields import trim
from oz_worker.dialects.oz.frames import AgentConfig, Assignment

_PUBLIC = {"VIEWER": "public:view", "EDITOR": "public:edit"}


def compose(
    assignment: Assignment, *, server_root_url: str, session_sharing_server_url: str, idle_on_complete: str
) -> tuple[str, ...]:
    """What follows the program, from `agent` on. The URL of the server is passed even when it is empty."""
    args = ["agent", "run"]
    if assignment.team_owned:
        args += ["--share", "team:edit"]
    args += ["--task-id", assignment.task_id, "--sandboxed", "--server-root-url", server_root_url]
    if assignment.config is not None:
        args += _from_config(assignment.config)
    args += assignment.extra_args
    args += _idle(assignment.config, idle_on_complete)
    if session_sharing_server_url:
        args += ["--session-sharing-server-url", session_sharing_server_url]
    return tuple(args)


def _from_config(config: AgentConfig) -> list[str]:
    # Only emission trims: a harness of " oz " counts as another one for the model and for computer use.
    is_oz = config.harness in ("", "oz")
    computer_use = is_oz if config.computer_use is None else config.computer_use
    args = _option("--model", trim(config.model_id) if is_oz else "")
    args += _option("--profile", trim(config.profile_id))
    args += _option("--skill", trim(config.skill_spec))
    args += _option("--mcp", config.mcp)
    args.append("--computer-use" if computer_use else "--no-computer-use")
    if config.bedrock_role:
        args += ["--bedrock-inference-role", config.bedrock_role]
        args += _option("--bedrock-role-region", config.bedrock_region)
    args += _option("--harness", trim(config.harness))
    args += _option("--share", _PUBLIC.get(config.public_access, ""))
    if config.snapshot_disabled:
        args.append("--no-snapshot")
    args += _seconds("--snapshot-upload-timeout", config.snapshot_upload_seconds)
    args += _seconds("--snapshot-script-timeout", config.snapshot_script_seconds)
    return args + _option("--environment", trim(config.environment_id))


def _option(flag: str, value: str) -> list[str]:
    return [flag, value] if value else []


def _seconds(flag: str, seconds: int) -> list[str]:
    return [flag, f"{seconds}s"] if seconds > 0 else []


def _idle(config: AgentConfig | None, worker_value: str) -> list[str]:
    """The task's own minutes, else the worker's value, else the bare flag, which `oz` reads as 45 minutes."""
    if config is not None and config.idle_minutes > 0:
        return ["--idle-on-complete", f"{config.idle_minutes}m"]
    return ["--idle-on-complete", worker_value] if worker_value else ["--idle-on-complete"]
