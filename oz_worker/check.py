"""`check`: what of a configuration can be tried out before a worker starts."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from oz_worker import clusters
from oz_worker.backends.environ import worker_environment
from oz_worker.backends.preflight import Preflight
from oz_worker.errors import ExitCode
from oz_worker.settings import KubernetesOptions, Settings


def check_command(settings: Settings) -> int:
    """Say what was tried and how it went, a line for each; the exit code. Raises NotUsable for what cannot work."""
    if isinstance(settings.options, KubernetesOptions):
        _say("The configuration is usable.")
        _check_cluster(settings, settings.options)
    else:
        _say(
            f"The configuration is usable. For the {settings.backend} backend this version checks nothing else: no"
            " network, no engine, no permissions."
        )
    return int(ExitCode.STOPPED)


def _check_cluster(settings: Settings, options: KubernetesOptions) -> None:
    """Cluster, permissions and image, as the start of a worker tries them, and beside one that runs."""
    environment = worker_environment(os.environ)
    with tempfile.TemporaryDirectory(prefix="oz-worker-check-") as place:
        cluster = clusters.cluster_for(options, environment, instance=f"check-{os.getpid()}", instance_dir=Path(place))
        where = clusters.endpoint_of(options, environment)
        _say(f"cluster: Kubernetes {clusters.version_of(cluster, where)}, {where}")
        preflight = Preflight(cluster, options, worker_id=settings.worker_id, instance=settings.instance_id)
        lacking = preflight.permissions()
        for sentence in lacking:
            _say(f"permissions: {sentence}")
        if not lacking:
            _say("permissions: all that is needed")
        kind = "mounted as a volume" if options.use_image_volumes else "run as root in an init container"
        slow = preflight.run()
        _say(f"image: {slow or f'{options.preflight_image} was pulled and {kind}'}")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
