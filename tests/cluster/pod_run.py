"""One pod on its node: volumes, init containers in order, the others together, its end, and its status."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.cluster import clock, conditions, volumes
from tests.cluster.container_run import ContainerRun
from tests.cluster.loop import Timer
from tests.cluster.refusals import Json, Refused
from tests.cluster.resources import PODS, Resource
from tests.cluster.store import copied

if TYPE_CHECKING:
    from tests.cluster.kubelet import Kubelet


class PodRun:
    """What the kubelet knows of a pod. All methods run on the loop's thread."""

    def __init__(self, kubelet: Kubelet, pod: Json) -> None:
        self.kubelet = kubelet
        self.now: Json = copied(pod)
        """The object as it was last seen."""
        meta = pod["metadata"]
        self.uid, self.name, self.namespace = str(meta["uid"]), str(meta["name"]), str(meta["namespace"])
        self.spec: Json = self.now["spec"]
        self.node = str(self.spec["nodeName"])
        self.early = [ContainerRun(self, spec, early=True) for spec in self.spec.get("initContainers") or ()]
        self.main = [ContainerRun(self, spec, early=False) for spec in self.spec["containers"]]
        self.directories: dict[str, Path] = {}
        self.stopping = False
        self.finished = False
        self.deleted = False
        self.removed = False
        """The object is gone; nothing is reported any more."""
        self._mounted = False
        self._mounting: Timer | None = None
        self._until = 0.0
        self._told: tuple[str, str, str] | None = None
        """Phase, reason and message of an end that comes from outside."""
        self._started_at = clock.now()
        deadline = self.spec.get("activeDeadlineSeconds")
        self._deadline = kubelet.loop.later(float(deadline), self._too_long) if deadline else None

    @property
    def place(self) -> Path:
        return self.kubelet.place / self.uid

    @property
    def runs(self) -> list[ContainerRun]:
        return [*self.early, *self.main]

    def find(self, resource: Resource, name: str) -> Json | None:
        return self.kubelet.api.store.get(resource, self.namespace, name)

    def event(self, kind: str, reason: str, message: str, *, path: str = "") -> None:
        if not self.removed and self.node not in self.kubelet.lost:
            series = "yes" if kind == "Warning" or reason in ("BackOff", "Pulling") else ""
            self.kubelet.api.record(
                PODS, self.now, kind, reason, message, "kubelet", host=self.node, path=path, series=series
            )

    def blocks(self, run: ContainerRun) -> bool:
        """Whether something before *run* is not done yet."""
        before = self.early if not run.early else self.early[: self.early.index(run)]
        return any(not each.was_started if each.sidecar else each.code != 0 for each in before)

    # Forward

    def advance(self) -> None:
        """Do the next step, whatever it is, and report."""
        if self.finished:
            return
        if not self.stopping and self._mount() and self._initialize():
            self._run_main()
        if self.stopping:
            self._stop_sidecars()
        if self.stopping and all(run.phase == "ended" for run in self.runs):
            self._finish()
        else:
            self.report()

    def _mount(self) -> bool:
        if self._mounted:
            return True
        if self._mounting is not None:
            return False
        try:
            for volume in self.spec.get("volumes") or ():
                self.kubelet.check_mount(self.now, volume["name"])
                directory = self.place / "volumes" / volume["name"]
                found = volumes.set_up(volume, directory, self.now, self.find, self.kubelet.token)
                if found is not None:
                    self.directories[volume["name"]] = found
        except volumes.MountFault as fault:
            self.event("Warning", "FailedMount", str(fault))
            self._mounting = self.kubelet.loop.later(self.kubelet.times.retry, self._mount_again)
            return False
        self._mounted = True
        return True

    def _mount_again(self) -> None:
        self._mounting = None
        self.advance()

    def _initialize(self) -> bool:
        for run in self.early:
            if run.phase == "ended" and run.sidecar:
                run.again()
            elif run.phase == "ended" and run.code != 0:
                if self.spec["restartPolicy"] == "Never":
                    self._wind_up()
                else:
                    run.again()
                return False
            if run.phase == "idle":
                run.begin()
            if not (run.was_started if run.sidecar else run.phase == "ended"):
                return False
        return not self.stopping

    def _run_main(self) -> None:
        policy = self.spec["restartPolicy"]
        for run in self.main:
            if run.phase == "idle":
                run.begin()
            elif run.phase == "ended" and (policy == "Always" or (policy == "OnFailure" and run.code != 0)):
                run.again()
        if all(run.phase == "ended" for run in self.main):
            self._wind_up()

    def _wind_up(self) -> None:
        """It is over by itself: end what was only there for the others."""
        if self.stopping:
            return
        self.stopping = True
        self._until = time.monotonic() + float(self.spec["terminationGracePeriodSeconds"])
        for run in self.runs:
            if not run.sidecar:
                run.stop(0)  # never begun, after an init container that failed
        self._stop_sidecars()

    # To the end

    def delete(self, pod: Json) -> None:
        """The object is marked as to be deleted."""
        self.deleted = True
        self.now = copied(pod)
        if self.finished:
            self._remove_object()
        else:
            self.stop(float(pod["metadata"].get("deletionGracePeriodSeconds", 0)))

    def stop(self, grace: float, phase: str = "", reason: str = "", message: str = "") -> None:
        """End it within *grace* seconds; *phase*, *reason* and *message* where the end is not its own."""
        if phase and self._told is None:
            self._told = (phase, reason, message)
        if self._mounting is not None:
            self._mounting.cancel()
        self.stopping = True
        self._until = time.monotonic() + grace
        for run in self.runs:
            if not run.sidecar or grace <= 0:
                run.stop(grace)
        self.advance()

    def _stop_sidecars(self) -> None:
        """They live as long as there is somebody whom they serve."""
        if all(run.phase == "ended" for run in self.main):
            for run in reversed(self.early):
                if run.sidecar and not run.stopping:
                    run.stop(max(self._until - time.monotonic(), 2.0))

    def _too_long(self) -> None:
        message = "Pod was active on the node longer than the specified deadline"
        self.event("Normal", "DeadlineExceeded", message)
        self.stop(float(self.spec["terminationGracePeriodSeconds"]), "Failed", "DeadlineExceeded", message)

    def _finish(self) -> None:
        self.finished = True
        if self._deadline:
            self._deadline.cancel()
        self.report()
        if self.deleted:
            self._remove_object()

    def _remove_object(self) -> None:
        if self.removed or self.node in self.kubelet.lost:
            return
        options = {"gracePeriodSeconds": 0, "preconditions": {"uid": self.uid}}
        try:
            self.kubelet.api.delete(PODS, self.namespace, self.name, options)
        except Refused:
            pass  # somebody was faster

    def destroy(self) -> None:
        """The object is gone: end what runs at once."""
        self.removed = self.stopping = True
        for run in self.runs:
            run.stop(0)
        self.clear_away()

    def clear_away(self) -> None:
        """Remove the files once nothing runs."""
        if any(run.phase in ("starting", "running") for run in self.runs):
            self.kubelet.loop.later(0.02, self.clear_away)
            return
        shutil.rmtree(self.place, ignore_errors=True)
        self.kubelet.gone(self)

    # Status

    def phase(self) -> str:
        if self.finished:
            if self._told is not None:
                return self._told[0]
            done = all(run.code == 0 for run in self.main)
            return "Succeeded" if done else "Failed"
        return "Running" if any(run.was_started for run in self.main) else "Pending"

    def report(self) -> None:
        """Write the status, unless nobody hears it."""
        if self.removed or self.node in self.kubelet.lost:
            return
        found = self.kubelet.api.change(PODS, self.namespace, self.name, self._write_status, uid=self.uid)
        if found is not None:
            self.now["status"] = copied(found["status"])

    def _write_status(self, pod: Json) -> None:
        status = pod["status"]
        phase = self.phase()
        if self._told is not None and self.finished:
            status |= {"phase": phase, "reason": self._told[1], "message": self._told[2]}
        else:
            status["phase"] = phase
        status["hostIP"] = self.kubelet.address(self.node)
        status.setdefault("startTime", self._started_at)
        if self._mounted:
            status |= {"podIP": "127.0.0.1", "podIPs": [{"ip": "127.0.0.1"}]}
        if self.early:
            status["initContainerStatuses"] = [run.status() for run in self.early]
        status["containerStatuses"] = [run.status() for run in self.main]
        self._write_conditions(pod)

    def _write_conditions(self, pod: Json) -> None:
        incomplete = [run.name for run in self.early if not (run.was_started if run.sidecar else run.code == 0)]
        unready = [run.name for run in self.main if "running" not in run.state]
        if self.kubelet.newer_than(1, 29):
            conditions.put(pod, "PodReadyToStartContainers", "True" if self._mounted and not self.finished else "False")
        if incomplete:
            said = f"containers with incomplete status: [{' '.join(incomplete)}]"
            conditions.put(pod, "Initialized", "False", "ContainersNotInitialized", said)
        else:
            conditions.put(pod, "Initialized", "True", "PodCompleted" if self.phase() == "Succeeded" else "")
        for kind in ("Ready", "ContainersReady"):
            if self.finished:
                conditions.put(pod, kind, "False", "PodCompleted" if self.phase() == "Succeeded" else "PodFailed")
            elif unready or incomplete:
                said = f"containers with unready status: [{' '.join(unready)}]"
                conditions.put(pod, kind, "False", "ContainersNotReady", said)
            else:
                conditions.put(pod, kind, "True")
