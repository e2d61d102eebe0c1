"""What of the configuration and of the worker's own environment nobody may see."""

from __future__ import annotations

from typing import Iterator, Mapping

from oz_worker.backends.environ import secret_values
from oz_worker.known import in_address, in_environment
from oz_worker.settings import BackendOptions, DockerOptions, KubernetesOptions, Settings


def own_secrets(settings: Settings, environ: Mapping[str, str]) -> Iterator[str]:
    """The key; values that the configuration gives to tasks; users and passwords of proxies, exporters, registries."""
    options = settings.options
    yield settings.api_key.reveal()
    yield from in_environment(environ)
    yield from in_environment(options.environment)
    yield from secret_values({name: value for name, value in options.environment.items() if not _is_proxy(name)})
    for text in (settings.web_socket_url, settings.server_root_url, *_images(options)):
        yield from in_address(text)


def _is_proxy(name: str) -> bool:
    """Of their addresses only the user is secret: the log must be able to name a proxy that does not answer."""
    return name.upper().endswith("_PROXY")


def _images(options: BackendOptions) -> tuple[str, ...]:
    preflight = (options.preflight_image,) if isinstance(options, KubernetesOptions) else ()
    if isinstance(options, (DockerOptions, KubernetesOptions)):
        return (*preflight, options.default_image, options.sidecar_image, *options.coding_cli_sidecars.values())
    return ()
