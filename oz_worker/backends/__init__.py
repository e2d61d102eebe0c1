"""The ways to run work, by the name that stands in the configuration."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Mapping

from oz_worker.errors import NotUsable
from oz_worker.meters import Meters
from oz_worker.settings import CommandOptions, DirectOptions, DockerOptions, KubernetesOptions, Settings
from oz_worker.slots import in_container

if TYPE_CHECKING:
    from oz_worker.backends.base import Backend, Capabilities

OnDeath = Callable[[str, BaseException], None]


def _ignore(name: str, error: BaseException) -> None:
    """Threads log their death themselves."""


def make_backend(
    settings: Settings,
    *,
    instance: str,
    instance_dir: Path,
    host_environ: Mapping[str, str] | None = None,
    on_death: OnDeath = _ignore,
    meters: Meters | None = None,
) -> Backend:
    """The backend that *settings* choose, not opened yet. Raises NotUsable for one that this version cannot run.

    *instance_dir* is the directory of the instance whose units it serves; *on_death* hears of a thread that died;
    *meters* count what the backend does itself.
    """
    factory = FACTORIES.get(settings.backend)
    if factory is None:
        raise NotUsable(f"the {settings.backend} backend is not in this version; choose one of: {', '.join(FACTORIES)}")
    host = dict(os.environ if host_environ is None else host_environ)
    return factory(settings, instance, instance_dir, host, on_death, meters or Meters())


def _direct(
    settings: Settings, instance: str, instance_dir: Path, host: Mapping[str, str], on_death: OnDeath, _meters: Meters
) -> Backend:
    from oz_worker.backends.direct import Direct

    assert isinstance(settings.options, DirectOptions)
    return Direct(
        settings.options,
        worker_id=settings.worker_id,
        instance=instance,
        instance_dir=instance_dir,
        host_environ=host,
        cleanup=settings.cleanup,
        task_log_max=settings.task_log_max,
        stop_grace=settings.stop_grace,
        in_container=in_container(),
        on_death=on_death,
    )


def _command(
    settings: Settings, instance: str, instance_dir: Path, host: Mapping[str, str], on_death: OnDeath, _meters: Meters
) -> Backend:
    from oz_worker.backends.command import Command

    assert isinstance(settings.options, CommandOptions)
    return Command(
        settings.options,
        worker_id=settings.worker_id,
        server_root_url=settings.server_root_url,
        instance=instance,
        instance_dir=instance_dir,
        host_environ=host,
        task_log_max=settings.task_log_max,
        stop_grace=settings.stop_grace,
        on_death=on_death,
    )


def _docker(
    settings: Settings, instance: str, instance_dir: Path, host: Mapping[str, str], on_death: OnDeath, meters: Meters
) -> Backend:
    from oz_worker.backends.docker import Docker

    assert isinstance(settings.options, DockerOptions)
    return Docker(
        settings.options,
        worker_id=settings.worker_id,
        instance=instance,
        instance_dir=instance_dir,
        host_environ=host,
        task_log_max=settings.task_log_max,
        on_death=on_death,
        meters=meters,
    )


def _kubernetes(
    settings: Settings, instance: str, instance_dir: Path, host: Mapping[str, str], on_death: OnDeath, _meters: Meters
) -> Backend:
    from oz_worker.backends.kubernetes import Kubernetes

    assert isinstance(settings.options, KubernetesOptions)
    return Kubernetes(
        settings.options,
        worker_id=settings.worker_id,
        instance=instance,
        instance_dir=instance_dir,
        host_environ=host,
        cleanup=settings.cleanup,
        task_log_max=settings.task_log_max,
        stop_grace=settings.stop_grace,
        on_death=on_death,
    )


def refuse_shutdown(settings: Settings, capabilities: Capabilities) -> None:
    """Raise NotUsable where `on_shutdown` asks for what the backend cannot do here."""
    if settings.on_shutdown == "preserve" and not capabilities.survives_worker:
        raise NotUsable(
            "on_shutdown: preserve cannot work for the direct backend in a container, whose tasks die with it; set"
            " on_shutdown to drain or cancel"
        )


def endpoint(settings: Settings, environ: Mapping[str, str]) -> str:
    """Which engine or cluster units of these settings run on, as far as words go; "" for this host itself (rule 2)."""
    if isinstance(settings.options, KubernetesOptions):
        from oz_worker import clusters

        return clusters.endpoint_of(settings.options, environ)
    if isinstance(settings.options, DockerOptions):
        from oz_worker.engines import endpoint_of

        return endpoint_of(settings.options.engine, environ)
    return ""


FACTORIES: Mapping[str, Callable[[Settings, str, Path, Mapping[str, str], OnDeath, Meters], Backend]] = {
    "direct": _direct,
    "command": _command,
    "docker": _docker,
    "kubernetes": _kubernetes,
}
