"""What is known of each Job that is followed: the Job, its pods, what the cluster said of them, and its verdict.

Fed by the watch, on whose thread the verdicts are spoken. A Job is known by the unit that stands on it, and once its
uid is known by that: one that bears the same name before or after it is another one.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from typing import Any, Callable, Collection, Mapping

from oz_worker.backends import job_facts
from oz_worker.backends.base import Unit
from oz_worker.backends.job_object import unit_of
from oz_worker.backends.job_waits import Limits
from oz_worker.backends.job_whose import is_over
from oz_worker.cluster import Cluster, ClusterError, Object
from oz_worker.model import ExitFacts

logger = logging.getLogger(__name__)

EVENTS_SECONDS = 5.0
"""At least so long between two looks at events."""
_FEW = 4
"""The events of so many things are asked for one by one; of more, the warnings of the whole namespace are."""
_EVENT_PAGES = 6
CATCH_UP_SECONDS = 5.0
"""How long a Job that failed waits for what the watch of pods has to tell."""
_FAR = float("inf")


class Card:
    """One followed Job. The board's lock guards every field but `unit`. Times are monotonic."""

    def __init__(self, unit: Unit) -> None:
        self.unit = unit
        self.exists_since = _FAR  # from then on its absence from a list means that it is gone
        self.uid = ""
        self.deleted: set[str] = set()  # uids of Jobs of this unit that were told to be gone while it had none yet
        self.job: Object | None = None
        self.pods: Mapping[str, Object] = {}  # by uid, those that are gone too; never changed in place: others read it
        self.waits: job_facts.Waits = job_facts.NO_WAITS
        self.look_at = _FAR
        self.wants_events = False
        self.asked_at = _FAR  # what began to be listed after this is fresh enough for a verdict that ends something
        self.lacks_since = _FAR  # it failed then, and no pod has told how
        self.asks = False  # a list is to be asked for
        self.gone_at = _FAR  # from then on it does not exist any more
        self.judged = False  # its verdict is spoken
        self.began = False  # its agent was seen to run

    @property
    def gone(self) -> bool:
        """Whether the Job is proven not to exist any more, and therefore nothing of it."""
        return self.gone_at < _FAR

    @property
    def existed(self) -> bool:
        """Whether the Job is known to have been made."""
        return self.exists_since < _FAR or self.job is not None


