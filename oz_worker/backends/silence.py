"""Whether an engine or a cluster answers, as the thread that watches it finds: said once when it changes."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)


class Silence:
    """What *whom* (`the docker engine`) is said to be. Written by the watch's thread alone, read by any."""

    def __init__(self, whom: str) -> None:
        self._whom = whom
        self.why = ""
        """One sentence while nothing answers, "" otherwise."""

    def goes_on(self, why: str, does: str = "does not answer") -> None:
        """A call went unanswered, or was refused: then *does* says that."""
        said = f"{self._whom} {does}"
        if not self.why.startswith(said):
            logger.warning("%s: %s; running tasks go on", said, why)
        self.why = f"{said}: {why}"

    def ends(self) -> None:
        """A call was answered."""
        if self.why:
            logger.info("%s answers again", self._whom)
        self.why = ""
