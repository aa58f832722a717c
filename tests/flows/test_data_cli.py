"""`sae data` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient
from typer.testing import CliRunner

from components import steps
from components.run.config import parse_config
from components.run.specification import Specification, resolve
from flows.cli import app


@pytest.fixture
def plan(tiny_tree: dict) -> Specification:
    plan = resolve(parse_config(tiny_tree))
    steps.extract(plan)
    return plan


@pytest.fixture
def data(plan: Specification, capfd: pytest.CaptureFixture):
    def invoke(*arguments: str, answer: str | None = None) -> tuple[int, str, str]:
        result = CliRunner().invoke(app, ["data", *arguments, "--root", plan.config.storage.root], input=answer)
        captured = capfd.readouterr()
        return result.exit_code, captured.out + result.stdout, captured.err + result.stderr

    return invoke


def test_list_show_and_check_say_the_same_to_people_and_to_programs(plan: Specification, data):
    (listed,) = json.loads(data("list", "--json")[1])["datasets"]
    assert (listed["state"], listed["tokens"], listed["hook_points"]) == ("finished", 6_000, ["resid_post.1"])
    assert listed["name"] in data("list")[1]

    shown = json.loads(data("show", plan.dataset_digest[:6], "--json")[1])
    assert shown["manifest"]["tokens"] == 6_000
    assert sum(shown["norms"]["resid_post.1"]["counts"]) == 512
    words = {token["text"].strip() for token in shown["sample"]}
    assert len(shown["sample"]) == 8
    assert any(word and word in "the sparse feature of a model fires where tokens in residual stream" for word in words)
    pretty = data("show", listed["name"])[1]
    assert "A random sample of tokens" in pretty
    assert "6,000" in pretty

    code, out, _ = data("check", listed["url"], "--batch-size", "100", "--json")
    assert code == 0
    checked = json.loads(out)
    assert checked["problems"] == []
    assert checked["mixing"]["share"] == pytest.approx(1, abs=0.05)
    assert "6,000, each once" in data("check", listed["url"])[1]


def test_check_exits_with_1_and_names_what_is_wrong(plan: Specification, data):
    (Path(plan.dataset_url) / "shard-00002.parquet").unlink()
    code, out, _ = data("check", plan.dataset_digest)
    assert code == 1
    assert f"{plan.dataset_url}/shard-00002.parquet is missing" in out.replace("\n", "")


def test_an_unknown_dataset_is_one_sentence(data):
    code, _, error = data("show", "nothing")
    assert code == 2
    assert "DATASET: there is no 'nothing'" in error


def test_delete_asks_first_and_refuses_what_a_registered_model_names(plan: Specification, data):
    url = Path(plan.dataset_url)
    code, _, error = data("delete", plan.dataset_digest, answer="n\n")
    assert code == 1
    assert url.exists()
    uri = f"sqlite:///{plan.config.storage.root}/mlflow.db"
    client = MlflowClient(uri, registry_uri=uri)
    client.create_registered_model("some-model")
    client.create_model_version("some-model", str(url), tags={"sae.dataset_digest": plan.dataset_digest})
    code, _, error = data("delete", plan.dataset_digest, "--yes")
    assert code == 2
    assert "some-model/1" in error
    assert url.exists()
    assert data("delete", plan.dataset_digest, "--yes", "--force")[0] == 0
    assert not url.exists()
    assert steps.extract(plan).tokens == 6_000
