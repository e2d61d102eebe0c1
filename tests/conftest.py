"""Fixtures shared by all tests: certificates for loopback, both schemes, a rig with its control plane, engines."""

from __future__ import annotations

import signal
import ssl
from pathlib import Path
from typing import Iterator, NamedTuple

import pytest
import trustme

from oz_worker.devplane.server import ControlPlane
from tests.audit import Guard, guarded
from tests.cluster.fixtures import cluster as cluster
from tests.cluster.fixtures import kubectl as kubectl
from tests.cluster.fixtures import own_cluster as own_cluster
from tests.engines.fixtures import bad_registry as bad_registry
from tests.engines.fixtures import engine as engine
from tests.engines.fixtures import images as images
from tests.engines.fixtures import own_engine as own_engine
from tests.engines.fixtures import own_registry as own_registry
from tests.engines.fixtures import podman as podman
from tests.engines.fixtures import registry as registry
from tests.rig import Rig

for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:  # a shell's `&` and nohup make everything we start deaf to it
        signal.signal(_number, _handler)


LONGEST = ("test_200_jobs_at_once",)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes a minute begins first: at the end one process would be at it while the others have nothing left."""
    items.sort(key=lambda item: not item.name.startswith(LONGEST))


@pytest.fixture(autouse=True)
def no_secret_leaks() -> Iterator[Guard]:
    """Every test, when all its other fixtures are over: no secret that anybody has told of stands where it must not."""
    with guarded() as guard:
        yield guard


class Certificates(NamedTuple):
    """`server` is what a good server uses; `ca_file` is the authority that a worker must trust for it."""

    ca: trustme.CA
    ca_file: str
    server: ssl.SSLContext


def server_context(certificate: trustme.LeafCert) -> ssl.SSLContext:
    """A server's context with *certificate*."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """An authority of our own and a server certificate for loopback."""
    ca = trustme.CA()
    path = Path(tmp_path_factory.mktemp("ca")) / "ca.pem"
    ca.cert_pem.write_to_path(str(path))
    return Certificates(ca, str(path), server_context(ca.issue_cert("127.0.0.1", "localhost", "::1")))


@pytest.fixture(params=["ws", "wss"])
def tls(request: pytest.FixtureRequest, certificates: Certificates) -> ssl.SSLContext | None:
    """The server's context, None for ws: every test that takes it runs over both."""
    return certificates.server if request.param == "wss" else None


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """A place for a worker with the direct backend, over ws."""
    with ControlPlane() as plane:
        rig = Rig(tmp_path, plane)
        try:
            yield rig
        finally:
            rig.close()


@pytest.fixture
def both_rigs(tmp_path: Path, tls: ssl.SSLContext | None, certificates: Certificates) -> Iterator[Rig]:
    """The same over ws and over wss."""
    with ControlPlane(tls=tls) as plane:
        rig = Rig(tmp_path, plane, ca_file=certificates.ca_file if tls else "")
        try:
            yield rig
        finally:
            rig.close()
