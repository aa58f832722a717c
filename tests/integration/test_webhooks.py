"""`sae models webhook` against a receiver with https, and what the receiver can check of a call."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import shutil
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import certifi
import pytest
from cryptography.fernet import Fernet
from mlflow_process import Served, mlflow_process

from components import steps
from components.run.config import parse_config
from components.run.specification import resolve

pytestmark = pytest.mark.integration

SECRET = "the secret of the receiver"


class Receiver:
    """An https server on loopback that keeps what is posted to it."""

    def __init__(self, folder: Path) -> None:
        self.certificate, key = folder / "receiver.pem", folder / "receiver.key"
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
        names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
        files = ["-keyout", str(key), "-out", str(self.certificate)]
        subprocess.run([*command, *names, *files], check=True, capture_output=True)
        calls = self.calls = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                calls.append((dict(self.headers), self.rfile.read(int(self.headers["Content-Length"])).decode()))
                self.send_response(204)
                self.end_headers()

            def log_message(self, *arguments) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, key)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = f"https://localhost:{self._server.server_port}/promotions"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def wait_for(self, entity: str, alias: str | None = None) -> tuple[dict, str]:
        for _ in range(120):
            for headers, body in list(self.calls):
                told = json.loads(body)
                if told["entity"] == entity and alias in (None, told["data"].get("alias")):
                    return headers, body
            time.sleep(0.25)
        raise AssertionError(f"no call of {entity} in {[body for _, body in self.calls]}")


@pytest.fixture(scope="module")
def receiver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is needed for the receiver's certificate")
    found = Receiver(tmp_path_factory.mktemp("receiver"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def server(receiver: Receiver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """It may call private addresses, and its certifi knows the receiver: MLflow asks no other list of authorities."""
    folder = tmp_path_factory.mktemp("mlflow-webhooks")
    packages = folder / "packages"
    bundle = packages / "certifi" / "cacert.pem"
    shutil.copytree(Path(certifi.__file__).parent, bundle.parent)
    bundle.write_text(bundle.read_text() + receiver.certificate.read_text())
    allowed = {"PYTHONPATH": str(packages), "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true"}
    with mlflow_process(folder, {**_environment(folder), **allowed}, "--workers", "2") as served:
        yield served


def _environment(folder: Path) -> dict[str, str]:
    return {
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{folder / 'mlflow.db'}",
        "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": Fernet.generate_key().decode(),
        "MLFLOW_WEBHOOK_CACHE_TTL": "1",
    }


def sae_models(uri: str, *arguments: str, secret: str | None = SECRET, code: int = 0) -> dict | str:
    """What the command prints with --json; where it is to fail, its message."""
    command = [str(Path(sys.executable).parent / "sae"), "models", *arguments, "--uri", uri, "--json"]
    environment = {**os.environ, **({"SAE_WEBHOOK_SECRET": secret} if secret else {})}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert SECRET not in done.stdout + done.stderr
    return done.stderr if code == 2 else json.loads(done.stdout)


def is_genuine(headers: dict, body: str, secret: str, now: float) -> bool:
    """What a receiver does before it believes a call: who signed it, and that nobody plays back an old one."""
    if abs(now - int(headers["X-MLflow-Timestamp"])) > 300:
        return False
    signed = f"{headers['X-MLflow-Delivery-Id']}.{headers['X-MLflow-Timestamp']}.{body}"
    digest = hmac.new(secret.encode(), signed.encode(), hashlib.sha256).digest()
    return hmac.compare_digest(headers.get("X-MLflow-Signature", ""), f"v1,{base64.b64encode(digest).decode()}")


def test_a_promotion_calls_the_receiver_and_only_the_owner_of_the_secret_can_have_signed_it(
    receiver: Receiver, server: Served, tiny_tree: dict
):
    made = sae_models(server.uri, "webhook", receiver.url, "--test")
    assert (made["signed"], made["replaced"]) == (True, 0)
    assert made["test"] == {"delivered": True, "status": 204, "error": None}
    again = sae_models(server.uri, "webhook", receiver.url)
    assert again["replaced"] == 1
    (listed,) = sae_models(server.uri, "webhooks")["webhooks"]
    assert (listed["id"], listed["name"], listed["url"]) == (again["id"], "sae-promotions", receiver.url)
    receiver.calls.clear()
    time.sleep(1.5)  # until the server's list of webhooks is read anew

    tiny_tree["tracking"] |= {"uri": server.uri, "registered_model": "promoted"}
    plan = resolve(parse_config(tiny_tree))
    steps.extract(plan)
    steps.train(plan)
    steps.evaluate(plan)
    with steps.tracked(plan, {}) as run:
        assert steps.register(plan, run).alias == "champion"

    headers, body = receiver.wait_for("model_version_alias", "champion")
    told = json.loads(body)
    assert told["action"] == "created"
    assert told["data"] == {"name": "promoted", "alias": "champion", "version": "1"}
    _, of_version = receiver.wait_for("model_version")
    assert json.loads(of_version)["data"]["name"] == "promoted"
    assert [told for _, told in receiver.calls].count(body) == 1

    now = time.time()
    assert is_genuine(headers, body, SECRET, now)
    assert not is_genuine(headers, body.replace("promoted", "demoted"), SECRET, now)
    assert not is_genuine(headers, body, "another secret", now)
    assert not is_genuine({**headers, "X-MLflow-Delivery-Id": "another"}, body, SECRET, now)
    assert not is_genuine(headers, body, SECRET, now + 3600)
    assert not is_genuine({name: value for name, value in headers.items() if "Signature" not in name}, body, SECRET, now)
    assert SECRET not in server.log.read_text()


def test_without_a_secret_the_calls_are_unsigned_and_a_removed_webhook_is_gone(receiver: Receiver, server: Served):
    receiver.calls.clear()
    made = sae_models(server.uri, "webhook", receiver.url, "--name", "unsigned", "--test", secret=None)
    assert made["signed"] is False
    ((headers, _),) = receiver.calls
    assert "X-MLflow-Signature" not in headers
    assert sae_models(server.uri, "webhooks", "--remove", "unsigned") == {"name": "unsigned", "removed": 1}
    assert "unsigned" not in {found["name"] for found in sae_models(server.uri, "webhooks")["webhooks"]}
    assert "no webhook 'unsigned'" in sae_models(server.uri, "webhooks", "--remove", "unsigned", code=2)


def test_addresses_that_are_not_called_are_refused_in_one_sentence(receiver: Receiver, server: Served, tmp_path: Path):
    assert "starts with https://" in sae_models(server.uri, "webhook", "http://example.org/", code=2)
    database = f"sqlite:///{server.log.parent / 'mlflow.db'}"
    assert "is a database" in sae_models(database, "webhook", receiver.url, code=2)
    with mlflow_process(tmp_path, _environment(tmp_path), "--workers", "1") as strict:
        for private in (receiver.url, "https://10.0.0.1/", "https://169.254.169.254/latest"):
            message = sae_models(strict.uri, "webhook", private, code=2)
            assert f"the MLflow server refuses the webhook '{private}'" in message
            assert "non-public" in message
            assert message.count("\n") == 1
        assert sae_models(strict.uri, "webhooks") == {"webhooks": []}
