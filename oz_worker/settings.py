"""Frozen option classes: what each part is told. Parts get the values they need, never the whole configuration.

Durations are floats of seconds (0 = off or unlimited), sizes are bytes. Names are those of the YAML keys
(`names.md` of the design and the existing worker's), so that a reader finds one from the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Mapping, Union

from oz_worker.redact import Secret

WEB_SOCKET_URL = "wss://oz.warp.dev/api/v1/selfhosted/worker/ws"
SERVER_ROOT_URL = "https://app.warp.dev"
MIB = 1024 * 1024


@dataclass(frozen=True)
class LinkOptions:
    """`link.`: timing of the connection."""

    ping_interval: float = 20.0
    dead_after: float = 40.0
    write_timeout: float = 10.0
    dial_timeout: float = 30.0
    backoff_min: float = 1.0
    backoff_max: float = 60.0
    healthy_after: float = 10.0
    refused_backoff: float = 60.0
    acknowledgement: str = "pong"


@dataclass(frozen=True)
class ExitAfter:
    """`exit_after.`: each one that is set means drain, then exit 0."""

    tasks: int = 0
    idle: float = 0.0
    uptime: float = 0.0


@dataclass(frozen=True)
class DirectOptions:
    """`backend.direct.`"""

    workspace_root: str = "/var/lib/oz/workspaces"
    target_dir: str = ""
    oz_path: str = ""
    setup_command: str = ""
    teardown_command: str = ""
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    setup_timeout: float = 3600.0
    teardown_timeout: float = 300.0
    inherit_environment: tuple[str, ...] = ()
    mcp_config: str = "inline"
    harness_config_dirs: Mapping[str, str] = field(default_factory=dict)
    cgroup: str = "auto"


@dataclass(frozen=True)
class CommandOptions:
    """`backend.command.`"""

    dispatch_command: str = ""
    cancel_command: str = ""
    dispatch_timeout: float = 60.0
    cancel_timeout: float = 10.0
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class DockerOptions:
    """`backend.docker.`"""

    volumes: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    engine: str = "docker"
    engine_path: str = ""
    image_pull_policy: str = "Always"
    pull_timeout: float = 1800.0
    pull_progress_timeout: float = 120.0
    command_timeout: float = 60.0
    engine_down_timeout: float = 600.0
    platform: str = ""
    default_image: str = ""
    sidecar_image: str = ""
    coding_cli_sidecars: Mapping[str, str] = field(default_factory=dict)
    network: str = ""
    user: str = ""
    memory: str = ""
    cpus: str = ""
    extra_hosts: tuple[str, ...] = ()
    security_opt: tuple[str, ...] = ()
    pids_limit: int = 0
    sidecar_volume_retention: float = 168 * 3600.0


@dataclass(frozen=True)
class KubernetesOptions:
    """`backend.kubernetes.`"""

    namespace: str = "default"
    kubeconfig: str = ""
    context: str = ""
    kubectl_path: str = ""
    default_image: str = ""
    image_pull_policy: str = "IfNotPresent"
    use_image_volumes: bool = False
    preflight: bool = True
    preflight_image: str = "busybox:1.36"
    preflight_timeout: float = 60.0
    preflight_resources: Mapping[str, Any] = field(default_factory=dict)
    sidecar_image: str = ""
    coding_cli_sidecars: Mapping[str, str] = field(default_factory=dict)
    setup_command: str = ""
    teardown_command: str = ""
    extra_labels: Mapping[str, str] = field(default_factory=dict)
    extra_annotations: Mapping[str, str] = field(default_factory=dict)
    active_deadline_seconds: int | None = None
    ttl_seconds_after_finished: int | None = None
    workspace_size_limit: str = ""
    unschedulable_timeout: float = 30.0
    volume_mount_timeout: float = 300.0
    image_pull_timeout: float = 600.0
    api_timeout: float = 30.0
    env_in_secret: bool = False
    pod_template: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)


BackendOptions = Union[DirectOptions, CommandOptions, DockerOptions, KubernetesOptions]


@dataclass(frozen=True)
class Settings:
    """Everything, after merging defaults < file < environment < flags. Only the composition root holds one."""

    worker_id: str
    api_key: Secret = Secret("")
    api_key_file: str = ""
    backend: str = "docker"
    options: BackendOptions = DockerOptions()
    control_plane: str = "oz"
    web_socket_url: str = WEB_SOCKET_URL
    server_root_url: str = SERVER_ROOT_URL
    session_sharing_server_url: str = ""
    log_level: str = "info"
    log_format: str = "text"
    log_file: str = ""
    ca_file: str = ""
    cleanup: bool = True
    max_concurrent_tasks: int = 0
    idle_on_complete: str = ""
    state_dir: str = ""
    instance_id: str = ""
    on_shutdown: str = ""
    stop_grace: float = 10.0
    drain_timeout: float = 0.0
    flush_timeout: float = 5.0
    task_timeout: float = 0.0
    one_shot: bool = False
    exit_after: ExitAfter = ExitAfter()
    exit_on_refusal: bool = False
    link: LinkOptions = LinkOptions()
    task_output: str = "file"
    task_log_max: int = 64 * MIB
    task_log_retention: float = 24 * 3600.0
    keep_failed: float = 0.0
    min_free_disk: int = 512 * MIB
    min_free_inodes: int = 1000
    health_listen: str = ""
