"""Which image a task runs in, and which sidecars it sees (oz.md 8)."""

from __future__ import annotations

import logging
from typing import Mapping

from oz_worker.model import Sidecar, TaskSpec, plain_path

logger = logging.getLogger(__name__)

FALLBACK_IMAGE = "ubuntu:22.04"
AGENT = "/agent"


def image_of(spec: TaskSpec, default_image: str) -> str:
    """The image of the assignment, else the configured one, else Ubuntu's."""
    chosen = spec.docker_image or default_image
    if not chosen and "--environment" in spec.argv:
        logger.warning("task %s names an environment but no image; it runs in %s", spec.key, FALLBACK_IMAGE)
    return chosen or FALLBACK_IMAGE


def sidecars_of(spec: TaskSpec, sidecar_image: str, coding_cli_sidecars: Mapping[str, str]) -> tuple[Sidecar, ...]:
    """The assignment's sidecars, with the configured images in place of the agent's and the harness's own."""
    chosen = list(spec.sidecars)
    if sidecar_image:
        _put(chosen, Sidecar(sidecar_image, AGENT), first=True)
    if override := coding_cli_sidecars.get(spec.harness, ""):
        _put(chosen, Sidecar(override, f"/mnt/{spec.harness}-cli-sidecar"))
    return tuple(chosen)


def _put(chosen: list[Sidecar], wanted: Sidecar, *, first: bool = False) -> None:
    """Replace the image of the sidecar at the same place, else add one."""
    for index, sidecar in enumerate(chosen):
        if plain_path(sidecar.mount_path) == wanted.mount_path:
            chosen[index] = sidecar._replace(image=wanted.image)
            return
    chosen.insert(0 if first else len(chosen), wanted)
