"""The rig for registries itself: passwords, TLS under a name, and every misbehaviour once."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import Certificates
from tests.engines.bad_registry import BadRegistry, Fault
from tests.engines.client import Client, EngineError
from tests.engines.fixtures import OwnEngine, OwnRegistry
from tests.engines.registry import Registry
from tests.rig import SAFETY, until

SIZE = 1 << 18


@pytest.fixture(scope="module")
def published(engine: Client, registry: Registry) -> str:
    """The name in the registry of an image with one layer of SIZE bytes, which the engine has not."""
    repository = f"rig/layer:{os.getpid()}"
    registry.publish(engine, repository, base=False, files={"data": (0o644, os.urandom(SIZE))})
    return repository


def test_a_registry_with_a_password_and_an_authority_of_its_own(
    own_engine: OwnEngine, own_registry: OwnRegistry, certificates: Certificates, tmp_path: Path
) -> None:
    plain = own_registry()
    certificate = certificates.ca.issue_cert("reg.test")
    closed = own_registry(password="s3cret", certificate=certificate, data=plain.data)
    unknown = own_registry(certificate=certificate, data=plain.data)
    engine = own_engine(hosts={"reg.test": "::1"}, certs={closed.address: certificates.ca_file})
    plain.publish(engine, "a/b:1", base=False, files={"x": (0o644, b"1")})
    wanted = closed.reference("a/b:1")
    assert b"no basic auth credentials" in engine.cli("pull", wanted, check=False).stderr
    with pytest.raises(EngineError, match="401 Unauthorized"):
        closed.log_in(engine, "wrong")
    closed.log_in(engine)
    engine.cli("pull", wanted)
    assert b"unknown authority" in engine.cli("pull", unknown.reference("a/b:1"), check=False).stderr
    assert "reg.test" not in Path("/etc/hosts").read_text()
    assert not Path("/etc/docker/certs.d", closed.address).exists()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault(status=500), b"500 Internal Server Error"),
        (Fault(status=429), b"toomanyrequests"),
        (Fault(status=401), b"no basic auth credentials"),
        (Fault(status=401, only="manifests"), b"unauthorized: on purpose"),
    ],
)
def test_a_refusal(engine: Client, bad_registry: BadRegistry, published: str, fault: Fault, said: bytes) -> None:
    bad_registry.fault = fault
    assert said in engine.cli("pull", bad_registry.reference(published), check=False).stderr
    assert bad_registry.count("blobs") == 0


@pytest.mark.parametrize(
    "fault",
    [Fault(hang="manifests"), Fault(stall_at=SIZE // 2), Fault(bytes_per_second=1), Fault(cut_at=SIZE // 2)],
    ids=["hang", "stall", "trickle", "cut"],
)
def test_a_pull_goes_on_when_the_fault_is_over(
    engine: Client, bad_registry: BadRegistry, published: str, fault: Fault
) -> None:
    bad_registry.fault = fault
    reference = bad_registry.reference(published)
    pull = subprocess.Popen([engine.program, "pull", reference], env=engine.env, stdout=subprocess.PIPE)
    asked = ("manifests", "HEAD") if fault.hang else ("blobs", "GET")
    until(lambda: bad_registry.count(*asked) >= (1 if fault.hang else 2), "the request that hangs")
    assert pull.poll() is None
    bad_registry.fault = Fault()
    printed = pull.communicate(timeout=SAFETY)[0].decode()
    assert (pull.returncode, f"Downloaded newer image for {reference}" in printed) == (0, True)
    assert bad_registry.count("manifests", "HEAD") == 1
    engine.cli("rmi", reference)
