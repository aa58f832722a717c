"""What somebody without a login gets from the stack: from every port that it listens on, from its folder, and as another user
where the tests run as root."""

from __future__ import annotations

import asyncio
import http.client
import multiprocessing
import os
import pwd
import re
import socket
import ssl
import stat
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import psutil
import psycopg2
import pytest
import s3fs
import websockets
from stack_client import Live

from infra.stack import seaweed
from infra.stack.settings import REPOSITORY

pytestmark = pytest.mark.integration

PLANTED = "planted-content-57721"
WITHOUT_DATA = {
    "s3": {"/status", "/healthz"},
    "mlflow": {"/health", "/version"},
    "prefect": {"/", "/dashboard", "/api/health", "/api/ready"},  # the UI is a program, which asks for the password
}
"""What may be answered to anybody."""
PATHS = [
    "/", "/status", "/healthz", "/health", "/version", "/metrics", "/debug/pprof/", "/ui/index.html",
    # SeaweedFS: S3, filer, master, volume server
    "/sae", "/sae/planted", "/mlflow?list-type=2", "/buckets/", "/buckets/sae/planted", "/buckets/sae/planted?metadata=true",
    "/buckets/sae/new", "/dir/assign", "/dir/lookup?volumeId=1", "/dir/status", "/cluster/status", "/vol/status",
    "/vol/grow?count=1", "/col/delete?collection=sae", "/submit", "/{fid}", "/admin/assign_volume?volume=99",
    # MLflow
    "/api/2.0/mlflow/experiments/search?max_results=5", "/ajax-api/2.0/mlflow/runs/search", "/graphql", "/signup",
    "/api/2.0/mlflow/experiments/create", "/api/2.0/mlflow/users/create", "/api/2.0/mlflow-artifacts/artifacts/planted",
    "/get-artifact?run_uuid=0&path=planted", "/model-versions/get-artifact?name=line&version=1&path=MLmodel",
    # Prefect
    "/dashboard", "/api/health", "/api/ready", "/api/admin/settings", "/api/admin/database/clear", "/api/flow_runs/filter",
    "/api/deployments/filter", "/api/work_pools/", "/api/events", "/api/automations/filter", "/api/block_documents/filter",
]  # fmt: skip
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9).replace(b"\0\0\0\0", b"\0\0\0\4", 1)
"""How a gRPC client begins: HTTP/2's preface and an empty frame of settings."""


@pytest.fixture(scope="module")
def stranger() -> Iterator[Callable[..., Any]]:
    """Calls a function as another user; as ourselves, but with no login, where we may not become another."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork"), initializer=_become_nobody) as pool:
        yield lambda call, *arguments: pool.submit(call, *arguments).result(600)


def _become_nobody() -> None:
    for name in [name for name in os.environ if name.startswith(("AWS_", "MLFLOW_", "PREFECT_", "PG"))]:
        del os.environ[name]
    os.chdir("/")
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        os.setgroups([])
        os.setgid(nobody.pw_gid)
        os.setuid(nobody.pw_uid)


@pytest.fixture(scope="module")
def planted(live: Live) -> s3fs.S3FileSystem:
    """A bucket with an object."""
    secrets = live.stack.secrets
    files = s3fs.S3FileSystem(
        key=secrets.s3_access, secret=secrets.s3_secret, endpoint_url=live.stack.s3_url, use_listings_cache=False
    )
    files.pipe_file("sae/planted", PLANTED.encode() * 1000)
    return files


def listening(live: Live) -> dict[int, str]:
    """Port -> service, of every process of the stack; all of them on loopback."""
    found = {}
    for service in live.supervisor.states():
        for process in live.processes(service):
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    assert connection.laddr.ip == "127.0.0.1", (service, connection.laddr)
                    found[connection.laddr.port] = service
    return found


def unverified() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def everything(port: int) -> list[tuple[str, str, int, bytes, str | None]]:
    """Each request that a server answered: method and scheme, path, code, beginning of the answer, whose pages may read it."""
    answers = []
    for scheme, connect in (("http", http.client.HTTPConnection), ("https", https)):
        for method, path in product(("GET", "PUT", "POST", "DELETE"), PATHS):
            server = connect("127.0.0.1", port, timeout=10)
            body = None if method in ("GET", "DELETE") else b"{}" if "/api" in path else b"overwritten"
            try:
                server.request(method, path, body, {"Content-Type": "application/json", "Origin": "http://evil.example"})
                answer = server.getresponse()
                origin = answer.headers.get("Access-Control-Allow-Origin")
                answers.append((f"{method} {scheme}", path, answer.status, answer.read(100_000), origin))
            except (OSError, http.client.HTTPException):
                if (method, path) == ("GET", PATHS[0]):
                    break  # it does not speak that, or not with us
            finally:
                server.close()
    return answers


def https(host: str, port: int, timeout: float) -> http.client.HTTPSConnection:
    return http.client.HTTPSConnection(host, port, timeout=timeout, context=unverified())


def speaks_grpc(port: int, tls: bool) -> bool:
    """Whether a server answers a gRPC client's first words with its own (a frame of type 4, SETTINGS)."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            context = unverified()
            context.set_alpn_protocols(["h2"])
            with context.wrap_socket(connection) if tls else connection as stream:
                stream.sendall(PREFACE)
                return stream.recv(9)[3:4] == b"\4"
    except OSError:
        return False


