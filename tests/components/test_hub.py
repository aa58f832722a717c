"""SAEs on the Hugging Face Hub: a server on loopback speaks what they need of its HTTP, and processes upload and read."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from components.interop.formats import given_sae
from components.interop.hub import fetched, uploaded
from components.interop.sparsify import sparsify_files
from components.sae.architectures.topk import TopKSAE, TopKSettings

TOKEN = "hf_only-for-this-test"


class Hub(ThreadingHTTPServer):
    """Repositories of models: files by name, at one commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Endpoints)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.stored: dict[str, bytes] = {}
        self.unauthorised: list[str] = []

    def commit(self, repository: str) -> str:
        return sha256(json.dumps(sorted(self.repositories[repository])).encode()).hexdigest()[:40]


class Endpoints(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, content: bytes | dict, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, what: str) -> None:
        self.answer(404, {"error": "not found"}, X_Error_Code=what)

    def do_GET(self) -> None:
        if info := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/[^/]+)?(?:\?.*)?", self.path):
            files = self.server.repositories.get(info[1])
            if files is None:
                return self.missing("RepoNotFound")
            siblings = [{"rfilename": name} for name in files]
            return self.answer(200, {"id": info[1], "sha": self.server.commit(info[1]), "siblings": siblings})
        if (found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)) is None:
            return self.missing("EntryNotFound")
        content = self.server.repositories[found[1]].get(found[3])
        if content is None:
            return self.missing("EntryNotFound")
        return self.answer(200, content, ETag=f'"{sha256(content).hexdigest()}"', X_Repo_Commit=self.server.commit(found[1]))

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.server.unauthorised.append(self.path)
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            if name in self.server.repositories:
                return self.answer(409, {"error": "exists", "url": f"{self.server.url}/{name}"})
            self.server.repositories[name], self.server.private[name] = {}, wanted["visibility"] == "private"
            return self.answer(200, {"url": f"{self.server.url}/{name}"})
        repository = re.match(r"(?:/api/models)?/([^/]+/[^/.]+)", self.path)[1]
        if "/preupload/" in self.path:
            modes = [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                 "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]  # fmt: skip
            return self.answer(200, {"files": modes})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**item, "actions": {"upload": {"href": f"{self.server.url}/store/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                content = self.server.stored[line["value"]["oid"]]
            else:
                continue
            self.server.repositories[repository][line["value"]["path"]] = content
        commit = self.server.commit(repository)
        return self.answer(200, {"commitUrl": f"{self.server.url}/{repository}/commit/{commit}", "commitOid": commit})

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        name = self.path.rsplit("/", 1)[-1]
        assert sha256(content).hexdigest() == name
        self.server.stored[name] = content
        self.answer(200, b"")


@pytest.fixture
def server() -> Iterator[Hub]:
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.fixture
def topk(tmp_path: Path) -> Path:
    coder = TopKSAE.autoencoder(TopKSettings(d_sae=40, k=5), 12)
    coder.initialise(seed=1)
    folder = tmp_path / "layers.3"
    folder.mkdir()
    for name, content in sparsify_files(coder.folded([0.7], [0.7]), {"hook_name": "resid_post.3"}).items():
        (folder / name).write_bytes(content)
    return folder


def sae(server: Hub, tmp_path: Path, *arguments: str, code: int = 0) -> str:
    """A process of its own: huggingface_hub reads its environment once."""
    environment = {
        **os.environ, "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    command = [sys.executable, "-c", "from flows.cli import app; app()", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_an_sae_goes_to_the_hub_and_comes_back_the_same(server: Hub, topk: Path, tmp_path: Path):
    address = "hf://somebody/saes/llama/layers.3"
    put = json.loads(sae(server, tmp_path, "export", str(topk), address, "--format", "sparsify", "--json"))
    assert put["url"].startswith(f"{server.url}/somebody/saes/commit/")
    assert server.private == {"somebody/saes": True}
    assert server.unauthorised == []
    assert sorted(server.repositories["somebody/saes"]) == ["llama/layers.3/cfg.json", "llama/layers.3/sae.safetensors"]
    server.repositories["somebody/saes"]["README.md"] = b"of the repository"
    sae(server, tmp_path, "export", address, str(tmp_path / "back"), "--format", "saelens")
    x = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    first, second = (
        given_sae(folder, str(folder)).load(torch.device("cpu")).reconstruct(x) for folder in (topk, tmp_path / "back")
    )
    assert given_sae(tmp_path / "back", "").metadata["hook_name"] == "resid_post.3"
    np.testing.assert_allclose(second[0].dense(), first[0].dense(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(second[1], first[1], rtol=1e-5, atol=1e-5)
    again = sae(server, tmp_path, "export", str(topk), address, "--format", "sparsify", code=2)
    assert "holds files already" in again
    assert TOKEN not in again


def test_what_is_not_on_the_hub_is_one_sentence(server: Hub, tmp_path: Path):
    message = sae(server, tmp_path, "export", "hf://nobody/nothing", str(tmp_path / "to"), code=2)
    assert "'hf://nobody/nothing' is not on the Hub" in message
    assert message.count("\n") == 1
    server.repositories["somebody/text"] = {"README.md": b"", "inner/params.npz": b"x"}
    assert "holds no SAE" in sae(server, tmp_path, "export", "hf://somebody/text", str(tmp_path / "to"), code=2)
    broken = sae(server, tmp_path, "export", "hf://somebody/text/inner", str(tmp_path / "to"), code=2)
    assert "params.npz cannot be read" in broken


@pytest.mark.parametrize("address", ["hf://somebody", "hf://", "hf:///x/y"])
def test_an_address_without_a_repository_is_refused(address: str):
    with pytest.raises(ValueError, match="hf://owner/repository/folder"):
        fetched(address, lambda names: names)
    with pytest.raises(ValueError, match="hf://owner/repository/folder"):
        uploaded(address, {})
