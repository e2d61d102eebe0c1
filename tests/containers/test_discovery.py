"""The engine is found by the rules of its own program: contexts, and TLS variables with client certificates."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import trustme

from oz_worker.errors import NotUsable
from tests.containers.docker_site import DockerSite
from tests.engines.client import Client
from tests.engines.fixtures import OwnEngine
from tests.engines.images import Images, load_images
from tests.hosting import PATIENCE


def runs_a_task(site: DockerSite, environ: dict[str, str]) -> bool:
    backend = site.open(environ=environ)
    unit = site.unit("exit 7")
    backend.prepare(unit)
    backend.start(unit)
    unit.wait_for_end_or_stop(PATIENCE)
    assert backend.clean_up(unit, keep=False) == ""
    return unit.facts is not None and unit.facts.code == 7


def test_by_a_context(site: DockerSite) -> None:
    """Failure 34: by variable, and as the one that `docker context use` made the default."""
    place = {"PATH": site.engine.env["PATH"], "DOCKER_CONFIG": str(site.root / "client"), "HOME": str(site.root)}
    own = Client(site.engine.program, place, "")
    own.cli("context", "create", "lab", "--docker", f"host={site.engine.env['DOCKER_HOST']}")
    assert runs_a_task(site, {**place, "DOCKER_CONTEXT": "lab"})
    own.cli("context", "use", "lab")
    assert runs_a_task(site, place)
    with pytest.raises(NotUsable, match="nowhere"):
        site.open(environ={**place, "DOCKER_CONTEXT": "nowhere"})


def test_by_tls_variables(tmp_path: Path, own_engine: OwnEngine) -> None:
    authority = trustme.CA()
    for name, leaf in (("server", authority.issue_cert("127.0.0.1")), ("client", authority.issue_cert("worker.test"))):
        (tmp_path / name).mkdir()
        authority.cert_pem.write_to_path(str(tmp_path / name / "ca.pem"))
        leaf.cert_chain_pems[0].write_to_path(str(tmp_path / name / "cert.pem"))
        leaf.private_key_pem.write_to_path(str(tmp_path / name / "key.pem"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    files = [f"--tls{flag}={tmp_path}/server/{name}.pem" for flag, name in (("cacert", "ca"), ("cert", "cert"))]
    engine = own_engine(f"--host=tcp://127.0.0.1:{port}", "--tlsverify", *files, f"--tlskey={tmp_path}/server/key.pem")
    images: Images = load_images(engine)
    site = DockerSite(tmp_path, engine, images)
    far = {"PATH": engine.env["PATH"], "HOME": str(tmp_path), "DOCKER_HOST": f"tcp://127.0.0.1:{port}"}
    trusted = {**far, "DOCKER_TLS_VERIFY": "1", "DOCKER_CERT_PATH": str(tmp_path / "client")}
    assert runs_a_task(site, trusted)
    with pytest.raises(NotUsable, match=f"DOCKER_HOST is tcp://127.0.0.1:{port}"):
        site.open(environ=far)
    site.close()
