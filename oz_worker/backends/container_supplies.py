"""What a container needs before it can be made: its image, present, and its sidecars' volumes, filled."""

from __future__ import annotations

from pathlib import Path
from typing import Mapping, NamedTuple, Sequence

from oz_worker.backends.base import Unit
from oz_worker.backends.images import Images, ImageUnusable
from oz_worker.backends.patience import Patience
from oz_worker.backends.resolution import image_of, sidecars_of
from oz_worker.backends.sidecars import Sidecars, SidecarUnusable
from oz_worker.containers import Engine
from oz_worker.engine_words import EngineError
from oz_worker.errors import TaskFault
from oz_worker.model import ExitFacts, Reason
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
        reason = Reason.IMAGE_PULL
        try:
            self._patience.persist(lambda: self.images.ready(image, unit), unit)
            reason = Reason.SIDECAR_PREP
            with unit.waiting(lambda: "its sidecars, whose volumes are being filled"):
                mounts = self._patience.persist(lambda: self.sidecars.mounts(wanted, unit), unit)
        except (ImageUnusable, SidecarUnusable, EngineError) as error:
            raise TaskFault(ExitFacts(reason=reason, detail=str(error), agent_started=False)) from error
        return Ready(image, mounts)

    def distrust(self, ready: Ready) -> None:
        """A start failed, perhaps because something was removed meanwhile: look at everything anew."""
        self.images.forget(ready.image)
        self.sidecars.note_marks(set())
