"""Every key of the configuration file, with its kind. Defaults stand in `oz_worker.settings`, under the same names."""

from __future__ import annotations

from typing import Any, Mapping, NamedTuple

from oz_worker.config import docker_kinds as docker
from oz_worker.config import kinds
from oz_worker.config import kubernetes_kinds as kubernetes
from oz_worker.config.kinds import Kind, choice, duration, list_of, map_of, path, positive_duration, script, whole, word
from oz_worker.config.nodes import Entry, Node, Scalar, Table, describe
from oz_worker.config.reading import Reading, Wrong, listed, shown, suggest
from oz_worker.config.variables import environment


class Given(NamedTuple):
    """A value that somebody gave, and where."""

    value: Any
    origin: str


Section = Mapping[str, Kind]

TOP: Section = {
    "worker_id": kinds.worker_id,
    "cleanup": kinds.boolean,
    "max_concurrent_tasks": kinds.limit,
    "idle_on_complete": kinds.humantime,
    "api_key_file": path,
    "web_socket_url": kinds.url("wss", "ws"),
    "server_root_url": kinds.url("https", "http"),
    "session_sharing_server_url": kinds.url(),
    "control_plane": choice("oz", "cropscode"),
    "log_level": choice("debug", "info", "warn", "error", spellings={"warning": "warn"}),
    "log_format": choice("text", "json"),
    "log_file": path,
    "ca_file": path,
    "state_dir": kinds.directory,
    "instance_id": kinds.matching(r"[a-z0-9-]{1,40}", "[a-z0-9-]{1,40}"),
    "on_shutdown": choice("cancel", "drain", "preserve"),
    "stop_grace": duration,
    "drain_timeout": duration,
    "flush_timeout": duration,
    "task_timeout": duration,
    "one_shot": kinds.boolean,
    "exit_on_refusal": kinds.boolean,
    "task_output": choice("file", "log"),
    "task_log_max": kinds.size,
    "task_log_retention": duration,
    "keep_failed": duration,
    "min_free_disk": kinds.size,
    "min_free_inodes": whole(),
    "health_listen": kinds.listen,
}

EXIT_AFTER: Section = {"tasks": kinds.limit, "idle": duration, "uptime": duration}

LINK: Section = {
    "ping_interval": positive_duration,
    "dead_after": positive_duration,
    "write_timeout": positive_duration,
    "dial_timeout": positive_duration,
    "backoff_min": positive_duration,
    "backoff_max": positive_duration,
    "healthy_after": duration,
    "refused_backoff": positive_duration,
    "acknowledgement": choice("pong", "write"),
}

DIRECT: Section = {
    "workspace_root": kinds.directory,
    "target_dir": path,
    "oz_path": kinds.program,
    "setup_command": script,
    "teardown_command": script,
    "environment": environment,
    "setup_timeout": duration,
    "teardown_timeout": duration,
    "inherit_environment": list_of(kinds.matching(r"[^\s=]+", "NAME")),
    "mcp_config": choice("inline", "file"),
    "harness_config_dirs": map_of(path, empty=False),
    "cgroup": choice("auto", "off"),
}

COMMAND: Section = {
    "dispatch_command": script,
    "cancel_command": script,
    "dispatch_timeout": kinds.dispatch_timeout,
    "cancel_timeout": positive_duration,
    "environment": environment,
}

_PULL = {"always": "Always", "missing": "IfNotPresent", "never": "Never"}

DOCKER: Section = {
    "volumes": list_of(docker.volume),
    "environment": environment,
    "engine": choice("docker", "podman"),
    "engine_path": kinds.program,
    "image_pull_policy": choice("Always", "IfNotPresent", "Never", spellings=_PULL),
    "pull_timeout": duration,
    "pull_progress_timeout": duration,
    "command_timeout": positive_duration,
    "engine_down_timeout": duration,
    "platform": docker.platform,
    "default_image": docker.image,
    "sidecar_image": docker.image,
    "coding_cli_sidecars": map_of(docker.image, empty=False),
    "network": docker.network,
    "user": docker.user,
    "memory": docker.memory,
    "cpus": docker.cpus,
    "extra_hosts": list_of(docker.extra_host),
    "security_opt": list_of(docker.security_option),
    "pids_limit": kinds.limit,
    "sidecar_volume_retention": duration,
}

KUBERNETES: Section = {
    "namespace": kubernetes.namespace,
    "kubeconfig": path,
    "context": word,
    "kubectl_path": kinds.program,
    "default_image": docker.image,
    "image_pull_policy": choice("Always", "IfNotPresent", "Never"),
    "use_image_volumes": kinds.boolean,
    "preflight": kinds.boolean,
    "preflight_image": docker.image,
    "preflight_timeout": positive_duration,
    "preflight_resources": kubernetes.resources,
    "sidecar_image": docker.image,
    "coding_cli_sidecars": map_of(docker.image, empty=False),
    "setup_command": script,
    "teardown_command": script,
    "extra_labels": kubernetes.label_map,
    "extra_annotations": kubernetes.annotation_map,
    "active_deadline_seconds": whole(1, 2**63 - 1),
    "ttl_seconds_after_finished": whole(),
    "workspace_size_limit": kubernetes.quantity,
    "unschedulable_timeout": kinds.go_duration,
    "volume_mount_timeout": duration,
    "image_pull_timeout": duration,
    "api_timeout": positive_duration,
    "env_in_secret": kinds.boolean,
    "pod_template": kubernetes.pod_template,
}

BACKENDS: Mapping[str, Section] = {"docker": DOCKER, "kubernetes": KUBERNETES, "direct": DIRECT, "command": COMMAND}
GROUPS: Mapping[str, Section] = {"exit_after": EXIT_AFTER, "link": LINK}

