"""Frames that come in: text to message. Pure, raises nothing whatever the text (oz.md 4, design 3.1)."""

from __future__ import annotations

from typing import Any, Mapping, NamedTuple, Union

from oz_worker.dialects.oz.fields import FieldFault, Fields, checked_text, kind_of, trim
from oz_worker.dialects.oz.go_json import DECODER, has_surrogate, member, raw_object, scrub, spans
from oz_worker.model import InstanceShape, Key, Sidecar

ID_BYTES = 1024
"""A longer id is not readable: every frame that answers must carry it within 64 KiB."""

DEEPEST = 100
"""Levels of nesting in a task. Deeper ones could overflow the small stacks of the threads that encode it again."""


class AgentConfig(NamedTuple):
    """What the worker needs of `agent_config_snapshot`, untrimmed; `mcp` is the finished JSON behind `--mcp`."""

    environment_id: str = ""
    model_id: str = ""
    profile_id: str = ""
    skill_spec: str = ""
    mcp: str = ""
    mcp_servers: Mapping[str, Any] = {}
    computer_use: bool | None = None
    idle_minutes: int = 0
    harness: str = ""
    bedrock_role: str = ""
    bedrock_region: str = ""
    public_access: str = ""
    snapshot_disabled: bool = False
    snapshot_upload_seconds: int = 0
    snapshot_script_seconds: int = 0


class Assignment(NamedTuple):
    """A usable `task_assignment`. `task_id` is what argv and TASK_ID say, `key.task_id` what reports say."""

    key: Key
    task_id: str
    title: str = ""
    team_owned: bool = False
    config: AgentConfig | None = None
    docker_image: str = ""
    sidecars: tuple[Sidecar, ...] = ()
    env_vars: Mapping[str, str] = {}
    extra_args: tuple[str, ...] = ()
    shape: InstanceShape = InstanceShape()
    document: Mapping[str, Any] = {}
    warnings: tuple[str, ...] = ()


class Invalid(NamedTuple):
    """An assignment that cannot be run although its id is readable; *sentence* names the field and the cure."""

    key: Key
    sentence: str


class Cancellation(NamedTuple):
    """A `task_cancellation`; an empty execution id means all of the task."""

    task_id: str
    execution_id: str


class Refused(NamedTuple):
    """A frame nothing can be done about. *kind* is one of few (a metric label); *detail* holds no values."""

    kind: str
    detail: str


Message = Union[Assignment, Invalid, Cancellation, Refused]


def decode(text: str) -> Message:
    """The message in *text*. Never raises."""
    try:
        envelope = DECODER.decode(text)
    except ValueError:
        return Refused("not_json", f"a text of {len(text)} characters that is no JSON")
    except RecursionError:
        return Refused("too_deep", f"a text of {len(text)} characters that is nested too deep to be read")
    if not isinstance(envelope, dict):
        return Refused("not_object", f"{kind_of(envelope)} where an object is needed")
    kind = member(envelope, "type")
    if not isinstance(kind, str):
        return Refused("no_type", "an object without a type")
    if kind not in ("task_assignment", "task_cancellation"):
        return Refused("unknown_type", f"type {kind[:40]!a}, which this version does not know")
    data = member(envelope, "data")
    if not isinstance(data, dict) or not _readable(member(data, "task_id")):
        return Refused("no_task_id", f"a {kind} without a readable task_id")
    return _assignment(data, text) if kind == "task_assignment" else _cancellation(data)


def _readable(value: Any) -> bool:
    """Whether *value* can be an id that we store and send back as it came."""
    return isinstance(value, str) and value != "" and not has_surrogate(value) and len(value.encode()) <= ID_BYTES


def _cancellation(data: dict[str, Any]) -> Cancellation | Refused:
    execution_id = member(data, "execution_id")
    if execution_id in (None, ""):
        return Cancellation(member(data, "task_id"), "")
    if not _readable(execution_id):
        # Taking it for "all executions" could end one that nobody asked to end.
        return Refused("bad_execution_id", "a task_cancellation whose execution_id is not readable")
    return Cancellation(member(data, "task_id"), execution_id)


def _assignment(data: dict[str, Any], text: str) -> Assignment | Invalid:
    key = Key(member(data, "task_id"))
    try:
        execution_id = member(data, "execution_id")
        if execution_id not in (None, ""):
            if not _readable(execution_id):
                raise FieldFault(f"execution_id is no text of at most {ID_BYTES} bytes")
            key = Key(key.task_id, execution_id)
        return _validated(key, Fields(data, "", []), text)
    except FieldFault as fault:
        sentence = f"The assignment cannot be run: {fault}; correct it where the task is made and run it again."
        return Invalid(key, sentence)


