"""What a container needs before it can be made: its image, present, and its sidecars' volumes, filled."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Mapping, NamedTuple, Sequence

from oz_worker.backends.base import Unit
from oz_worker.backends.images import Images, ImageUnusable
from oz_worker.backends.patience import Patience
from oz_worker.backends.resolution import image_of, sidecars_of
from oz_worker.backends.sidecar_asked import SidecarUnusable, asked
from oz_worker.backends.sidecars import Sidecars
from oz_worker.containers import Engine
from oz_worker.engine_words import EngineDown, EngineError
from oz_worker.errors import TaskFault
from oz_worker.meters import Meters
from oz_worker.model import ExitFacts, Reason, Sidecar
from oz_worker.settings import DockerOptions
from oz_worker.threads import OnDeath


class Ready(NamedTuple):
    """An image that is present, and the mounts of sidecars that are filled."""

    image: str
    mounts: Sequence[str]


class Supplies:
    """Images and sidecars by the options. Safe from any thread. What is known already costs no call (rule 23)."""

    def __init__(
        self,
        engine: Engine,
        options: DockerOptions,
        platform: str,
        *,
        patience: Patience,
        labels: Mapping[str, str],
        directory: Path,
        on_death: OnDeath,
        meters: Meters,
    ) -> None:
        self._options = options
        self._patience = patience
        self.images = Images(
            engine,
            policy=options.image_pull_policy,
            pull_timeout=options.pull_timeout,
            progress_timeout=options.pull_progress_timeout,
            platform=options.platform,
            engine_platform=platform,
            on_death=on_death,
            meters=meters,
        )
        self.sidecars = Sidecars(
            engine,
            self.images.ready,
            labels=labels,
            timeout=options.pull_timeout,
            retention=options.sidecar_volume_retention,
            state_file=directory / "sidecars.json",
            on_death=on_death,
            forget=self.images.forget,
        )

    def get(self, unit: Unit) -> Ready:
        """Block until everything is there; an engine that is down is waited for within its limit.

        Raises TaskFault, or Stopped at the unit's stop order.
        """
        spec, options = unit.spec, self._options
        assert spec is not None, "only attached units have no spec, and they are never prepared"
        image = image_of(spec, options.default_image)
        wanted = sidecars_of(spec, options.sidecar_image, options.coding_cli_sidecars)
        try:
            return self._patience.persist(lambda: self._together(image, wanted, unit), unit)
        except SidecarUnusable as error:
            raise _fault(Reason.SIDECAR_PREP, error) from error
        except (ImageUnusable, EngineError) as error:
            raise _fault(Reason.IMAGE_PULL, error) from error

    def _together(self, image: str, wanted: Sequence[Sidecar], unit: Unit) -> Ready:
        """All images are looked for and pulled at the same time: each may need its registry's answer."""
        names = dict.fromkeys([image, *(sidecar.image for sidecar in asked(wanted))])
        with contextlib.ExitStack() as under_way:
            answers = {name: under_way.enter_context(self.images.asked(name, unit)) for name in names}
            answers[image]()
            try:
                with unit.waiting(lambda: "its sidecars, whose volumes are being filled"):
                    return Ready(image, self.sidecars.mounts(wanted, unit, lambda name, _unit: answers[name]()))
            except EngineDown:
                raise
            except EngineError as error:
                raise SidecarUnusable(str(error)) from error

    def distrust(self, ready: Ready) -> None:
        """A start failed, perhaps because something was removed meanwhile: look at everything anew."""
        self.images.forget(ready.image)
        self.sidecars.note_marks(set())


def _fault(reason: Reason, error: Exception) -> TaskFault:
    return TaskFault(ExitFacts(reason=reason, detail=str(error), agent_started=False))
