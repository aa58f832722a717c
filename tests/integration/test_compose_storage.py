"""SeaweedFS with the options of infra/compose.yaml, run natively: who can reach what."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import boto3
import psutil
import pytest
import yaml
from botocore.exceptions import BotoCoreError, ClientError

pytestmark = pytest.mark.integration
COMPOSE = Path(__file__).parents[2] / "infra/compose.yaml"


def test_only_s3_listens_beyond_loopback_and_it_wants_a_signature(tmp_path: Path):
    options = yaml.safe_load(COMPOSE.read_text())["services"]["s3"]["command"]
    ports = dict(zip(("s3", "master", "volume", "filer"), free_ports(4), strict=True))
    command = [option for option in options if not option.startswith(("-dir=", "-s3.port="))]
    command += [f"-dir={tmp_path}", *(f"-{name}.port={port}" for name, port in ports.items())]
    keys = {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "something-secret"}
    weed = str(Path(sys.executable).parent / "weed")
    process = subprocess.Popen([weed, *command], env={"HOME": str(tmp_path), **keys}, stderr=subprocess.DEVNULL)
    try:
        s3 = client(ports["s3"], *keys.values())
        for attempt in range(60):
            try:
                s3.create_bucket(Bucket="sae")
                break
            except (BotoCoreError, ClientError):
                assert attempt < 59
                time.sleep(0.5)
        s3.put_object(Bucket="sae", Key="x", Body=b"1")
        listening = [found.laddr for found in psutil.Process(process.pid).net_connections() if found.status == "LISTEN"]
        reachable = {address.port for address in listening if address.ip != "127.0.0.1"}
        assert reachable == {ports["s3"], ports["s3"] + 10_000}, "S3, and its gRPC, which the network `storage` closes off"
        stranger = client(ports["s3"], "someone", "else")
        for refused in (
            lambda: stranger.get_object(Bucket="sae", Key="x"),
            lambda: stranger.put_object(Bucket="sae", Key="x", Body=b"2"),
            lambda: stranger.create_bucket(Bucket="mlflow"),
        ):
            with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
                refused()
        with pytest.raises(ClientError):
            s3.put_object(Bucket="missing", Key="x", Body=b"1")
    finally:
        process.kill()
        process.wait()


def client(port: int, access: str, secret: str):
    return boto3.client(
        "s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1", aws_access_key_id=access,
        aws_secret_access_key=secret,
    )  # fmt: skip


def free_ports(count: int) -> list[int]:
    """Ports that are free, and those 10,000 above them, where SeaweedFS has gRPC."""
    found: list[int] = []
    for port in range(20_000 + hash(time.monotonic_ns()) % 5_000, 32_000):
        with socket.socket() as low, socket.socket() as high:
            try:
                low.bind(("127.0.0.1", port))
                high.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise AssertionError
