"""The configuration, cut into what each part is told: no part but the composition root sees all of it."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from oz_worker import slots
from oz_worker.dialects.oz.session import OzSession
from oz_worker.engine.admission import Engine
from oz_worker.engine.gate import Limits
from oz_worker.settings import DirectOptions, Settings
from oz_worker.stopping import StopOptions


def origin(url: str) -> str:
    """scheme://host:port of a URL: what decides whether a report is meant for this server."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "wss" else 80)
    return f"{parts.scheme}://{(parts.hostname or '').lower()}:{port}"


def session(settings: Settings, engine: Engine) -> OzSession:
    """The dialect's side of the link."""
    return OzSession(
        intake=engine,
        worker_id=settings.worker_id,
        server_root_url=settings.server_root_url,
        session_sharing_server_url=settings.session_sharing_server_url,
        idle_on_complete=settings.idle_on_complete,
        meters=engine.meters,
    )


def limits(settings: Settings, instance: Path, endpoint: str) -> Limits:
    """What the engine is told."""
    options = settings.options
    workspace = options.target_dir or options.workspace_root if isinstance(options, DirectOptions) else ""
    return Limits(
        max_concurrent_tasks=settings.max_concurrent_tasks,
        most_tasks=1 if settings.one_shot else settings.exit_after.tasks,
        one_shot=settings.one_shot,
        stop_grace=settings.stop_grace,
        task_timeout=settings.task_timeout,
        cleanup=settings.cleanup,
        keep_failed=settings.keep_failed,
        min_free_disk=settings.min_free_disk,
        min_free_inodes=settings.min_free_inodes,
        disk_paths=tuple(Path(path) for path in (str(instance), workspace) if path),
        backend=settings.backend,
        endpoint=endpoint,
    )


def stop_options(settings: Settings, state_dir: Path) -> StopOptions:
    """What the stop is told. Where the state does not survive the process, its reports get more time to leave."""
    lost = slots.in_container() and os.stat(state_dir).st_dev == os.stat("/").st_dev
    return StopOptions.of(settings, short_lived=settings.one_shot or lost)
