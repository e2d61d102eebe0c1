"""The Oz dialect as the daemon uses it: frames in, engine commands out; reports in, frames out."""

from __future__ import annotations

import logging

from oz_worker.dialects.oz import argv, environ, reports
from oz_worker.dialects.oz.fields import trim
from oz_worker.dialects.oz.frames import Assignment, Cancellation, Invalid, Refused, decode
from oz_worker.engine.intake import Intake
from oz_worker.meters import Meters
from oz_worker.model import Key, Report, TaskSpec

logger = logging.getLogger(__name__)

_REMEMBERED = 32


class OzSession:
    """Translates between the wire and the engine. `received` belongs to the main thread, `encode` to any.

    Logs say kinds, ids and names of fields, never a value: assignments are full of tokens. A frame that is refused
    is logged once for each kind and counted in `oz_worker_frames_refused_total{kind}` every time.
    """

    def __init__(
        self,
        *,
        intake: Intake,
        worker_id: str,
        server_root_url: str,
        session_sharing_server_url: str,
        idle_on_complete: str,
        meters: Meters,
    ) -> None:
        self._intake = intake
        self._worker_id = worker_id
        self._server_root_url = server_root_url
        self._session_sharing_server_url = session_sharing_server_url
        self._idle_on_complete = idle_on_complete
        self._meters = meters
        self._said: set[Refused | str] = set()

    def received(self, text: str) -> bool:
        """Hand a text frame to the engine; True if its type is known and its id readable. Raises nothing of its own."""
        message = decode(text)
        if isinstance(message, Refused):
            self._refuse(message)
            return False
        if isinstance(message, Cancellation):
            logger.info("cancel of %s asked for", Key(message.task_id, message.execution_id))
            self._intake.cancel(message.task_id, message.execution_id)
        elif isinstance(message, Invalid):
            logger.warning("task %s: %s", message.key, message.sentence)
            self._intake.invalid(message.key, message.sentence)
        else:
            self._intake.assign(self._spec(message))
        return True

    def encode(self, report: Report) -> str:
        """The frame of *report*: the same bytes each time, at most 64 KiB. Safe from any thread."""
        return reports.encode(report, worker_id=self._worker_id)

    def _spec(self, assignment: Assignment) -> TaskSpec:
        for warning in assignment.warnings:
            logger.warning("task %s: %s", assignment.key, warning)
        logger.debug("task %s: task has the fields %s", assignment.key, sorted(map(ascii, assignment.document)))
        config = assignment.config
        return TaskSpec(
            key=assignment.key,
            run_id=assignment.key.task_id,
            argv=argv.compose(
                assignment,
                server_root_url=self._server_root_url,
                session_sharing_server_url=self._session_sharing_server_url,
                idle_on_complete=self._idle_on_complete,
            ),
            environment=environ.common(assignment, server_root_url=self._server_root_url),
            secrets=environ.secrets(assignment),
            title=assignment.title,
            harness=trim(config.harness) if config is not None else "",
            mcp=config.mcp if config is not None else "",
            docker_image=assignment.docker_image,
            sidecars=assignment.sidecars,
            shape=assignment.shape,
            document=assignment.document,
        )

    def _refuse(self, refused: Refused) -> None:
        self._meters.count("oz_worker_frames_refused_total", kind=refused.kind)
        # Each unknown type is news (a newer server); of the other kinds the first one says it all.
        topic = refused if refused.kind == "unknown_type" else refused.kind
        if topic in self._said or len(self._said) >= _REMEMBERED:
            logger.debug("ignored %s", refused.detail)
            return
        self._said.add(topic)
        logger.warning("ignored %s; further ones are only counted (oz_worker_frames_refused_total)", refused.detail)
