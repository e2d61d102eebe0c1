"""Receivers that are closed at the end of the test."""

from __future__ import annotations

from typing import Iterator

import pytest

from tests.otlp.receiver import GrpcReceiver, HttpReceiver, Receiver


@pytest.fixture(params=[HttpReceiver, GrpcReceiver], ids=["http", "grpc"])
def receiver(request: pytest.FixtureRequest) -> Iterator[Receiver]:
    """A good receiver of either protocol."""
    receiver: Receiver = request.param()
    yield receiver
    receiver.close()


@pytest.fixture
def http_receiver() -> Iterator[Receiver]:
    """A good receiver over HTTP."""
    receiver = HttpReceiver()
    yield receiver
    receiver.close()
