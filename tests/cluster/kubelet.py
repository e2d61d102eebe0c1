"""The kubelet of every node: brings the pods that are bound to a node to life as processes of this machine."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Callable, Mapping, NamedTuple

from tests.cluster import volumes
from tests.cluster.api import Api
from tests.cluster.containers import Containers
from tests.cluster.images import Images
from tests.cluster.loop import Loop
from tests.cluster.pod_run import PodRun
from tests.cluster.refusals import Json
from tests.cluster.resources import PODS
from tests.cluster.store import Change


class Times(NamedTuple):
    """Seconds that a real cluster counts in tens and minutes."""

    sync: float = 0.1
    """From one look of the kubelet to the next, where nothing happens."""
    retry: float = 0.3
    """Before a mount, a configuration or an image that cannot be is tried again."""
    back_off: float = 0.4
    """The first pause after a pull or a container that failed; it doubles."""
    longest_back_off: float = 5.0
    job_back_off: float = 0.3
    """The first pause of the Job controller before a new pod; it doubles."""


class MountTrouble:
    """A volume that cannot be mounted, until `end`."""

    def __init__(self, matches: Callable[[Json], bool], volume: str, message: str) -> None:
        self.matches = matches
        self.volume = volume
        self.message = message
        self.ended = False

    def end(self) -> None:
        self.ended = True


class Kubelet:
    """Runs the pods of all nodes on the loop's thread; `place` holds a directory for each."""

    def __init__(
        self,
        api: Api,
        loop: Loop,
        containers: Containers,
        images: Images,
        place: Path,
        *,
        release: str,
        times: Times,
        services: Mapping[str, str],
        token: Callable[[Json], str],
    ) -> None:
        self.api = api
        self.loop = loop
        self.containers = containers
        self.images = images
        self.place = place
        self.times = times
        self.services = services
        self.token = token
        self.lost: set[str] = set()
        """Nodes that nobody hears of any more."""
        self.mount_troubles: list[MountTrouble] = []
        self._release = tuple(int(part) for part in release.split("."))
        self._pods: dict[str, PodRun] = {}
        api.store.listeners.append(self._heard)

    def newer_than(self, major: int, minor: int) -> bool:
        """Whether the cluster is of this release or a later one."""
        return self._release >= (major, minor)

    @staticmethod
    def new_id() -> str:
        return secrets.token_hex(32)

    @staticmethod
    def address(node: str) -> str:
        return f"10.0.0.{1 + sum(node.encode()) % 250}"

    @property
    def pods(self) -> list[PodRun]:
        """The pods that are here; for the loop's thread."""
        return list(self._pods.values())

    def find(self, namespace: str, name: str) -> PodRun | None:
        return next(
            (pod for pod in self.pods if (pod.namespace, pod.name) == (namespace, name) and not pod.removed), None
        )

    def _heard(self, change: Change) -> None:
        if change.resource == PODS:
            self.loop.call(lambda: self._see(change))

    def _see(self, change: Change) -> None:
        pod = change.object
        run = self._pods.get(pod["metadata"]["uid"])
        if change.type == "DELETED":
            if run is not None:
                run.destroy()
            return
        if not pod["spec"].get("nodeName"):
            return
        if run is None and pod["status"]["phase"] not in ("Succeeded", "Failed"):
            run = self._pods[pod["metadata"]["uid"]] = PodRun(self, pod)
            run.advance()
        if run is not None and pod["metadata"].get("deletionTimestamp") and run.node not in self.lost:
            before = (change.before or {}).get("metadata", {})
            if not run.deleted or before.get("deletionGracePeriodSeconds") != pod["metadata"].get(
                "deletionGracePeriodSeconds"
            ):
                run.delete(pod)

    def check_mount(self, pod: Json, volume: str) -> None:
        """Raises MountFault where that is ordered."""
        for trouble in self.mount_troubles:
            if not trouble.ended and trouble.volume in ("", volume) and trouble.matches(pod):
                raise volumes.MountFault(f'MountVolume.SetUp failed for volume "{volume}" : {trouble.message}')

    def gone(self, run: PodRun) -> None:
        """Nothing is left of a pod."""
        self._pods.pop(run.uid, None)

    def recover(self, node: str) -> None:
        """The node is heard again: it reports what became of its pods, and ends what is to be deleted."""
        self.lost.discard(node)
        for run in self.pods:
            if run.node == node:
                found = self.api.store.get(PODS, run.namespace, run.name)
                run.report()
                if found and found["metadata"].get("deletionTimestamp"):
                    run.delete(found)
