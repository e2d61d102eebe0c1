"""A worker whose engine hangs is stopped: it leaves in time, claims nothing, and the next one ends what is left."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path

from oz_worker.devplane.server import ControlPlane
from tests.containers.conftest import DockerRig
from tests.engines.fixtures import OwnEngine
from tests.engines.images import load_images
from tests.rig import SAFETY, until


def test_a_stop_while_the_engine_hangs_proves_nothing_and_loses_nothing(tmp_path: Path, own_engine: OwnEngine) -> None:
    engine = own_engine()
    with ControlPlane() as plane, contextlib.closing(DockerRig(tmp_path, plane, engine, load_images(engine))) as rig:
        rig.config["stop_grace"] = "0s"
        worker = rig.start()
        running = rig.submit("echo up > $HOME/up; while :; do sleep 0.1; done")
        cancelled = rig.submit("echo up > $HOME/up-too; while :; do sleep 0.1; done")
        rig.written("up"), rig.written("up-too")
        engine.freeze()
        preparing = rig.submit("echo ran > $HOME/ran")
        looking = rig.submit("echo ran > $HOME/ran", extra={"docker_image": "never.example/seen:1"})
        plane.cancel(cancelled)
        for task in (preparing, looking):
            worker.wait_log(f"{task.task_id}.* preparing")
        worker.send(signal.SIGTERM)
        assert worker.process.wait(2 * SAFETY) == 0  # it looks for a proof for 30 s
        assert "is still there; its slot stays taken" in worker.log
        assert "everything is gone now" not in worker.log
        assert (running.terminal.reason, cancelled.state, cancelled.closed) == ("graceful_shutdown", "cancelled", False)
        assert "Not confirmed gone: container oz-" in running.terminal.message
        assert "Not confirmed gone" not in looking.terminal.message, "nothing was ever ordered for it"
        engine.thaw()
        assert len(rig.containers("status=running")) >= 2, "nothing could be ended"
        worker = rig.start()
        plane.wait_for(lambda: cancelled.closed, 60, "the proof")
        until(lambda: rig.containers() == [], "the end of what was left")
        assert worker.stop() == 0
        assert not (rig.place / "ran").exists()
        rig.audit()
