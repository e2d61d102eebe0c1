"""Sidecar images as volumes: unpacked once, complete or not at all, private where a task may write.

**Complete.** A volume that everybody may mount is complete when a container `oz-sidecar-<64 hex of the image's id>`
exists that mounts it and was never started: its mark. It is made by name, which the engine lets exactly one do (two
workers too), and only after both halves of the unpacking ended with 0 and the end of the tar was seen. Each filling
has a volume of its own: two in one would replace each other's files under a running task. Who comes second with his
mark removes his volume and takes the winner's. The id and not the digest of an index names the mark, since that digest
is the same for several platforms.

**Why no task mounts a half-filled volume.** It is given a volume only after a mark of it was seen. What a dead or
failed filling leaves has no mark, its name is never used again, and it is removed.

**Why no task mounts an emptied one.** The engine removes no volume that a container mounts, not even one that never
ran, so a marked volume stays until its mark is gone. `docker run` makes a missing volume silently and empty, so these
are the ways to one:
* `collect` here or in another worker. It removes the mark alone; the volume follows after a day on which no look saw
  anything hold it. Between a task's look at a mark and its start lie at most the age of a list of the watch (5 min)
  and `engine_down_timeout` (10 min).
* Somebody removes marks and volumes by hand. The destroy event, or the next list, ends the trust (`mark_gone`,
  `note_marks`); a task that is started in that very moment finds no /agent/entrypoint.sh, and the backend starts it
  once more with everything looked at anew.
* A request of a killed program that the engine carries out late makes a mark, and a volume for it. Such a volume has
  no labels, and a mark is believed only if its volume has ours.
In each the volume that `run` made is never trusted, because no mark mounts it.

**Cost.** A mark that was seen is remembered: a task on the hot path costs no call (rule 23).
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
from pathlib import Path
from typing import Callable, Iterator, Mapping, NamedTuple, Sequence

from oz_worker.backends.base import Unit
from oz_worker.backends.images import ImageFacts, ImageUnusable
from oz_worker.backends.shared import Shared
from oz_worker.backends.sidecar_ages import Ages
from oz_worker.backends.sidecar_asked import Asked, asked
from oz_worker.backends.sidecar_asked import SidecarUnusable as SidecarUnusable
from oz_worker.backends.sidecar_upkeep import Idle, Upkeep, source_of, volumes_of
from oz_worker.containers import FILLER, Engine, is_readable
from oz_worker.engine_words import EngineDown, EngineError, Interrupted, NameTaken, NoSuch
from oz_worker.model import Sidecar
from oz_worker.threads import OnDeath
from oz_worker.timing import Deadline, format_duration
from oz_worker.volumes import Volumes

logger = logging.getLogger(__name__)

MARK = "oz-sidecar-"
_TRIES = 3
_FOREVER = 7 * 86400.0


class _Wanted(NamedTuple):
    """What is to be unpacked: once for everybody, or for one mount of one unit (`private` is `<unit> <path>`)."""

    image: str
    stem: str
    private: str = ""

    @property
    def mark(self) -> str:
        return MARK + self.image.rpartition(":")[2]

    @property
    def unit(self) -> str:
        return self.private.partition(" ")[0]


MakeReady = Callable[[str, Unit], ImageFacts]
"""`Images.ready`, or what does the same."""


class _Gone(SidecarUnusable):
    """Somebody removed the image, or the filler, since it was looked at."""


class Sidecars:
    """The sidecar volumes of one worker on one engine. Safe from any thread.

    *labels* are this worker's `instance`, `worker` and, where it has one, `owner`. *ready* makes an image present;
    *forget* makes it look anew. *timeout* bounds one unpacking (0: nothing does), *retention* is for `collect`;
    seconds. *state_file* keeps when each volume was last used; losing it is harmless.

    Unpacking runs on threads `sidecar` of `Shared`: shared by all units that wait, ended when the last of them is
    stopped. The lock guards the remembered marks, the fillings under way and those that are to be removed; it is never
    held while anything runs.
    """

    def __init__(
        self,
        engine: Engine,
        ready: MakeReady,
        *,
        labels: Mapping[str, str],
        timeout: float,
        retention: float,
        state_file: Path,
        on_death: OnDeath,
        forget: Callable[[str], None] = lambda image: None,
    ) -> None:
        self._engine = engine
        self._volumes = Volumes(engine)
        self._ready = ready
        self._forget = forget
        self._labels = labels
        self._timeout = timeout or _FOREVER
        self._retention = retention
        self._ages = Ages(state_file)
        self._upkeep = Upkeep(engine, self._volumes, self._ages, labels)
        self._filling: Shared[_Wanted, str] = Shared("sidecar", self._obtain, on_death)
        self._lock = threading.Lock()
        self._known: dict[str, str] = {}  # mark to volume
        self._changes = 0  # of what is known of marks: who looked before a change remembers nothing
        self._active: set[str] = set()  # fillers at work
        self._doomed: dict[str, str] = {}  # fillers whose removal failed, to the volume that goes with them or ""

    def settle(self, seconds: float) -> None:
        """Let fillings that nobody waits for any more remove what they had begun, at most so long."""
        self._filling.settle(seconds)

    # -- for a task ----------------------------------------------------------------------------------------------

    def mounts(self, sidecars: Sequence[Sidecar], unit: Unit, ready: MakeReady | None = None) -> list[str]:
        """The values of `--volume`, `volume:path:ro` or `volume:path`, in order; *ready* gives the images' facts.

        Blocks in the pulls and the unpacking, until the unit's stop order. Raises SidecarUnusable, Stopped, or
        EngineDown: nothing is known of it then, and it may be tried again.
        """
        wanted = asked(sidecars)
        facts = {one.image: self._image(one, unit, ready or self._ready) for one in wanted}
        return [self._mount(one, facts[one.image], unit) for one in wanted]

    @staticmethod
    def _image(sidecar: Asked, unit: Unit, ready: MakeReady) -> ImageFacts:
        try:
            return ready(sidecar.image, unit)
        except ImageUnusable as error:
            raise SidecarUnusable(f"the sidecar {sidecar.image} for {sidecar.path} cannot be had: {error}") from error

    def _mount(self, sidecar: Asked, facts: ImageFacts, unit: Unit) -> str:
        try:
            volume = self._volume(sidecar, facts, unit)
        except _Gone as error:
            logger.info("unit %s: once more from the beginning: %s", unit.name, error)
            self._forget(sidecar.image)
            volume = self._volume(sidecar, self._image(sidecar, unit, self._ready), unit)
        self._ages.touch(volume)
        return f"{volume}:{sidecar.path}" if sidecar.read_write else f"{volume}:{sidecar.path}:ro"

    def _volume(self, sidecar: Asked, facts: ImageFacts, unit: Unit) -> str:
        stem = f"ozw-{sidecar.repository}-{facts.digest.rpartition(':')[2][:12]}"
        if sidecar.read_write:
            return self._filling.get(_Wanted(facts.id, f"{stem}-{unit.name}", f"{unit.name} {sidecar.path}"), unit)
        wanted = _Wanted(facts.id, stem)
        with self._lock:
            known = self._known.get(wanted.mark)
            if known:
                self._ages.touch(known)  # under the lock: `_retire` looks under it too
        return known or self._filling.get(wanted, unit)

    def drop_private(self, unit: Unit) -> str:
        """Remove the volumes that only this unit wrote to; one sentence on failure, "" when none is left.

        Found by label, so that it works after a restart too.
        """
        try:
            return self._upkeep.remove_private(unit.name)
        except EngineError as error:
            return f"the private sidecar volumes of unit {unit.name} were not removed: {error}"

    # -- what is known of marks ----------------------------------------------------------------------------------

    def mark_gone(self, container_name: str) -> None:
        """A mark was removed: its volume is not trusted any more. Other names change nothing."""
        if container_name.startswith(MARK):
            with self._lock:
                self._changes += 1
                self._known.pop(container_name, None)

    def note_marks(self, names: set[str]) -> None:
        """A full list has these marks: no other is trusted without another look. An empty set: none is."""
        with self._lock:
            self._changes += 1
            self._known = {mark: volume for mark, volume in self._known.items() if mark in names}

    def _marked(self, mark: str) -> str:
        """The volume that *mark* declares complete, "" when there is no such mark. Raises SidecarUnusable."""
        with self._lock:
            changes = self._changes
        container = next(iter(self._engine.inspect(mark)), None)
        if container is None:
            return ""
        if container.label("role") != "mark":
            raise SidecarUnusable(f"the container {mark} is none of a worker's; remove it, workers need its name")
        volume = next(iter(volumes_of(container)), "")
        found = self._volumes.inspect(volume) if volume else []
        if not any(one.label("worker") for one in found):
            logger.warning("removing %s: its volume %s was not made by a worker", mark, volume or "(none)")
            self._upkeep.remove_container(container.id)
            return ""
        self._remember(mark, volume, changes)
        return volume

    def _remember(self, mark: str, volume: str, changes: int) -> None:
        with self._lock:
            if changes == self._changes:
                self._known[mark] = volume

    # -- unpacking, on a thread of `Shared` ----------------------------------------------------------------------

    def _obtain(self, wanted: _Wanted, interrupt: int) -> str:
        """The complete volume. Raises SidecarUnusable or EngineDown."""
        try:
            return ("" if wanted.private else self._marked(wanted.mark)) or self._fill(wanted, interrupt)
        except EngineDown:
            raise
        except NoSuch as error:
            raise _Gone(
                f"something was removed while the sidecar image {wanted.image} was unpacked: {error.said}; run the task"
                " again"
            ) from error
        except EngineError as error:
            raise SidecarUnusable(
                f"the sidecar image {wanted.image} could not be unpacked into a volume: {error.said}; {_cure(error)}"
            ) from error

    def _fill(self, wanted: _Wanted, interrupt: int) -> str:
        self._remove_doomed()
        deadline = Deadline(self._timeout)
        nonce = secrets.token_hex(6)
        filler, volume = FILLER + nonce, f"{wanted.stem}-{nonce}"
        labels = {**self._labels, **({"unit": wanted.unit} if wanted.private else {})}
        with self._filler(filler, volume) as done, self._within(deadline, wanted):
            self._volumes.create(volume, labels, timeout=self._patience(deadline), interrupt=interrupt)
            self._hold(filler, "fill", wanted, labels, volume, deadline, interrupt)
            self._hold(source_of(filler), "fill", wanted, labels, "", deadline, interrupt)
            self._volumes.fill(source_of(filler), filler, timeout=deadline.left() or 0.001, interrupt=interrupt)
            if is_readable(interrupt):
                raise Interrupted("nobody waits for it any more")
            done.append(volume if wanted.private else self._publish(wanted, volume, deadline, interrupt))
            self._ages.touch(done[0])  # while the filler still counts as at work: it is no left-over
        self._ages.save()
        logger.info("the sidecar image %s is unpacked in the volume %s", wanted.image, done[0])
        return done[0]

    def _publish(self, wanted: _Wanted, volume: str, deadline: Deadline, interrupt: int) -> str:
        """Mark *volume* as complete, or find the one that somebody else has marked meanwhile."""
        for _ in range(_TRIES):
            with self._lock:
                changes = self._changes
            try:
                self._hold(wanted.mark, "mark", wanted, self._labels, volume, deadline, interrupt)
            except NameTaken:
                if other := self._marked(wanted.mark):
                    return other
                continue
            self._remember(wanted.mark, volume, changes)
            return volume
        raise SidecarUnusable(f"the container {wanted.mark} comes and goes; find out who removes it")

    def _hold(
        self,
        name: str,
        role: str,
        wanted: _Wanted,
        labels: Mapping[str, str],
        volume: str,
        deadline: Deadline,
        interrupt: int,
    ) -> None:
        """A container that holds *volume*: read-only for a mark, so that starting it by hand changes nothing."""
        self._volumes.hold(
            name,
            wanted.image,
            {**labels, "role": role},
            volume,
            writable=role == "fill",
            timeout=self._patience(deadline),
            interrupt=interrupt,
        )

    def _patience(self, deadline: Deadline) -> float:
        return max(0.001, min(self._engine.timeout, deadline.left()))

    @contextlib.contextmanager
    def _within(self, deadline: Deadline, wanted: _Wanted) -> Iterator[None]:
        """No answer and no time left: that is no hiccup of the engine to be waited for."""
        try:
            yield
        except EngineDown as error:
            if isinstance(error, Interrupted) or not deadline.passed():
                raise
            limit = format_duration(self._timeout)
            raise SidecarUnusable(
                f"the sidecar image {wanted.image} was not unpacked within {limit} ({error}); look at the engine's"
                " disk, or raise backend.docker.pull_timeout"
            ) from error

    @contextlib.contextmanager
    def _filler(self, filler: str, volume: str) -> Iterator[list[str]]:
        """The life of one filling: at its end the filler goes, and the volume unless it stands in the list."""
        done: list[str] = []
        with self._lock:
            self._active.add(filler)
        try:
            yield done
        except BaseException as error:
            if isinstance(error, EngineDown) and not isinstance(error, Interrupted):
                self._doom(filler, volume)  # the engine would let a removal wait as well
            else:
                self._remove(filler, volume)
            raise
        else:
            self._remove(filler, "" if volume in done else volume)
        finally:
            with self._lock:
                self._active.discard(filler)

    # -- what is left over ---------------------------------------------------------------------------------------

    def _remove(self, filler: str, volume: str) -> None:
        """Remove a filler, and *volume* with it; later, where the engine does not answer now."""
        try:
            self._upkeep.remove_filling(filler, volume)
        except EngineDown as error:
            logger.info("%s is removed later: %s", filler, error)
            self._doom(filler, volume)
        except EngineError as error:  # a volume that got its mark after all, for example: the sweep looks at it
            logger.info("%s stays for now: %s", filler, error)

    def _doom(self, filler: str, volume: str) -> None:
        with self._lock:
            self._doomed[filler] = volume

    def _remove_doomed(self) -> None:
        with self._lock:
            doomed, self._doomed = self._doomed, {}
        for filler, volume in doomed.items():
            self._remove(filler, volume)

    def remove_unfinished(self) -> None:
        """Remove what an earlier process of this instance left half-way. Before the first task; raises EngineError.

        Its surviving helpers must have been ended (rule 5).
        """
        self._upkeep.remove_unfinished()

    def collect(self) -> None:
        """Remove the marks of what nobody used for `retention` seconds (0: never), and what is left over; ours only.

        "Ours" is our worker id's, of all instances; another's use counts as far as looks here see its containers. The
        volume of a mark follows a day after it, see above. Meant to be called once a minute; lists every ten minutes
        at most. Never raises: what did not work is done the next time.
        """
        self._remove_doomed()
        try:
            for idle in self._upkeep.sweep(self._at_work, self._retention):
                self._retire(idle)
        except EngineError as error:
            logger.info("sidecar volumes are looked after later: %s", error)

    def _at_work(self, filler: str) -> bool:
        with self._lock:
            return filler in self._active

    def _retire(self, idle: Idle) -> None:
        with self._lock:
            if self._ages.idle(idle.volume) <= self._retention:
                return  # a task came meanwhile
            self._changes += 1
            self._known.pop(idle.mark.name, None)
        limit = format_duration(self._retention)
        logger.info("nobody used the sidecar volume %s for %s; it goes in a day", idle.volume, limit)
        self._upkeep.remove_container(idle.mark.id)
        self.mark_gone(idle.mark.name)  # for who looked in between


def _cure(error: EngineError) -> str:
    if "no space left" in error.said.lower():
        return "free space on the disk where the engine keeps its data"
    return "mend that, then run the task again"
