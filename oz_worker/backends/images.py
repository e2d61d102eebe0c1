"""Images as tasks need them: present, of the right platform, pulled once for everybody who waits."""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from typing import Callable, Iterator, NamedTuple

from oz_worker import pulls, threads
from oz_worker.backends.base import Unit
from oz_worker.backends.shared import Shared
from oz_worker.containers import Engine
from oz_worker.engine_words import EngineDown, EngineError, Image
from oz_worker.errors import OzWorkerError
from oz_worker.meters import Meters
from oz_worker.pulls import AWAY, Pull, PullFailed, Why, shown
from oz_worker.redact import without_credentials
from oz_worker.timing import format_duration

logger = logging.getLogger(__name__)

ALWAYS, NEVER = "Always", "Never"
_ALIASES = {
    "x86_64": "amd64",
    "x86-64": "amd64",
    "aarch64": "arm64",
    "i386": "386",
    "armhf": "arm/v7",
    "armel": "arm/v6",
}
_SYSTEMS = ("linux", "windows", "darwin", "freebsd")


class ImageUnusable(OzWorkerError):
    """The image cannot be had or cannot run here. One sentence with the cure, fit for a task's report."""


class ImageFacts(NamedTuple):
    """What must be known of an image that is present.

    `digest` are 64 hex digits: those it was pulled by, else those of its id. `platform` is like `linux/arm64/v8`.
    """

    reference: str
    id: str
    digest: str
    platform: str


