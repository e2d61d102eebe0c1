"""The cluster of the tests."""

from __future__ import annotations

from typing import Iterator

import pytest

from tests.cluster.cluster import Cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """One cluster for all tests of a process, left as it was found."""
    with Cluster() as found:
        yield found
