"""Fixtures of the tests of container backends."""

from __future__ import annotations

from pathlib import Path
from typing import Iterator

import pytest

from tests.containers.docker_site import DockerSite
from tests.engines.client import Client
from tests.engines.images import Images


@pytest.fixture
def site(tmp_path: Path, engine: Client, images: Images) -> Iterator[DockerSite]:
    """A docker backend over the engine of the session; at its end the base count must hold."""
    site = DockerSite(tmp_path, engine, images)
    yield site
    site.close()