def weed_shell(live: Live, *options: str) -> str:
    """What SeaweedFS's own client lists of the bucket, over gRPC."""
    ports, weed = live.stack.ports, str(Path(sys.executable).parent / "weed")
    servers = [f"-{name}=127.0.0.1:{port}" for name, port in (("master", ports.s3_master), ("filer", ports.s3_filer))]
    try:
        return subprocess.run(
            [weed, *options, "shell", *servers], input="fs.ls /buckets/sae\nexit\n", capture_output=True, text=True, timeout=20
        ).stdout
    except subprocess.TimeoutExpired as waiting:
        return (waiting.stdout or b"").decode()


def test_no_port_gives_or_takes_data_without_a_login(live: Live, planted: s3fs.S3FileSystem, stranger: Callable[..., Any]):
    ports = listening(live)
    assert {"s3", "postgres", "mlflow", "prefect"} <= set(ports.values())
    known = live.stack.ports
    before = {path: planted.info(path)["ETag"] for path in planted.find("sae") + planted.find("mlflow")}
    runs = live.ask("/flow_runs/count", {})
    for port, service in ports.items():
        answers = stranger(everything, port)
        assert answers or service not in WITHOUT_DATA or port != getattr(known, service)
        for request, path, code, body, origin in answers:
            said = f"{service} at {port}: {request} {path} {code} {origin} {body[:200]!r}"
            assert PLANTED.encode() not in body, said
            harmless = path in WITHOUT_DATA.get(service, ())
            assert code >= 300 or (request.startswith("GET") and harmless), said
            assert origin not in ("*", "http://evil.example") or harmless or service == "s3", said
        assert not stranger(speaks_grpc, port, False), (service, port)
        assert not stranger(speaks_grpc, port, True), (service, port)
    assert {path: planted.info(path)["ETag"] for path in planted.find("sae") + planted.find("mlflow")} == before
    assert planted.cat_file("sae/planted") == PLANTED.encode() * 1000
    assert live.ask("/flow_runs/count", {}) == runs

    # A page that got hold of a signed address may not read what it gives. (SeaweedFS's answers about no bucket are for all.)
    signed = urllib.request.Request(planted.sign("sae/planted"), headers={"Origin": "http://evil.example"})
    with urllib.request.urlopen(signed, timeout=10) as answer:
        assert answer.headers["Access-Control-Allow-Origin"] is None

    for password in (None, "sae", "postgres"):
        with pytest.raises(psycopg2.OperationalError, match="password"):
            stranger(connect, known.postgres, password)
    for path in ("events/in", "events/out", "logs/out"):
        for subprotocols in (None, ["prefect"]):
            assert not stranger(listens, f"{live.stack.prefect_url.replace('http', 'ws')}/{path}", subprotocols), path