OTHER_NAMES = {("backend.docker", "pull_policy"): "image_pull_policy"}
"""Keys that are another spelling of a key of the same section."""

IGNORED = {("", "collect_task_logs"): "is accepted and ignored: this worker never sends task output anywhere"}
"""Keys of the existing worker that mean nothing here."""

_KUBERNETES_RETIRED = {
    "image_pull_secret": "write pod_template: {imagePullSecrets: [{name: ...}]}",
    "service_account": "write pod_template: {serviceAccountName: ...}",
    "node_selector": "write pod_template: {nodeSelector: ...}",
    "tolerations": "write pod_template: {tolerations: ...}",
    "resources": "write them at the container named `task` in pod_template",
    "termination_grace_period_seconds": "write pod_template: {terminationGracePeriodSeconds: ...}",
    "environment": "write `env` at the container named `task` in pod_template, or use -e",
}
_INLINE_KEY = "a key does not belong in this file; put it in a file of its own (mode 0600) and name that with "
_INLINE_KEY += "`api_key_file`, or set WARP_API_KEY"
REFUSED = {("", name): _INLINE_KEY for name in ("api_key", "warp_api_key")} | {
    ("backend.kubernetes", name): f"this key is retired; {cure}" for name, cure in _KUBERNETES_RETIRED.items()
}
"""Keys that are refused with a cure of their own."""


def read(root: Table, reading: Reading) -> dict[str, Given]:
    """Every value of the file under its dotted name (`link.dead_after`, `backend.docker.volumes`); mistakes noted.

    The chosen section stands under `backend`; a section with nothing under it counts as absent.
    """
    found: dict[str, Given] = {}
    _read_section("", TOP, root, found, reading, groups=("backend", *GROUPS))
    for name, section in GROUPS.items():
        group = _mapping(root.entries.get(name), name, reading)
        if group is not None:
            _read_section(name, section, group, found, reading)
    backend = _mapping(root.entries.get("backend"), "backend", reading)
    if backend is not None:
        _read_backend(backend, found, reading)
    return found


def _read_backend(backend: Table, found: dict[str, Given], reading: Reading) -> None:
    chosen, absent = [], []
    for name, entry in backend.entries.items():
        if name not in BACKENDS:
            reading.problem(
                entry.place, f"unknown backend {shown(name)}{suggest(name, BACKENDS)}{_elsewhere('', name)}"
            )
        elif isinstance(entry.value, Scalar) and entry.value.type == "null":
            absent.append((name, entry.place))
        else:
            chosen.append((name, entry.place))
            table = _mapping(entry, f"backend.{name}", reading)
            if table is not None:
                _read_section(f"backend.{name}", BACKENDS[name], table, found, reading)
    for _, place in chosen[1:]:
        reading.problem(place, f"a second backend beside {chosen[0][0]!r} ({chosen[0][1]}); keep one of the two")
    if chosen:
        found["backend"] = Given(*chosen[0])
        return
    for name, place in absent:
        reading.warn(place, f"`{name}:` with nothing under it counts as absent; write `{name}: {{}}` to choose it")


def _mapping(entry: Entry | None, name: str, reading: Reading) -> Table | None:
    """The mapping of *entry*; None when there is nothing or something else, which is noted."""
    if entry is None or (isinstance(entry.value, Scalar) and entry.value.type == "null"):
        return None
    node: Node = entry.value
    if isinstance(node, Table):
        return node
    cure = "write its keys below it, indented"
    if name == "backend" and isinstance(node, Scalar) and node.text in BACKENDS:
        cure = f"write `{node.text}: {{}}` below it, indented"
    reading.problem(node.place, f"`{name}` is a section, not {describe(node)}; {cure}")
    return None


def _read_section(
    name: str, section: Section, table: Table, found: dict[str, Given], reading: Reading, groups: tuple[str, ...] = ()
) -> None:
    for key, entry in table.entries.items():
        if key in groups:
            continue
        if (name, key) in IGNORED:
            reading.warn(entry.place, f"`{key}` {IGNORED[name, key]}")
        elif (name, key) in REFUSED:
            reading.problem(entry.place, f"`{key}`: {REFUSED[name, key]}")
        else:
            _read_key(name, key, section, entry, found, reading, groups)


def _read_key(
    name: str,
    key: str,
    section: Section,
    entry: Entry,
    found: dict[str, Given],
    reading: Reading,
    groups: tuple[str, ...],
) -> None:
    target = OTHER_NAMES.get((name, key), key)
    if target not in section:
        hint = suggest(key, [*section, *groups]) or _elsewhere(name, key) or f"; known here: {listed(sorted(section))}"
        reading.problem(entry.place, f"unknown key {shown(key)}{f' in {name}' if name else ''}{hint}")
        return
    if isinstance(entry.value, Scalar) and entry.value.type == "null":
        return
    dotted = f"{name}.{target}" if name else target
    if dotted in found:
        reading.problem(entry.place, f"`{key}` says the same as the key at {found[dotted].origin}; keep one of the two")
        return
    try:
        found[dotted] = Given(section[target](entry.value, reading), entry.value.place)
    except Wrong as error:
        reading.problem(error.place or entry.value.place, f"`{key}`: {error}")
        reading.wrong.add(dotted)


def _elsewhere(name: str, key: str) -> str:
    """Where a key that is unknown here would be known."""
    places = [f"backend.{backend}" for backend, section in BACKENDS.items() if key in section]
    places += [group for group, section in GROUPS.items() if key in section]
    if name and key in TOP:
        places.insert(0, "the top level")
    if not name and key in BACKENDS:
        places.insert(0, "backend")
    return f"; it belongs in {listed(places)}" if places else ""
