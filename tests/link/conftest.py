"""A server of the test's own and a link to it, over both schemes."""

from __future__ import annotations

import contextlib
import ssl
from typing import Any, ContextManager, Iterator, Protocol

import pytest

from oz_worker.settings import LinkOptions
from tests.conftest import Certificates
from tests.link.book import FAST, Running
from tests.rawserver import RawServer, Script


class Line(Protocol):
    """A server that runs *script*, and a link to it."""

    def __call__(
        self, script: Script, options: LinkOptions = FAST, **more: Any
    ) -> ContextManager[tuple[RawServer, Running]]: ...


@pytest.fixture
def line(tls: ssl.SSLContext | None, certificates: Certificates) -> Line:
    """Over ws and over wss."""

    @contextlib.contextmanager
    def open_line(script: Script, options: LinkOptions = FAST, **more: Any) -> Iterator[tuple[RawServer, Running]]:
        ca_file = certificates.ca_file if tls else ""
        with RawServer(script, tls=tls) as server, Running(server.url, options=options, ca_file=ca_file, **more) as run:
            yield server, run

    return open_line
