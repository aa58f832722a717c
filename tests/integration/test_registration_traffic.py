"""What registering moves, counted between the client and the S3 server that holds MLflow's artifacts."""

from __future__ import annotations

import socket
import sys
from contextlib import closing
from pathlib import Path

import pytest
from mlflow import MlflowClient
from seaweed import FaultyProxy, Seaweed

from components.registry import registration
from components.registry.gates import Gates
from components.tracking.runs import tracked_run
from components.tracking.settings import TrackingSettings
from components.tracking.store import connect

sys.path.append(str(Path(__file__).parents[1] / "components"))
from test_registration import candidate

pytestmark = pytest.mark.integration


class CountingProxy(FaultyProxy):
    """Breaks nothing; counts the bytes that go up and come down."""

    FAULTS = (None,)

    def _pump(self, source: socket.socket, sink: socket.socket, limit: int | None) -> None:
        direction = "down" if source.getpeername()[1] == self.target else "up"

        class Counted:
            def recv(inner, size: int) -> bytes:
                piece = source.recv(size)
                self.met[direction] += len(piece)
                return piece

            def shutdown(inner, how: int) -> None:
                source.shutdown(how)

        super()._pump(Counted(), sink, limit)  # type: ignore[arg-type]


def test_the_weights_go_up_once_and_come_down_once(s3_server: Seaweed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = candidate(tmp_path / "sae", d_in=512, d_sae=4096)
    size = (made.folder / "sae_weights.safetensors").stat().st_size
    assert size > 16e6
    proxy = CountingProxy(s3_server.port)
    with closing(proxy):
        monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        uri = f"sqlite:///{tmp_path}/mlflow.db"
        settings = TrackingSettings(uri=uri, registered_model=made.name, experiment="on-s3")
        MlflowClient(uri).create_experiment("on-s3", artifact_location=f"s3://mlflow/{tmp_path.name}")
        with tracked_run(settings, "unused", "traffic", made.run_digest, {}, {}) as run:
            _, decision = registration.register(run, made, Gates(evaluation_tokens=1))
    assert decision.alias == "champion"
    assert connect(settings, "unused").get_model_version_by_alias(made.name, "champion")
    assert size <= proxy.met["up"] < 1.2 * size
    assert size <= proxy.met["down"] < 1.2 * size
