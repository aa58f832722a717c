"""Real servers on loopback, each started once, and only for the tests that use it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

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


# SAELens 6.54 with what its SAE classes import beyond our own environment.
PACKAGES = [
    "sae-lens==6.54.12", "transformer-lens==2.16.1", "einops==0.8.2", "jaxtyping==0.3.11", "wadler-lindig==0.1.8",
    "fancy-einsum==0.0.3", "beartype==0.14.1", "better-abc==0.0.3", "simple-parsing==0.1.8", "docstring-parser==0.18.0",
    "babe==0.0.7", "py2store==0.1.24", "dol==0.3.100", "config2py==0.1.76", "nltk==3.9.2", "plotly==6.5.0",
    "plotly-express==0.4.1", "narwhals==2.29.0", "typeguard==4.6.0", "wandb==0.31.0",
]  # fmt: skip


@pytest.fixture(scope="session")
def saelens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with SAELens, which asks for another torch than ours: it goes there without its requirements, and processes
    that should see it get that folder on their path. Skips with pip's words where it cannot be installed."""
    folder = tmp_path_factory.mktemp("saelens")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"SAELens cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    return folder
