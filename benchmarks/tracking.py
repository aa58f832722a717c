"""What tracking costs a training: `python benchmarks/tracking.py`.

Trains an SAE on random activations, tracked by a real MLflow server over HTTP on this machine, and prints the share of the
training's time that its own thread spends handing points over, and the share of a CPU that the sending thread uses. The
server's own work is not counted: it belongs to another machine.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

import torch

from components.sae.architectures.relu import ReLUSAE, ReLUSettings
from components.sae.coder import Progress
from components.tracking.runs import tracked_run
from components.tracking.settings import TrackingSettings

POINT = (
    "loss", "reconstruction_loss", "sparsity_loss", "explained_variance", "l0", "dead_fraction", "gradient_norm",
    "learning_rate", "sparsity_coefficient",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--log-steps", type=int, nargs="+", default=[20, 1], help="steps between two points")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sae-bench-") as folder:
        server, uri = start_server(folder)
        try:
            for every in arguments.log_steps:
                settings = TrackingSettings(uri=uri)
                with tracked_run(settings, folder, "benchmark", f"every-{every}", {}, {}) as run:
                    result = train(run, arguments.seconds, arguments.batch_size, every)
                print(json.dumps({"log_steps": every, **result}), flush=True)
        finally:
            server.terminate()
            server.wait()


def train(run, seconds: float, batch_size: int, every: int) -> dict:
    sae = ReLUSAE.autoencoder(ReLUSettings(d_sae=1024, sparsity_coefficient=1.0), 128)
    sae.initialise(0)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    x = torch.randn(batch_size, 128)
    handing, steps, points = 0.0, 0, 0
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        total = sae.losses(x, x, Progress(1, 1)).total
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        if steps % every == 0:
            value = total.item()
            before = time.monotonic()
            run.add_points([{"tokens": float(steps * batch_size), **dict.fromkeys(POINT, value)}])
            handing += time.monotonic() - before
            points += 1
    total = time.monotonic() - started
    run.flush()
    return {
        "tokens_per_second": round(steps * batch_size / total),
        "points": points,
        "handing_over_share": round(handing / total, 6),
        "sending_cpu_share": round(run.buffer.sending_seconds / total, 6),
    }


def start_server(folder: str) -> tuple[subprocess.Popen, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    database = {"MLFLOW_BACKEND_STORE_URI": f"sqlite:///{folder}/mlflow.db"}
    environment = {**os.environ, **database, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return server, f"http://127.0.0.1:{port}"
        except OSError:
            assert server.poll() is None, "the MLflow server ended"
            time.sleep(0.25)


if __name__ == "__main__":
    main()
