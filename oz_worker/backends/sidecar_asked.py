"""What a task asks for in sidecars, checked before anything is made. Pure."""

from __future__ import annotations

import re
from typing import NamedTuple, Sequence

from oz_worker.errors import OzWorkerError
from oz_worker.model import Sidecar, plain_path
from oz_worker.pulls import is_name, shown

_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f:,]")
_LONGEST_NAME = 60
_LONGEST_PATH, _LONGEST_PART = 4095 - 512, 255
"""What Linux takes, less what an engine puts before it."""
_SHOWN = 200


class SidecarUnusable(OzWorkerError):
    """A sidecar cannot be given to a task. One sentence that names the entry and the cure, fit for a task's report."""


class Asked(NamedTuple):
    """One sidecar that can be asked for: `path` is absolute and normal."""

    image: str
    path: str
    read_write: bool

    @property
    def repository(self) -> str:
        """The image's repository as a part of a volume's name: for people, so cut where it is long."""
        name = self.image.partition("@")[0]
        name = name[: name.rfind(":")] if name.rfind(":") > name.rfind("/") else name
        for prefix in ("index.docker.io/", "docker.io/", "library/"):
            name = name.removeprefix(prefix)
        return re.sub(r"[^A-Za-z0-9_.-]", "-", name)[-_LONGEST_NAME:]


def asked(sidecars: Sequence[Sidecar]) -> list[Asked]:
    """The sidecars of a task. Raises SidecarUnusable for the first entry that cannot be meant."""
    found: dict[str, Asked] = {}
    for number, sidecar in enumerate(sidecars, 1):
        image, path = sidecar.image.strip(), sidecar.mount_path
        entry = f"sidecar {number} ({shown(image) if image else 'no image'} at {path[:_SHOWN] or 'no path'!r})"
        if not image:
            raise SidecarUnusable(f"{entry} names no image; give it one")
        if not is_name(image):
            raise SidecarUnusable(f"{entry}: that is no name of an image; write it like registry/name:tag")
        if forbidden := _FORBIDDEN.search(path):
            raise SidecarUnusable(f"{entry}: a mount path cannot have {forbidden[0]!r} in it; choose another path")
        if not path.startswith("/"):
            raise SidecarUnusable(f"{entry}: a mount path is absolute, like /agent; correct it")
        if len(path.encode()) > _LONGEST_PATH or any(len(part.encode()) > _LONGEST_PART for part in path.split("/")):
            raise SidecarUnusable(f"{entry}: a mount path is at most 4 KiB, its parts 255 bytes; choose a shorter one")
        normal = plain_path(path)
        if normal == "/":
            raise SidecarUnusable(f"{entry}: a sidecar cannot take the place of the whole file system; choose a path")
        if normal in found:
            other = found[normal].image
            raise SidecarUnusable(f"{entry}: {other} is mounted at {normal} already; give each a path of its own")
        found[normal] = Asked(image, normal, sidecar.read_write)
    return list(found.values())
