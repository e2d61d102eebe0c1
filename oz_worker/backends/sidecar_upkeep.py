"""Looking after sidecar volumes: what is left over of fillings, and what nobody uses any more."""

from __future__ import annotations

import logging
import time
from typing import Callable, Iterable, Mapping, NamedTuple

from oz_worker.backends.sidecar_ages import Ages
from oz_worker.containers import FILLER, Engine
from oz_worker.engine_words import LABEL, Container, EngineDown, EngineError, NoSuch
from oz_worker.volumes import Volume, Volumes

logger = logging.getLogger(__name__)

DAY = 86400.0
"""What is bare for so long is used by nobody; what has been filled for so long is filled by nobody."""
_EVERY = 600.0
_SOURCE = "-from"


class Idle(NamedTuple):
    """A mark whose volume was not used for long enough."""

    mark: Container
    volume: str


class Upkeep:
    """Lists, judges and removes. `sweep` is called by one thread at a time, which alone touches `_due`."""

    def __init__(self, engine: Engine, volumes: Volumes, ages: Ages, labels: Mapping[str, str]) -> None:
        self._engine = engine
        self._volumes = volumes
        self._ages = ages
        self._instance = labels["instance"]
        self._worker = {"worker": labels["worker"]}
        self._due = 0.0

    def remove_container(self, name: str) -> None:
        """Remove a container that never ran, with the volumes that an image's VOLUME made. Raises EngineError."""
        try:
            self._engine.call("container", "rm", "--force", "--volumes", name)
        except NoSuch:
            pass

    def remove_filling(self, filler: str, volume: str) -> None:
        """Remove the two containers of a filling, and its volume if one is named. Raises EngineError."""
        self.remove_container(filler)
        self.remove_container(source_of(filler))
        if volume:
            self._volumes.remove(volume)

    def remove_private(self, unit: str) -> str:
        """Remove the volumes made for *unit* alone, and fillers of them; one sentence on failure. Raises EngineError.

        By worker and not by instance: a unit may have been adopted from another one.
        """
        if not (volumes := self._volumes.find({"unit": unit, **self._worker})):
            return ""
        for filler in self._engine.fillers(*_with({"unit": unit, **self._worker})):
            self.remove_container(filler)
        return "; ".join(filter(None, [self._remove(volume) for volume in volumes]))

    def remove_unfinished(self) -> None:
        """At the start of this instance nothing is being filled. Raises EngineError.

        A marked volume is mounted by its mark, so the engine itself refuses to remove it. One that was used by an
        earlier process is left to the sweep: another worker may be about to mount it.
        """
        mine = {"instance": self._instance, **self._worker}
        for filler in self._engine.fillers(*_with(mine)):
            self._remove_filler(filler)
        for volume in self._volumes.find(mine):
            if not self._ages.was_used(volume.name) or volume.label("unit"):
                self._remove(volume)

    def sweep(self, at_work: Callable[[str], bool], retention: float) -> list[Idle]:
        """Remove left-overs, and find what was not used for *retention* seconds.

        *at_work* says whether a filler is one of this process that is at work. Raises EngineError.
        """
        if time.monotonic() < self._due:
            return []
        volumes = self._volumes.find(self._worker)  # before the containers: a holder made in between is seen
        containers = self._engine.containers(*_with(self._worker))
        self._due = time.monotonic() + _EVERY
        mine = set(self._engine.fillers(*_with({**self._worker, "instance": self._instance})))
        left = [one for one in self._engine.fillers(*_with(self._worker)) if not at_work(one.removesuffix(_SOURCE))]
        for filler in left:
            if filler in mine or self._ages.bare(filler) > DAY:
                self._remove_filler(filler)
        idle = [found for volume in volumes for found in self._judge(volume, containers, retention)]
        self._ages.keep({one.name for one in volumes} | set(left))
        return idle

    def _judge(self, volume: Volume, containers: Iterable[Container], retention: float) -> list[Idle]:
        holders = [one for one in containers if volume.name in one.volumes]
        if holders:
            self._ages.held(volume.name)
        elif self._ages.bare(volume.name) > DAY:
            self._remove(volume)
        if any(map(_uses, holders)):
            self._ages.touch(volume.name)
        marks = [one for one in holders if one.label("role") == "mark"]
        if not marks or not retention or self._ages.idle(volume.name) <= retention:
            return []
        if any(map(_uses, self._engine.containers(f"volume={volume.name}"))):  # also another worker id's
            self._ages.touch(volume.name)
            return []
        return [Idle(mark, volume.name) for mark in marks]

    def _remove_filler(self, filler: str) -> None:
        """Also its volume, which has no labels if the engine made it late: the name tells. Raises EngineDown."""
        try:
            self.remove_container(filler)
            for name in self._volumes.ending(filler.removeprefix(FILLER).removesuffix(_SOURCE)):
                if not self._ages.was_used(name):
                    self._remove(Volume(name, {}))
        except EngineDown:
            raise
        except EngineError as error:
            logger.info("%s stays for now: %s", filler, error)

    def _remove(self, volume: Volume) -> str:
        """One sentence when it could not be removed."""
        try:
            self._volumes.remove(volume.name)
        except EngineError as error:
            logger.debug("the volume %s stays: %s", volume.name, error)
            return f"the volume {volume.name} was not removed: {error.said}"
        return ""


def source_of(filler: str) -> str:
    """The name of the container whose files a filler is given."""
    return filler + _SOURCE


def _with(labels: Mapping[str, str]) -> list[str]:
    return [f"label={LABEL}{name}={value}" for name, value in labels.items()]


def _uses(container: Container) -> bool:
    return container.label("role") != "mark"


def volumes_of(container: Container) -> list[str]:
    """The volumes of ours that a container mounts, without the nameless ones that its image asks for."""
    return [name for name in container.volumes if name.startswith("ozw-")]
