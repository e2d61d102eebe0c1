"""Nodes, and the scheduler that binds pods to them or says why it cannot."""

from __future__ import annotations

import collections
from decimal import Decimal
from typing import Callable, Mapping

from tests.cluster import conditions
from tests.cluster.api import Api
from tests.cluster.loop import Loop, Timer
from tests.cluster.quantities import amount, asked
from tests.cluster.refusals import Json
from tests.cluster.resources import NODES, PODS
from tests.cluster.store import Change

_ENDED = ("Succeeded", "Failed")


def node(name: str, labels: Mapping[str, str], capacity: Mapping[str, str], address: str) -> Json:
    """The object of a node that is ready."""
    found: Json = {"kind": "Node", "apiVersion": "v1", "metadata": {"name": name}, "spec": {}}
    found["metadata"]["labels"] = {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", **labels}
    room = {"cpu": "64", "memory": "256Gi", "pods": "1000", "ephemeral-storage": "100Gi", **capacity}
    found["status"] = {"capacity": room, "allocatable": room, "addresses": [{"type": "InternalIP", "address": address}]}
    conditions.put(found, "Ready", "True", "KubeletReady", "kubelet is posting ready status", probe=False)
    return found


class Hold:
    """Pods that find no node, until `end`."""

    def __init__(self, matches: Callable[[Json], bool], why: str) -> None:
        self.matches = matches
        self.why = why
        self.ended = False

    def end(self) -> None:
        self.ended = True


class Scheduler:
    """Binds pods, on the loop's thread; what finds no node is tried again with each change and every *retry* s."""

    def __init__(self, api: Api, loop: Loop, retry: float) -> None:
        self._api = api
        self._loop = loop
        self._retry = retry
        self._waiting: dict[tuple[str, str], None] = {}
        self._timer: Timer | None = None
        self.holds: list[Hold] = []
        api.store.listeners.append(self._heard)

    def _heard(self, change: Change) -> None:
        if change.resource == PODS:
            ended = change.type == "DELETED" or change.object["status"].get("phase") in _ENDED
            if ended or not change.object["spec"].get("nodeName"):
                place = change.object["metadata"]["namespace"], change.object["metadata"]["name"]
                self._loop.call(lambda: self._see(place))
        elif change.resource == NODES:
            self._loop.call(self.try_all)

    def _see(self, place: tuple[str, str]) -> None:
        pod = self._api.store.get(PODS, *place)
        if pod is None or pod["spec"].get("nodeName"):
            self._waiting.pop(place, None)
            if self._waiting:
                self.try_all()
        elif place not in self._waiting:
            self._waiting[place] = None
            self._try(place)

    def try_all(self) -> None:
        """Look at everything that waits once more."""
        self._timer = None
        for place in list(self._waiting):
            self._try(place)

    def _try(self, place: tuple[str, str]) -> None:
        pod = self._api.store.get(PODS, *place)
        if pod is None or pod["spec"].get("nodeName") or pod["metadata"].get("deletionTimestamp"):
            self._waiting.pop(place, None)
            return
        chosen, why = self._choose(pod)
        uid = pod["metadata"]["uid"]
        if chosen:

            def bind(obj: Json) -> None:
                obj["spec"]["nodeName"] = chosen
                conditions.put(obj, "PodScheduled", "True")

            self._waiting.pop(place, None)
            if bound := self._api.change(PODS, *place, bind, uid=uid):
                text = f"Successfully assigned {place[0]}/{place[1]} to {chosen}"
                self._api.record(PODS, bound, "Normal", "Scheduled", text, "default-scheduler")
            return
        old = conditions.condition(pod, "PodScheduled")
        if old is None or old.get("message") != why:
            self._api.change(
                PODS, *place, lambda obj: conditions.put(obj, "PodScheduled", "False", "Unschedulable", why), uid=uid
            )
            self._api.record(PODS, pod, "Warning", "FailedScheduling", why, "default-scheduler", series="yes")
        if self._timer is None:
            self._timer = self._loop.later(self._retry, self.try_all)

    def _choose(self, pod: Json) -> tuple[str, str]:
        """A node, or why there is none."""
        for hold in self.holds:
            if not hold.ended and hold.matches(pod):
                return "", hold.why
        nodes = self._api.store.objects(NODES)[0]
        reasons: collections.Counter[str] = collections.Counter()
        for each in nodes:
            why = self._unfit(pod, each)
            if not why:
                return str(each["metadata"]["name"]), ""
            reasons.update(why)
        if not nodes:
            return "", "no nodes available to schedule pods"
        head = f"0/{len(nodes)} nodes are available"
        listed = ", ".join(sorted(f"{count} {why}" for why, count in reasons.items()))
        full = any(why.startswith(("Insufficient", "Too many")) for why in reasons)
        helped = (
            f"{len(nodes)} No preemption victims found for incoming pod."
            if full
            else f"{len(nodes)} Preemption is not helpful for scheduling."
        )
        return "", f"{head}: {listed}. preemption: {head}: {helped}"

    def _unfit(self, pod: Json, each: Json) -> list[str]:
        name = each["metadata"]["name"]
        if not conditions.holds(each, "Ready"):
            return ["node(s) had untolerated taint {node.kubernetes.io/unreachable: }"]
        if each["spec"].get("unschedulable"):
            return ["node(s) were unschedulable"]
        wanted = pod["spec"].get("nodeSelector") or {}
        if any(each["metadata"]["labels"].get(key) != value for key, value in wanted.items()):
            return ["node(s) didn't match Pod's node affinity/selector"]
        here = [
            other
            for other in self._api.store.objects(PODS)[0]
            if other["spec"].get("nodeName") == name and other["status"]["phase"] not in _ENDED
        ]
        room = each["status"]["allocatable"]
        short = ["Too many pods"] if len(here) >= int(room["pods"]) else []
        for what in ("cpu", "memory"):
            want = asked(pod, what)
            if want and sum((asked(other, what) for other in here), Decimal(0)) + want > amount(room[what]):
                short.append(f"Insufficient {what}")
        return short
