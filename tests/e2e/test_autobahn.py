"""RFC 6455 by somebody else's judgement: the Autobahn cases 1 to 7 and 10 against the session's own wire and loop."""

from __future__ import annotations

import asyncio
import queue
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import kosoku
import pytest

from oz_worker.dial import Dialler, Target, target
from oz_worker.link.acks import Origin
from oz_worker.link.message import BINARY, TEXT
from oz_worker.link.session import Around, Limits, Over, Session
from oz_worker.link.traffic import Directive
from oz_worker.link.wire import Wire, upgrade
from oz_worker.pulse import Pulse
from oz_worker.resolver import Resolver
from oz_worker.settings import LinkOptions
from oz_worker.threads import Waker
from oz_worker.timing import Deadline
from oz_worker.trust import Trust
from tests.link.book import Book

CASES = ["1.*", "2.*", "3.*", "4.*", "5.*", "6.*", "7.*", "10.*"]
LANES = 4


class Echo(Session):
    """The real session, which sends every message back, binary ones too."""

    def _message(self, content: str | bytes) -> None:
        if isinstance(content, str):
            self._send(content.encode(), TEXT)
        else:
            self._send(content, BINARY)


class Client:
    """Dials one case after the other."""

    def __init__(self) -> None:
        self._waker = Waker()
        self._book = Book(self._waker)
        self._pulse = Pulse(self._waker, lambda: float("inf"))
        resolver = Resolver(self._waker)
        self._dialler = Dialler(resolver, self._pulse, trust=Trust(environ={}), dead_after=20, environ={})

    def run(self, url: str, kind: type[Session]) -> str:
        """Stay until the connection ends; why it did."""
        where: Target = target(url)
        deadline = Deadline(20)
        wire = Wire(self._dialler.open(where, deadline), self._pulse)
        try:
            session = kind(
                upgrade(wire, where, {}, deadline),
                wire,
                connection=random.Random(1).randbytes(8).hex(),
                around=Around(LinkOptions(), Limits(), self._pulse, self._book, Directive, Origin(), lambda: 0.0),
            )
            session.run()
        except Over as over:
            return str(over)
        finally:
            wire.close()
        raise AssertionError("a session without FLUSH ends by raising")

    def close(self) -> None:
        self._waker.close()

    def count(self, url: str) -> int:
        self.run(f"{url}/getCaseCount", Session)
        return int(self._book.got.get_nowait())


def _serve(ready: queue.Queue[str], results: queue.Queue[Any]) -> None:
    async def serve() -> None:
        async with kosoku.run_fuzzingserver(CASES, port=0) as server:
            ready.put(f"ws://{server.address}:{server.port}")
            try:
                results.put(await server.get_result())
            except kosoku.FailureError as failure:
                results.put(failure.results)

    asyncio.run(serve())


def _run(url: str, cases: range) -> None:
    with closing(Client()) as client:
        for case in cases:
            client.run(f"{url}/runCase?case={case}&agent=oz-worker", Echo)


@pytest.mark.timeout(100)
def test_the_session_conforms_to_every_autobahn_case_it_can_meet() -> None:
    ready: queue.Queue[str] = queue.Queue()
    results: queue.Queue[Any] = queue.Queue()
    server = threading.Thread(target=_serve, args=(ready, results), daemon=True)
    server.start()
    url = ready.get(timeout=30)
    with closing(Client()) as client:
        count = client.count(url)
        with ThreadPoolExecutor(LANES) as lanes:  # most of a case's time is the server's own patience
            for lane in [lanes.submit(_run, url, range(first, count + 1, LANES)) for first in range(1, LANES + 1)]:
                lane.result()
        client.run(f"{url}/updateReports?agent=oz-worker", Session)
    found = results.get(timeout=30)
    server.join(30)
    bad = [f"{r.case_id}: {r.behavior.value}, {r.behavior_close.value}: {r.result}" for r in found if not r.passed]
    assert bad == []
    assert len(found) == count > 200