def _validated(key: Key, data: Fields, text: str) -> Assignment:
    """Raises FieldFault for the first field that cannot be used."""
    for name, value in (("task_id", key.task_id), ("execution_id", key.execution_id)):
        checked_text(value, name)  # both reach the environment of hooks and dispatchers
    warnings: list[str] = []
    document = data.value("task")
    if not isinstance(document, dict):
        raise FieldFault(f"task is {'missing or null' if document is None else kind_of(document)}")
    if _too_deep(document, text):
        raise FieldFault(f"task is nested more than {DEEPEST} levels deep")
    data = Fields(data.mapping, "", warnings)
    task = Fields(document, "task", warnings)
    task_id = task.text("id") or key.task_id
    if task_id != key.task_id:
        warnings.append("task.id differs from task_id: the agent is given task.id, reports carry task_id")
    title = task.value("title")
    owner = task.object("owner")
    return Assignment(
        key,
        task_id,
        title=scrub(title) if isinstance(title, str) else "",
        team_owned=owner is not None and owner.text("Type") == "TEAM",
        config=_config(task.object("agent_config_snapshot"), text),
        docker_image=data.text("docker_image"),
        sidecars=_sidecars(data),
        env_vars=data.variables("env_vars"),
        extra_args=data.texts("additional_oz_args"),
        shape=_shape(data.optional_object("instance_shape")),
        document=document,
        warnings=tuple(warnings),
    )


def _config(fields: Fields | None, text: str) -> AgentConfig | None:
    if fields is None:
        return None
    harness, sharing = fields.object("harness"), fields.object("session_sharing")
    servers = fields.object("mcp_servers")
    role, region = _bedrock(fields)
    return AgentConfig(
        environment_id=fields.text("environment_id"),
        model_id=fields.text("model_id"),
        profile_id=fields.text("profile_id"),
        skill_spec=fields.text("skill_spec"),
        mcp=_mcp(text, servers.path) if servers is not None and servers.mapping else "",
        mcp_servers=servers.mapping if servers is not None else {},
        computer_use=fields.flag("computer_use_enabled"),
        idle_minutes=fields.number("idle_timeout_minutes"),
        harness=harness.text("type") if harness is not None else "",
        bedrock_role=role,
        bedrock_region=region,
        public_access=sharing.text("public_access") if sharing is not None else "",
        snapshot_disabled=bool(fields.flag("snapshot_disabled")),
        snapshot_upload_seconds=fields.number("snapshot_upload_timeout_secs"),
        snapshot_script_seconds=fields.number("snapshot_script_timeout_secs"),
    )


def _bedrock(fields: Fields) -> tuple[str, str]:
    """Role and region, both empty when there is nothing to pass on."""
    providers = fields.object("inference_providers")
    aws = providers.object("aws") if providers is not None else None
    if aws is None or aws.flag("disabled"):
        return "", ""
    role, region = trim(aws.text("role_arn")), trim(aws.text("region"))
    if role and not region:
        aws.warn(f"{aws.where('region')} is missing: newer CLIs refuse a Bedrock role without a region; set it there")
    return role, region


def _mcp(text: str, where: str) -> str:
    """The argument behind `--mcp`, cut from the text of the frame so that nothing in it changes its spelling."""
    at = 0
    try:
        for name in ("data", "task", "agent_config_snapshot", "mcp_servers"):
            at, _ = member(spans(text, at), name)
        argument = raw_object(text, at)
    except (ValueError, RecursionError):  # the second only where the frame just so escaped it when it was decoded
        raise FieldFault(f"{where} holds NaN or Infinity, or stands in a message nested too deep") from None
    return checked_text(argument, where)


def _sidecars(data: Fields) -> tuple[Sidecar, ...]:
    """The agent's own image at /agent first, then the others in their order (oz.md 8)."""
    agent = data.text("sidecar_image")
    first = [Sidecar(agent, "/agent")] if agent else []
    others = [
        Sidecar(entry.text("image"), entry.text("mount_path"), bool(entry.flag("read_write")))
        for entry in data.objects("additional_sidecars")
    ]
    return tuple(first + others)


def _shape(fields: Fields | None) -> InstanceShape:
    if fields is None:
        return InstanceShape()
    return InstanceShape(max(0, fields.number("vcpus")), max(0, fields.number("memory_gb")))


def _too_deep(document: dict[str, Any], text: str) -> bool:
    """Whether anything in *document* lies more than DEEPEST levels down. Not recursive, for the reason it exists."""
    if text.count("{") + text.count("[") <= DEEPEST:
        return False
    layer: list[Any] = [document]
    for _ in range(DEEPEST):
        layer = [
            child
            for value in layer
            for child in (value.values() if isinstance(value, dict) else value)
            if isinstance(child, (dict, list))
        ]
        if not layer:
            return False
    return True
