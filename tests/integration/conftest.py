"""Real servers on loopback, each started once, and only for the tests that use it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from seaweed import Seaweed

from components import storage
from components.patience import patience


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """SeaweedFS; the environment of this process points at it."""
    server = Seaweed(tmp_path_factory.mktemp("seaweed"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        server.start()
        try:
            server.wait_until_ready()
            with patience(60):  # it listens a little before it works
                storage.put_bytes(b"", "s3://acts/ready")
            yield server
        finally:
            server.stop()


@pytest.fixture(scope="session")
def s3(s3_server: Seaweed) -> str:
    """A bucket's URL."""
    return "s3://acts"