class Board:
    """The Jobs that are followed, by unit. Safe from any thread.

    The lock guards the cards and is never held while anything is called but the pure judge. *late* hears of a Job of a
    unit that is not followed; *look* asks the watch to list everything.
    """

    def __init__(
        self,
        cluster: Cluster,
        limits: Limits,
        late: Callable[[Object], None],
        look: Callable[[], None],
    ) -> None:
        self._cluster = cluster
        self._limits = limits
        self._late = late
        self._look = look
        self._lock = threading.Lock()
        self._cards: dict[str, Card] = {}
        self._began = {"jobs": 0.0, "pods": 0.0}  # when the last lists began; the watch's thread only, as the last one
        self._events: dict[str, list[Object]] = {}  # by the uid of what they are about; its lists only grow
        self._events_at = 0.0

    # -- from any thread

    def follow(self, unit: Unit, job: Object | None = None) -> None:
        """Hear of the end of the unit's *job*, or of one that is about to be made: then its absence is no end yet."""
        with self._lock:
            card = self._cards.setdefault(unit.name, Card(unit))
            card.unit = unit
            unit.outside = functools.partial(self._waits_for, unit.name)
            if job is not None:
                if card.job is None or card.job["metadata"]["uid"] != job["metadata"]["uid"]:
                    card.job = job_facts.pruned(job)  # else the watch was faster, and knows more
                card.uid = str(job["metadata"]["uid"])
                card.exists_since = min(card.exists_since, time.monotonic())
                card.look_at = 0.0
                if card.uid in card.deleted:
                    card.gone_at = min(card.gone_at, time.monotonic())

    def mute(self, name: str) -> None:
        """Speak no verdict on the unit: its end is about to be made, and told, by who calls this."""
        with self._lock:
            if (card := self._cards.get(name)) is not None:
                card.judged = True

    def drop(self, name: str) -> None:
        """Hear no more of the unit."""
        with self._lock:
            self._cards.pop(name, None)

    def card(self, name: str) -> Card | None:
        """What is known of a unit; to be read only."""
        with self._lock:
            return self._cards.get(name)

    def _waits_for(self, name: str) -> str:
        """What keeps the agent of a unit from starting."""
        with self._lock:
            card = self._cards.get(name)
            if card is None or card.job is None or card.judged or card.began:
                return ""
            card.began = started(card)  # remembered: of those that run nothing is asked again
            if card.began:
                return ""
            return job_facts.waits_for(self._seen(card, card.job, False), self._limits)

    def is_gone(self, name: str) -> bool:
        """Whether the unit's Job is proven gone."""
        card = self.card(name)
        return card is not None and card.gone

    # -- what the watch hears, on its thread

    def listed(self, kind: str, things: list[dict[str, Any]], began: float) -> None:
        """Everything that exists."""
        self._began[kind] = began
        if kind == "jobs":
            self._list_jobs(things, began)
        else:
            self._list_pods(things)

    def _list_jobs(self, things: list[dict[str, Any]], began: float) -> None:
        present = {unit_of(thing) for thing in things}
        for thing in things:
            self._job(thing)
        with self._lock:
            missing = [card for name, card in self._cards.items() if name not in present and card.exists_since <= began]
        for card in missing:
            self._vanished(card)

    def _list_pods(self, things: list[dict[str, Any]]) -> None:
        uids = {str(thing["metadata"]["uid"]) for thing in things}
        with self._lock:
            cards = list(self._cards.values())
            for card in cards:
                card.pods = {uid: pod if uid in uids else job_facts.gone(pod) for uid, pod in card.pods.items()}
        for thing in things:
            self._pod(thing)
        for card in cards:
            self._judge(card)

    def changed(self, kind: str, change: str, thing: dict[str, Any]) -> None:
        """One thing is new, another, or gone."""
        if kind == "pods":
            card = self._pod(thing, gone=change == "DELETED")
            if card is not None:
                self._judge(card)
        elif change != "DELETED":
            self._job(thing)
        elif (card := self._of(thing)) is not None and self._is_deleted(card, thing):
            self._vanished(card)

    def outage(self) -> None:
        """The cluster does not answer: what a pod waits for has no time to come meanwhile, so its time begins anew."""
        with self._lock:
            for card in self._cards.values():
                card.waits = job_facts.NO_WAITS

    def busy(self) -> bool:
        """Whether anything is followed whose end is not known."""
        with self._lock:
            return any(not card.judged for card in self._cards.values())

    def due(self) -> float:
        """Speak the verdicts that time brings; the monotonic time of the next."""
        now = time.monotonic()
        with self._lock:
            due = [card for card in self._cards.values() if not card.judged and card.look_at <= now]
            curious = any(card.wants_events and not card.judged for card in self._cards.values())
        if curious and now >= self._events_at:
            self._read_events()
            with self._lock:
                due = [card for card in self._cards.values() if not card.judged and (card in due or card.wants_events)]
        for card in due:
            self._judge(card)
        with self._lock:
            waiting = [card for card in self._cards.values() if not card.judged]
            next_events = self._events_at if any(card.wants_events for card in waiting) else _FAR
            return min([next_events, *(card.look_at for card in waiting)])

    # -- small steps

    def _is_deleted(self, card: Card, thing: dict[str, Any]) -> bool:
        """Note the last state of a Job; whether it is the card's."""
        uid = str(thing["metadata"]["uid"])
        with self._lock:
            if not card.uid:  # the answer to its creation is still on its way, or it is an earlier one
                card.deleted.add(uid)
            if card.uid in ("", uid):
                card.job = job_facts.pruned(thing)
            return card.uid == uid

    def _of(self, thing: Object) -> Card | None:
        with self._lock:
            return self._cards.get(unit_of(thing))

    def _job(self, thing: dict[str, Any]) -> None:
        card = self._of(thing)
        if card is None:
            if not is_over(thing):
                self._late(thing)
            return
        with self._lock:
            if card.uid not in ("", str(thing["metadata"]["uid"])):
                return
            card.job = job_facts.pruned(thing)
        self._judge(card)

    def _pod(self, thing: dict[str, Any], *, gone: bool = False) -> Card | None:
        card = self._of(thing)
        if card is not None:
            pod = job_facts.censored(job_facts.pruned(thing), card.unit.secrets)
            with self._lock:
                card.pods = {**card.pods, str(thing["metadata"]["uid"]): job_facts.gone(pod) if gone else pod}
        return card

    def _judge(self, card: Card) -> None:
        """Speak its verdict, if there is one now."""
        if card.judged:
            card.unit.notify()  # who ends what it still runs waits for this
            return
        with self._lock:
            facts = self._of_vanished(card) if card.gone else self._of_existing(card)
            card.judged = facts is not None
            asks, card.asks = card.asks, False
        if facts is not None:
            card.unit.ended(facts)
        if asks:
            self._look()

    def _of_existing(self, card: Card) -> ExitFacts | None:
        """Requires holding the lock."""
        if card.job is None or not card.uid:  # before its uid is known, it may be an earlier Job of this unit
            card.look_at = _FAR
            return None
        fresh = min(self._began.values()) >= card.asked_at
        if _lacks_pods(card) and not fresh:
            if self._may_catch_up(card):
                return None
            verdict = job_facts.Verdict(None, card.waits, wants_fresh=True)
        else:
            verdict = self._verdict(card, card.job, fresh)
        card.waits, card.wants_events, card.look_at = verdict.waits, verdict.wants_events, verdict.look_at
        if verdict.wants_fresh:
            card.asks = card.asked_at == _FAR
            card.asked_at, card.look_at = min(card.asked_at, time.monotonic()), _FAR
        else:
            card.asked_at = _FAR
        return verdict.facts

    def _of_vanished(self, card: Card) -> ExitFacts | None:
        """Requires holding the lock."""
        if _lacks_pods(card) and self._may_catch_up(card):
            return None
        return job_facts.vanished(card.job, tuple(card.pods.values()))

    @staticmethod
    def _may_catch_up(card: Card) -> bool:
        """Whether the watch of pods still has time to tell how they ended, which a list of what exists cannot.

        Requires holding the lock.
        """
        now = time.monotonic()
        card.lacks_since = min(card.lacks_since, now)
        card.look_at = card.lacks_since + CATCH_UP_SECONDS
        return now < card.look_at

    def _verdict(self, card: Card, job: Object, fresh: bool) -> job_facts.Verdict:
        return job_facts.judge(self._seen(card, job, fresh), self._limits, time.monotonic())

    def _seen(self, card: Card, job: Object, fresh: bool) -> job_facts.Seen:
        owners = [job, *card.pods.values()]
        events = [event for owner in owners for event in self._events.get(str(owner["metadata"]["uid"]), ())]
        return job_facts.Seen(job, tuple(card.pods.values()), tuple(events), card.waits, fresh)

    def _vanished(self, card: Card) -> None:
        with self._lock:
            card.gone_at = min(card.gone_at, time.monotonic())
        self._judge(card)  # an end that is known already stays
        card.unit.notify()

    def _read_events(self) -> None:
        """What the cluster said of the Jobs and pods that nothing else explains."""
        with self._lock:
            curious = [card for card in self._cards.values() if card.wants_events and not card.judged]
            uids = {uid for card in curious for uid in (card.uid, *card.pods) if uid}
        try:
            self._events = self._all_events_of(uids) if len(uids) <= _FEW else self._complaints_of(uids)
        except ClusterError as error:
            logger.debug("the events cannot be read: %s", error)
        self._events_at = time.monotonic() + EVENTS_SECONDS

    def _all_events_of(self, uids: Collection[str]) -> dict[str, list[Object]]:
        return {uid: self._find_events(f"involvedObject.uid={uid}") for uid in uids}

    def _complaints_of(self, uids: Collection[str]) -> dict[str, list[Object]]:
        """Warnings only: where many tasks run, everything else is thousands of lines.

        That a mount has healed stands in the rest, so that is read for a few; of the others the pod itself says so
        (Kubernetes 1.29), or that nobody complains any more.
        """
        found: dict[str, list[Object]] = {uid: [] for uid in uids}
        for event in self._find_events("type=Warning", pages=_EVENT_PAGES):
            if (uid := job_facts.about(event)) in found:
                found[uid].append(event)
        unmounted = [uid for uid, events in found.items() if any(map(job_facts.is_of_mount, events))]
        return {**found, **self._all_events_of(unmounted[:_FEW])}

    def _find_events(self, fields: str, pages: int = 0) -> list[Object]:
        """Not for long: nobody else's end is heard of meanwhile."""
        timeout = min(self._cluster.timeout, EVENTS_SECONDS)
        return list(self._cluster.find("events", fields=fields, pages=pages, timeout=timeout).items)


def _lacks_pods(card: Card) -> bool:
    """Whether its Job says that it failed, and no pod says how yet."""
    return card.job is not None and job_facts.has_failed(card.job) and all(map(job_facts.is_alive, card.pods.values()))


def started(card: Card) -> bool:
    """Whether the agent of the Job is known to have begun."""
    return any(map(job_facts.agent_started, card.pods.values()))
