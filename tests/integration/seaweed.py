"""SeaweedFS as an S3 server on loopback, and a proxy that does to requests what a good server does not."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

KEYS = {"AWS_ACCESS_KEY_ID": "foundry-test", "AWS_SECRET_ACCESS_KEY": "planted-secret-31415", "AWS_DEFAULT_REGION": "us-east-1"}
LIMITED = {"AWS_ACCESS_KEY_ID": "foundry-limited", "AWS_SECRET_ACCESS_KEY": "planted-secret-16180"}
WEED = str(Path(sys.executable).parent / "weed")


def free_ports(count: int) -> list[int]:
    """Ports that are free, with the one 10,000 above too (SeaweedFS puts gRPC there)."""
    found: list[int] = []
    for port in range(18_000, 20_000):
        try:
            for candidate in (port, port + 10_000):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", candidate))
        except OSError:
            continue
        found.append(port)
        if len(found) == count:
            return found
    raise OSError("no free ports")


class Seaweed:
    """A server with two buckets, `acts` and `mlflow`, that can be killed and started again on the same data and ports."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        credentials = [{"accessKey": KEYS["AWS_ACCESS_KEY_ID"], "secretKey": KEYS["AWS_SECRET_ACCESS_KEY"]}]
        identity = {"name": "test", "credentials": credentials, "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
        # The administrator's first write would make a bucket; this one may only use those that are there.
        limited = {
            "name": "limited",
            "credentials": [{"accessKey": LIMITED["AWS_ACCESS_KEY_ID"], "secretKey": LIMITED["AWS_SECRET_ACCESS_KEY"]}],
            "actions": ["Read", "Write", "List"],
        }
        (folder / "id.json").write_text(json.dumps({"identities": [identity, limited]}))
        self.port, self.master, self.volume, self.filer = free_ports(4)
        self.environment = {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}"}

    def start(self) -> None:
        command = [
            WEED, "mini", f"-dir={self.folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.port={self.port}",
            f"-s3.config={self.folder}/id.json", "-master.telemetry=false", "-admin.ui=false", "-webdav=false",
            "-bucket=acts,mlflow", f"-master.port={self.master}", f"-volume.port={self.volume}", f"-filer.port={self.filer}",
            f"-filer.localSocket={self.folder}/f.sock", "-s3.cacheCapacityMB=64",
        ]  # fmt: skip
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def wait_until_ready(self) -> None:
        for _ in range(240):
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=1):
                    return
            except OSError:
                assert self.process.poll() is None, (self.folder / "log").read_text()[-4000:]
                time.sleep(0.25)
        raise TimeoutError("the S3 server did not come up")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)


class FaultyProxy:
    """Forwards connections to a port; some of them are answered by a 503, a 500, nothing, or half of the answer."""

    FAULTS = (None, "slow down", None, "internal error", None, "hang up", None, "cut the answer short")

    def __init__(self, port: int) -> None:
        self.target = port
        self.met: Counter[str] = Counter()
        self._count = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            fault = self.FAULTS[self._count % len(self.FAULTS)]
            self._count += 1
            threading.Thread(target=self._serve, args=(client, fault), daemon=True).start()

    def _serve(self, client: socket.socket, fault: str | None) -> None:
        with client:
            if fault is not None:
                self.met[fault] += 1
            if fault == "hang up":
                client.recv(100)
                return
            if fault in ("slow down", "internal error"):
                self._answer(client, fault)
                return
            with socket.create_connection(("127.0.0.1", self.target)) as server:
                limit = 3_000 if fault == "cut the answer short" else None
                back = threading.Thread(target=self._pump, args=(server, client, limit), daemon=True)
                back.start()
                self._pump(client, server, None)
                back.join()

    def _answer(self, client: socket.socket, fault: str) -> None:
        request = b""
        while b"\r\n\r\n" not in request:
            piece = client.recv(65_536)
            if not piece:
                return
            request += piece
        code, name = (503, "SlowDown") if fault == "slow down" else (500, "InternalError")
        body = f"<?xml version='1.0'?><Error><Code>{name}</Code><Message>Please reduce your request rate.</Message></Error>"
        lines = [f"HTTP/1.1 {code} Fault", "Content-Type: application/xml", f"Content-Length: {len(body)}", "Connection: close"]
        client.sendall("\r\n".join([*lines, "", body]).encode())
        client.settimeout(1)
        with suppress(OSError):  # what is still being sent; a reset would hide the answer
            while client.recv(65_536):
                pass

    def _pump(self, source: socket.socket, sink: socket.socket, limit: int | None) -> None:
        passed = 0
        with suppress(OSError):
            while piece := source.recv(65_536):
                passed += len(piece)
                if limit is not None and passed > limit:
                    break
                sink.sendall(piece)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