def connect(port: int, password: str | None) -> None:
    psycopg2.connect(host="127.0.0.1", port=port, user="sae", dbname="mlflow", password=password).close()


def listens(url: str, subprotocols: list[str] | None) -> bool:
    """Whether a websocket stays open for what we say without a password."""

    async def talk() -> bool:
        try:
            async with websockets.connect(url, subprotocols=subprotocols) as stream:
                await stream.send('{"type": "auth", "token": "wrong"}')
                await stream.send('{"type": "filter", "filter": {}}')
                answer = await asyncio.wait_for(stream.recv(), 5)
                return '"auth_success"' in str(answer) or '"event"' in str(answer)
        except (websockets.WebSocketException, OSError):
            return False
        except TimeoutError:
            return True

    return asyncio.run(talk())


def test_the_storages_own_client_gets_nothing_without_the_certificate(live: Live, planted: s3fs.S3FileSystem):
    """And with it what is planted, so that the first half says something."""
    assert "planted" not in weed_shell(live)
    assert "planted" in weed_shell(live, f"-config_dir={live.folder / 's3-tls'}")


def test_a_certificate_of_somebody_elses_making_opens_nothing(live: Live, tmp_path: Path):
    key, certificate = seaweed.certify()
    (tmp_path / "both.pem").write_text(key + certificate)
    ours = live.folder / "s3-tls"
    with pytest.raises((ssl.SSLError, ConnectionError)):
        hello(live.stack.ports.s3_volume, tmp_path / "both.pem", tmp_path / "both.pem")
    assert b"200 OK" in hello(live.stack.ports.s3_volume, ours / "certificate.pem", ours / "key.pem")


def hello(port: int, certificate: Path, key: Path) -> bytes:
    context = unverified()
    context.load_cert_chain(certificate, key)
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection, context.wrap_socket(connection) as stream:
        stream.sendall(b"GET /status HTTP/1.0\r\n\r\n")
        return stream.recv(100)


def test_the_folder_of_a_stack_is_closed_to_others(live: Live, planted: s3fs.S3FileSystem, stranger: Callable[..., Any]):
    """It was started under a umask of 0, in a folder that was open before."""
    assert stat.S_IMODE(live.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((live.stack.postgres_folder).stat().st_mode) == 0o700
    # The .vif of a volume, which says its format, gets its rights from SeaweedFS.
    paths = [path for path in live.folder.rglob("*") if path.suffix != ".vif" and not path.is_symlink()]
    open_to_others = [path for path in paths if path.exists() and path.stat().st_mode & 0o077]
    assert open_to_others == []
    assert len([path for path in paths if path.suffix == ".dat"]) > 0
    if os.geteuid() == 0:
        with pytest.raises(PermissionError):
            stranger(os.listdir, str(live.folder))


def test_the_commands_that_the_stack_prints_exist_where_it_says(live: Live):
    """From the checkout, with the PATH of a shell that has nothing of the project on it."""
    said = live.command("status").stderr
    lines = [line.strip() for line in said.splitlines() if line.startswith("    ")]
    assert len(lines) == 2
    assert lines[0].startswith("eval ")
    programs = [re.findall(r"[^\s\"$(]+", line.removeprefix("eval "))[0] for line in lines]
    script = f"{lines[0]}\n" + "\n".join(f"command -v {program}" for program in programs) + "\necho $PREFECT_API_URL"
    done = subprocess.run(
        ["bash", "-ec", script], cwd=REPOSITORY, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"}
    )
    assert done.stdout.splitlines() == [*programs, live.stack.prefect_url], done.stderr
    assert programs[1].endswith("/python")
