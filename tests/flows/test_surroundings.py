"""What stands around a command: proxies, the MLflow that the environment names, odd roots."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import requests

from components import steps
from components.run.checks import check
from components.run.config import parse_config
from components.run.specification import resolve
from components.settings import UserError
from components.tracking.settings import TrackingSettings
from components.tracking.store import connect
from flows.cli.terminal import command

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy", "NO_PROXY", "no_proxy")


@pytest.fixture
def server() -> Iterator[int]:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"here")

        def log_message(self, *arguments: object) -> None:
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made.server_port
    made.shutdown()
    made.server_close()


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
@pytest.mark.parametrize("exempt", [None, "internal.example", "localhost"])
def test_a_proxy_does_not_stand_between_a_command_and_its_own_machine(
    variable: str, exempt: str | None, server: int, monkeypatch: pytest.MonkeyPatch
):
    """By the libraries of Prefect (httpx) and MLflow (requests)."""
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", exempt or "")
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{server}")
    with command(False):
        for host in ("127.0.0.1", "localhost"):
            assert httpx.get(f"http://{host}:{server}").text == "here"
            assert requests.get(f"http://{host}:{server}", timeout=5).text == "here"
        with pytest.raises(httpx.ConnectError):
            httpx.get("http://elsewhere.invalid")  # which the proxy is for
        assert exempt is None or exempt in os.environ["NO_PROXY"]


# MLflow


@pytest.mark.parametrize("name", ["a?b", "a#b"])
def test_a_root_in_which_no_database_could_be_is_refused_before_the_run(name: str, tiny_tree: dict, tmp_path: Path):
    tiny_tree["storage"] = {"root": str(tmp_path / name / "root")}
    with pytest.raises(UserError, match=r"^storage\.root: '.*' has a '[?#]' in its path"):
        check(resolve(parse_config(tiny_tree)))
    tiny_tree["tracking"]["uri"] = "http://127.0.0.1:5000"
    check(resolve(parse_config(tiny_tree)))


def test_a_database_is_where_the_root_is_whatever_else_is_in_its_name(tmp_path: Path):
    root = tmp_path / "r%20x;y&z=1 [é]"
    root.mkdir()
    connect(TrackingSettings(), str(root))
    assert (root / "mlflow.db").is_file()
    assert [path.name for path in tmp_path.iterdir()] == [root.name]


@pytest.mark.parametrize(
    "address",
    ["mlruns", "./mlruns", "file:///x", "databricks", "databricks://profile", "http://", "http:///x", "http://[::1", "http://host:x",
     "sqlite:", "sqlite://", "sqlite:///", "sqlite:x.db", "sqlite:///x.db?mode=ro", "nonsense://x"],
)  # fmt: skip
def test_an_address_of_mlflow_is_refused_alike_in_the_configuration_and_in_the_environment(
    address: str, tiny_tree: dict, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(UserError, match=r"^tracking\.uri: '") as configured:
        parse_config({"tracking": {"uri": address}})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(UserError, match=r"^MLFLOW_TRACKING_URI: '") as named:
        check(resolve(parse_config(tiny_tree)))
    assert str(configured.value).partition(": ")[2] == str(named.value).partition(": ")[2]


def test_a_deleted_experiment_is_one_sentence_before_any_work(tiny_tree: dict):
    run = resolve(parse_config(tiny_tree))
    client = connect(run.config.tracking, run.config.storage.root)
    client.delete_experiment(client.get_experiment_by_name("sae-foundry").experiment_id)
    with pytest.raises(UserError, match=r"^tracking\.experiment: 'sae-foundry' was deleted .*mlflow experiments restore"):
        with steps.tracked(run, {}):
            raise AssertionError("the run has begun")
