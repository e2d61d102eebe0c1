"""Images as tasks need them: present, of the right platform, pulled once for everybody who waits."""

from __future__ import annotations

from typing import NamedTuple

from oz_worker.errors import OzWorkerError


class ImageUnusable(OzWorkerError):
    """The image cannot be had or cannot run here. One sentence with the cure, fit for a task's report."""


class ImageFacts(NamedTuple):
    """What must be known of an image that is present. `digest`: 64 hex digits, of what it was pulled by, else its id."""

    reference: str
    id: str
    digest: str
    platform: str
