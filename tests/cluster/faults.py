"""Misbehaviour of the API on command: requests that fail, hang or are cut, and watches that end in every way."""

from __future__ import annotations

import contextlib
import threading
import time
from types import TracebackType
from typing import Callable, Iterator

from tests.cluster.front import Front
from tests.cluster.refusals import Json, Refused
from tests.cluster.requests import Request
from tests.cluster.store import Store
from tests.cluster.watching import Watch

_SAID = {
    401: ("Unauthorized", "Unauthorized"),
    403: ("Forbidden", "forbidden"),
    404: ("NotFound", "the server could not find the requested resource"),
    409: (
        "Conflict",
        'Operation cannot be fulfilled on resourcequotas "quota": the object has been modified; please apply your'
        " changes to the latest version and try again",
    ),
    410: ("Expired", "too old resource version: 1 (1000)"),
    429: ("TooManyRequests", "the server has received too many requests and has asked us to try again later"),
    500: ("InternalError", "Internal error occurred: etcdserver: request timed out"),
    503: ("ServiceUnavailable", "the server is currently unable to handle the request"),
    504: ("Timeout", "Timeout: request did not complete within the allotted timeout"),
}


class Cut(Exception):
    """The connection of a request ends without an answer."""


class Fault:
    """One way in which requests that match fail, until it is ended; also a context manager that ends it."""

    def __init__(self, matches: Callable[[Request], bool], act: Callable[[Fault], None], times: int | None) -> None:
        self.matches = matches
        self._act = act
        self._lock = threading.Lock()  # guards _left
        self._left = times
        self.ended = threading.Event()
        self.met = 0
        """How many requests it has hit."""

    def meet(self, request: Request) -> None:
        with self._lock:
            if self.ended.is_set() or self._left == 0 or not self.matches(request):
                return
            if self._left is not None:
                self._left -= 1
            self.met += 1
        self._act(self)

    def end(self) -> None:
        self.ended.set()

    def __enter__(self) -> Fault:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


class ApiFaults:
    """What the API server does wrong, on command. Any thread may call any method."""

    def __init__(self, store: Store, front: Callable[[], Front]) -> None:
        self._store = store
        self._front = front
        self._lock = threading.Lock()  # guards _faults and _watches
        self._faults: list[Fault] = []
        self._watches: list[Watch] = []
        self._lost: list[Callable[[Json], bool]] = []
        self.expired_tokens: set[str] = set()

    # Requests

    def meet(self, request: Request) -> None:
        """Let the request suffer what is ordered for it. Raises Refused or Cut."""
        with self._lock:
            faults = list(self._faults)
        for fault in faults:
            fault.meet(request)

    def _order(self, act: Callable[[Fault], None], verb: str, resource: str, path: str, times: int | None) -> Fault:
        def matches(request: Request) -> bool:
            target = request.target
            plural = target.resource.plural if target.resource else ""
            full = f"{plural}/{target.subresource}" if target.subresource else plural
            return verb in ("", target.verb) and resource in ("", full) and path in request.path

        fault = Fault(matches, act, times)
        with self._lock:
            self._faults.append(fault)
        return fault

    def fail(
        self,
        code: int,
        verb: str = "",
        resource: str = "",
        *,
        path: str = "",
        times: int | None = None,
        retry_after: int | None = None,
        message: str = "",
    ) -> Fault:
        """Answer requests with *code*; *times* of them, or until it is ended."""
        reason, text = _SAID.get(code, ("", ""))
        details = {"retryAfterSeconds": retry_after} if retry_after is not None else None
        headers = {"Retry-After": str(retry_after)} if retry_after is not None else {}

        def act(_: Fault) -> None:
            raise Refused(code, reason, message or text, details, headers)

        return self._order(act, verb, resource, path, times)

    def slow(
        self, seconds: float, verb: str = "", resource: str = "", *, path: str = "", times: int | None = None
    ) -> Fault:
        """Answer late."""
        return self._order(lambda fault: void(fault.ended.wait(seconds)), verb, resource, path, times)

    def hang(self, verb: str = "", resource: str = "", *, path: str = "", times: int | None = None) -> Fault:
        """Accept requests and answer none until it is ended; then they are answered."""

        def act(fault: Fault) -> None:
            while not fault.ended.wait(0.1):
                if self._store.closed:
                    raise Cut

        return self._order(act, verb, resource, path, times)

    def cut(self, verb: str = "", resource: str = "", *, path: str = "", times: int | None = None) -> Fault:
        """End the connection instead of an answer."""

        def act(_: Fault) -> None:
            raise Cut

        return self._order(act, verb, resource, path, times)

    def refuse(self) -> None:
        """Nothing listens on the port any more; open connections, watches too, are cut. Until `listen`."""
        self._front().refuse()

    def listen(self) -> None:
        self._front().listen()

    @contextlib.contextmanager
    def down(self) -> Iterator[None]:
        """`refuse`, and `listen` at the end."""
        self.refuse()
        try:
            yield
        finally:
            self.listen()

    def expire(self, token: str) -> None:
        """Answer 401 to *token* from now on."""
        self.expired_tokens.add(token)

    def renew(self, token: str) -> None:
        self.expired_tokens.discard(token)

    # Watches

    def begins(self, watch: Watch) -> None:
        """A stream runs from now on; called by its own thread."""
        watch.dropped = lambda obj: any(lost(obj) for lost in list(self._lost))
        with self._lock:
            self._watches.append(watch)

    def is_over(self, watch: Watch) -> None:
        with self._lock:
            self._watches.remove(watch)

    def watches(self, resource: str = "") -> list[Watch]:
        """The streams that run now."""
        with self._lock:
            return [watch for watch in self._watches if resource in ("", watch.asked.resource.plural)]

    def end_watches(self, how: str = "end", resource: str = "") -> int:
        """End the streams that run: cleanly (`end`), `reset`, or after a line with `gone`, `error` or `garbage`."""
        watches = self.watches(resource)
        for watch in watches:
            watch.order(how)
        self._store.wake()
        return len(watches)

    def silence_watches(self, seconds: float = 1e9, resource: str = "") -> int:
        """Let the streams that run say nothing, not even that they are over; what happens then is lost for them."""
        watches = self.watches(resource)
        for watch in watches:
            watch.silent_until = time.monotonic() + seconds
        return len(watches)

    @contextlib.contextmanager
    def lose_events(self, which: Callable[[Json], bool] = lambda obj: True) -> Iterator[None]:
        """No stream tells of objects for which *which* holds."""
        self._lost.append(which)
        try:
            yield
        finally:
            self._lost.remove(which)

    def forget_history(self) -> None:
        """Compact: every earlier version is too old."""
        self._store.forget()

    def close(self) -> None:
        """End all faults."""
        with self._lock:
            for fault in self._faults:
                fault.end()


def void(_: object) -> None:
    """Nothing, of something."""
