"""The weather of a cluster on command: what befalls nodes, pods and Jobs, beside what the API does wrong."""

from __future__ import annotations

from typing import Any, Callable

from tests.cluster import conditions
from tests.cluster.api import Api
from tests.cluster.faults import ApiFaults
from tests.cluster.front import Front
from tests.cluster.kubelet import Kubelet, MountTrouble
from tests.cluster.pod_run import PodRun
from tests.cluster.refusals import Json, Refused
from tests.cluster.resources import JOBS, NODES, PODS
from tests.cluster.scheduler import Hold, Scheduler

Which = Callable[[Json], bool]
_LOW = (
    "The node was low on resource: memory. Threshold quantity: 100Mi, available: 51240Ki. Container {} was using "
    "1812Mi, request is 0, has larger consumption of memory. "
)


def every(_: Json) -> bool:
    """All pods."""
    return True


class Weather(ApiFaults):
    """Everything that can go wrong. Any thread may call any method; pods are named by namespace and name."""

    def __init__(self, api: Api, front: Callable[[], Front], kubelet: Kubelet, scheduler: Scheduler) -> None:
        super().__init__(api.store, front)
        self._api = api
        self._kubelet = kubelet
        self._scheduler = scheduler
        self.images = kubelet.images

    def _with(self, namespace: str, name: str, what: Callable[[PodRun], Any]) -> None:
        """Do *what* to a pod that is on a node, on the loop's thread."""

        def on_loop() -> bool:
            run = self._kubelet.find(namespace, name)
            if run is not None:
                what(run)
            return run is not None

        if not self._kubelet.loop.ask(on_loop):
            raise LookupError(f"no pod {namespace}/{name} on a node")

    # Pods

    def evict(self, namespace: str, name: str, *, code: int | None = None, message: str = "") -> None:
        """The kubelet evicts a pod: it is killed without grace and Failed, reason Evicted.

        *code*: what the containers are said to have ended with, such as 0; None says the truth.
        """

        def do(run: PodRun) -> None:
            text = message or _LOW.format(run.main[0].name)
            run.event("Warning", "Evicted", text)
            gone = "The node was low on resource: memory"
            self._api.change(PODS, namespace, name, conditions.disrupted("TerminationByKubelet", gone), uid=run.uid)
            for container in run.runs:
                container.said_code = code
            run.stop(0, "Failed", "Evicted", text)

        self._with(namespace, name, do)

    def preempt(self, namespace: str, name: str) -> None:
        """A pod with a higher priority takes its place: deleted with its grace."""
        pod = self._api.get(PODS, namespace, name)
        text = "default-scheduler: preempting to accommodate a higher priority pod"
        self._api.change(PODS, namespace, name, conditions.disrupted("PreemptionByScheduler", text))
        other = f"Preempted by pod 5d0c1a52-0000-4000-8000-000000000000 on node {pod['spec'].get('nodeName', '')}"
        self._api.record(PODS, pod, "Normal", "Preempted", other, "default-scheduler")
        self._api.delete(PODS, namespace, name, {})

    def delete_pod(self, namespace: str, name: str, *, grace: int | None = None) -> None:
        """Somebody deletes a pod by hand."""
        self._api.delete(PODS, namespace, name, {} if grace is None else {"gracePeriodSeconds": grace})

    def delete_job(self, namespace: str, name: str, *, policy: str = "Background") -> None:
        """Somebody deletes a Job by hand, or its time to live is over (*policy* Foreground)."""
        self._api.delete(JOBS, namespace, name, {"propagationPolicy": policy})

    def out_of_memory(self, namespace: str, name: str, container: str = "") -> None:
        """The kernel kills a container: OOMKilled, 137."""

        def do(run: PodRun) -> None:
            chosen = next(each for each in run.runs if each.name == (container or run.main[0].name))
            chosen.out_of_memory()

        self._with(namespace, name, do)

    def signal(self, namespace: str, name: str, number: int, container: str = "") -> None:
        """Send a signal to the first process of a container."""

        def do(run: PodRun) -> None:
            chosen = next(each for each in run.runs if each.name == (container or run.main[0].name))
            self._kubelet.containers.signal(chosen.attempt, number)

        self._with(namespace, name, do)

    # Nodes

    def lose_node(self, node: str, *, kill: bool = True, unknown: bool = False) -> None:
        """Nobody hears of a node any more: Ready Unknown, its pods not ready. *kill*: what runs there dies unseen.

        *unknown*: the pods' phase becomes Unknown, reason NodeLost, as older clusters and some clouds have it. What
        follows minutes later: `taint_manager`, then `collect_pods`.
        """

        def on_loop() -> None:
            self._kubelet.lost.add(node)
            for run in self._kubelet.pods:
                if run.node == node and kill:
                    for container in run.runs:
                        container.kill()

        self._kubelet.loop.ask(on_loop)
        text = "Kubelet stopped posting node status."
        self._api.change(
            NODES, "", node, lambda obj: conditions.put(obj, "Ready", "Unknown", "NodeStatusUnknown", text, probe=False)
        )
        for pod in self._on(node):
            place = pod["metadata"]["namespace"], pod["metadata"]["name"]
            self._api.record(PODS, pod, "Warning", "NodeNotReady", "Node is not ready", "node-controller")
            self._api.change(PODS, *place, lambda obj: self._not_ready(obj, node, unknown))

    @staticmethod
    def _not_ready(pod: Json, node: str, unknown: bool) -> None:
        conditions.put(pod, "Ready", "False")
        if unknown:
            text = f"Node {node} which was running pod {pod['metadata']['name']} is unresponsive"
            pod["status"] |= {"phase": "Unknown", "reason": "NodeLost", "message": text}

    def _on(self, node: str) -> list[Json]:
        return [
            pod
            for pod in self._api.store.objects(PODS)[0]
            if pod["spec"].get("nodeName") == node and pod["status"]["phase"] not in ("Succeeded", "Failed")
        ]

    def taint_manager(self, node: str) -> None:
        """The five minutes of the pods' tolerations are over: they are marked and deleted; no kubelet obeys."""
        for pod in self._on(node):
            place = pod["metadata"]["namespace"], pod["metadata"]["name"]
            text = "Taint manager: deleting due to NoExecute taint"
            self._api.change(PODS, *place, conditions.disrupted("DeletionByTaintManager", text))
            said = f"Marking for deletion Pod {'/'.join(place)}"
            self._api.record(PODS, pod, "Normal", "TaintManagerEviction", said, "taint-eviction-controller")
            self._api.delete(PODS, *place, {})

    def collect_pods(self, node: str) -> None:
        """The node's object is removed, and its pods are Failed and deleted without grace."""
        try:
            self._api.delete(NODES, "", node, {})
        except Refused:
            pass  # it is gone
        for pod in self._on(node):
            place = pod["metadata"]["namespace"], pod["metadata"]["name"]

            def fail(obj: Json) -> None:
                conditions.put(obj, "DisruptionTarget", "True", "DeletionByPodGC", "PodGC: node no longer exists")
                obj["status"]["phase"] = "Failed"

            self._api.change(PODS, *place, fail)
            self._api.delete(PODS, *place, {"gracePeriodSeconds": 0})

    def find_node(self, node: str) -> None:
        """The node is heard again, and says what became of its pods."""
        text = "kubelet is posting ready status"
        self._api.change(
            NODES, "", node, lambda obj: conditions.put(obj, "Ready", "True", "KubeletReady", text, probe=False)
        )
        self._kubelet.loop.ask(lambda: self._kubelet.recover(node))

    def hold_pods(self, which: Which = every, why: str = "") -> Hold:
        """Pods find no node, until the answer's `end`."""
        head = "0/1 nodes are available"
        text = f"{head}: 1 Insufficient cpu. preemption: {head}: 1 No preemption victims found for incoming pod."
        hold = Hold(which, why or text)
        self._scheduler.holds.append(hold)
        return hold

    def fail_mounts(self, volume: str = "", message: str = "", which: Which = every) -> MountTrouble:
        """Volumes cannot be mounted, until the answer's `end`."""
        trouble = MountTrouble(
            which, volume, message or "rpc error: code = Internal desc = mount failed: exit status 32"
        )
        self._kubelet.mount_troubles.append(trouble)
        return trouble