class Images:
    """The images of one engine. Safe from any thread.

    *policy* is Always, IfNotPresent or Never. *pull_timeout* seconds bound a pull, *progress_timeout* its silence
    (0: no limit). *platform* is what the operator asked for, or ""; *engine_platform* is what the engine runs on.

    An image is looked at and pulled on a thread of `Shared`, which is ended there when nobody waits any more. The lock
    guards what is known, how far pulls are and what was warned of, and is never held while anything runs.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        policy: str,
        pull_timeout: float,
        progress_timeout: float,
        platform: str,
        engine_platform: str,
        on_death: threads.OnDeath,
        meters: Meters | None = None,
    ) -> None:
        self._engine = engine
        self._policy = policy
        self._pull_timeout = pull_timeout
        self._progress_timeout = progress_timeout
        self._platform = platform
        self._engine_platform = engine_platform
        self._meters = meters or Meters()
        self._shared: Shared[str, ImageFacts] = Shared("image", self._obtain, on_death)
        self._lock = threading.Lock()
        self._known: dict[str, ImageFacts] = {}
        self._pulling: dict[str, str] = {}  # how far each pull is
        self._warned: set[str] = set()

    def ready(self, reference: str, unit: Unit) -> ImageFacts:
        """The image's facts, once it is present by the policy; blocks until then in the unit's condition.

        Makes no call of the engine where the facts are known already (design 12, rule 23), but for Always, where every
        call pulls; those that come while the same image is pulled wait for that pull. Raises ImageUnusable, Stopped,
        EngineDown.
        """
        with self.asked(reference, unit) as answer:
            return answer()

    @contextlib.contextmanager
    def asked(self, reference: str, unit: Unit) -> Iterator[Callable[[], ImageFacts]]:
        """Like `ready`, which is what the answer does; the image is looked for and pulled from now on."""
        with self._lock:
            known = self._known.get(reference)
        if known is not None:
            yield lambda: known
            return
        with self._shared.asked(reference, unit) as answer:

            def waited() -> ImageFacts:
                with unit.waiting(lambda: self._progress_of(reference)):
                    return answer()

            yield waited

    def _progress_of(self, reference: str) -> str:
        with self._lock:
            last = self._pulling.get(reference)
        return f"the image {shown(reference)}" + ("" if last is None else f", which is being pulled: {last}")

    def forget(self, reference: str) -> None:
        """The facts turned out wrong, for instance because somebody removed the image: look again next time."""
        with self._lock:
            self._known.pop(reference, None)

    def _obtain(self, reference: str, interrupt: int) -> ImageFacts:
        """Runs on the shared thread."""
        try:
            if not pulls.is_name(reference):
                nothing = Pull(reference, "", "", 0, 0)
                raise pulls.failure(self._engine, nothing, Why.NAME, "it is not of that form")
            found = None if self._policy == ALWAYS else self._engine.image(reference, interrupt=interrupt)
            if found is None and self._policy == NEVER:
                raise ImageUnusable(
                    f"image {shown(reference)} is not here, and image_pull_policy is Never; pull it with "
                    f"`{self._engine.kind} pull`, or set backend.docker.image_pull_policy to IfNotPresent"
                )
            facts = self._judge(reference, found or self._pull(reference, interrupt), interrupt)
        except EngineDown:
            raise
        except EngineError as error:
            raise ImageUnusable(without_credentials(str(error))) from error
        if self._policy != ALWAYS:
            with self._lock:
                self._known[reference] = facts
        return facts

    def _pull(self, reference: str, interrupt: int) -> Image:
        """Pull it, or where the registry is out of reach take the copy that is here.

        A transfer that broke off while the engine is well is tried once more: the CLI has the same words for a registry
        that ends a transfer and for an engine that is restarted.
        """
        wanted = Pull(reference, self._platform, self._engine_platform, self._pull_timeout, self._progress_timeout)
        began = time.monotonic()
        logger.info("pulling image %s", shown(reference))
        try:
            with self._told(reference) as moved:
                self._pull_again_if_broken(wanted, interrupt, moved)
        except PullFailed as error:
            self._meters.observe("oz_worker_image_pull_seconds", time.monotonic() - began, result="failed")
            # Looked for also because an engine that hangs or ends looks like a registry that does.
            found = self._engine.image(reference, interrupt=interrupt) if error.why in AWAY else None
            if found is None:
                raise
            self._warn(reference, error)
            return found
        found = self._engine.image(reference, interrupt=interrupt)
        taken, result = time.monotonic() - began, "failed" if found is None else "succeeded"
        self._meters.observe("oz_worker_image_pull_seconds", taken, result=result)
        if found is None:  # some errors inside the stream end with exit code 0
            raise pulls.failure(self._engine, wanted, Why.OTHER, "it was pulled without an error, but is not there")
        with self._lock:
            self._warned.discard(reference)
        logger.info("image %s pulled in %s", shown(reference), format_duration(taken))
        return found

    @contextlib.contextmanager
    def _told(self, reference: str) -> Iterator[Callable[[str], None]]:
        """What hears of the progress of a pull, for as long as that takes."""

        def moved(last: str) -> None:
            with self._lock:
                self._pulling[reference] = last

        moved("nothing has come yet")
        try:
            yield moved
        finally:
            with self._lock:
                self._pulling.pop(reference, None)

    def _pull_again_if_broken(self, wanted: Pull, interrupt: int, moved: Callable[[str], None]) -> None:
        try:
            pulls.pull(self._engine, wanted, interrupt, moved)
        except PullFailed as error:
            if error.why is not Why.BROKEN_OFF:
                raise
            self._engine.image(wanted.reference, interrupt=interrupt)  # raises EngineDown if it was the engine
            logger.info("pulling image %s again: %s", shown(wanted.reference), error)
            pulls.pull(self._engine, wanted, interrupt, moved)

    def _warn(self, reference: str, error: PullFailed) -> None:
        """Once, until a pull of this image succeeds."""
        with self._lock:
            again = reference in self._warned
            self._warned.add(reference)
        level = logging.DEBUG if again else logging.WARNING
        logger.log(
            level, "the copy of image %s that is here is used, because it cannot be pulled: %s", shown(reference), error
        )

    def _judge(self, reference: str, image: Image, interrupt: int) -> ImageFacts:
        """The image's facts, if it fits the platform. Raises ImageUnusable, EngineError."""
        wanted = _platform(self._platform or self._engine_platform)
        if not _fits(image, wanted) and self._platform:
            image = self._another(reference, interrupt) or image
        has = "/".join(filter(None, (image.system, image.architecture, image.variant)))
        if not _fits(image, wanted):
            raise ImageUnusable(
                f"image {shown(reference)} is built for {has}, but {'/'.join(filter(None, wanted))} is wanted here; "
                f"use an image built for it, or set backend.docker.platform to {has} if this machine can run that"
            )
        return ImageFacts(reference, image.id, _digest(image), has or "/".join(filter(None, wanted)))

    def _another(self, reference: str, interrupt: int) -> Image | None:
        """The image of that name for the platform that was asked for: docker since 28 may hold several."""
        try:
            return self._engine.image(reference, platform=self._platform, interrupt=interrupt)
        except EngineDown:
            raise
        except EngineError:  # an older one
            return None


def _platform(text: str) -> tuple[str, str, str]:
    """System, architecture and variant, "" for what is not said; `arm64` and `linux/aarch64` are understood too."""
    parts = [part.strip().lower() for part in text.split("/")]
    if parts[0] not in _SYSTEMS:
        parts.insert(0, "linux")
    parts[1:2] = "".join(_ALIASES.get(part, part) for part in parts[1:2]).split("/")
    system, architecture, variant = (*parts, "", "")[:3]
    return system, architecture, variant


def _fits(image: Image, wanted: tuple[str, str, str]) -> bool:
    """Whether an image of that platform may run where *wanted* is: unknown fits, so does an earlier variant."""
    system, architecture, variant = wanted
    if image.system and system and image.system != system:
        return False
    if image.architecture and architecture and image.architecture != architecture:
        return False
    return not (image.variant and variant) or image.variant <= variant


def _digest(image: Image) -> str:
    for text in (*image.digests, image.id):
        found = re.search(r"(?<![0-9a-f])[0-9a-f]{64}$", text)
        if found:
            return found[0]
    return ""
