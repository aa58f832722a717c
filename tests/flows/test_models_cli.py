"""`sae models` as a user meets it, on two registered SAEs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from components import steps
from components.run.config import load_config, parse_config
from components.run.specification import Specification, resolve
from flows.cli import app


def complete(tree: dict, coefficient: float) -> Specification:
    training = {**tree["training"], "tokens": 10_000, "learning_rate": 1e-2}
    plan = resolve(parse_config({**tree, "sae": {**tree["sae"], "sparsity_coefficient": coefficient}, "training": training}))
    steps.extract(plan)
    steps.train(plan)
    steps.evaluate(plan)
    with steps.tracked(plan, {}) as run:
        steps.register(plan, run)
    return plan


def models(capfd: pytest.CaptureFixture, *arguments: str, code: int = 0) -> str:
    """Runs `sae models ...`; its standard output."""
    capfd.readouterr()
    result = CliRunner().invoke(app, ["models", *arguments])
    seen = capfd.readouterr()
    assert result.exit_code == code, (result.output, seen.err, result.exception)
    return seen.out + result.stdout if code != 2 else seen.err + result.stderr


def test_from_the_champion_alone_back_to_its_weights_and_all_commands_between(
    tiny_tree: dict, tmp_path: Path, capfd: pytest.CaptureFixture
):
    plan = complete(tiny_tree, 0.1)
    name, at = plan.registered_model, ["--root", str(tmp_path / "root")]
    gates = ["--gates", tiny_tree["tracking"]["gates"]]
    complete(tiny_tree, 500.0)

    listed = json.loads(models(capfd, "list", "--json", *at))
    (model,) = listed["models"]
    assert (model["name"], model["champion"]) == (name, "1")
    assert [(row["version"], row["aliases"]) for row in model["versions"]] == [(2, ["challenger"]), (1, ["champion"])]
    assert "champion" in models(capfd, "list", *at)

    shown = json.loads(models(capfd, "show", name, "--json", *at))
    record = plan.training_record()
    assert shown["lineage"]["weights_sha256"] == record.weights_sha256
    assert shown["lineage"]["dataset_digest"] == plan.dataset_digest
    assert len(shown["lineage"]["git_commit"]) == 40
    assert shown["metrics"]["l0"] == pytest.approx(plan.evaluation_record().metrics["l0"])
    assert {row["gate"] for row in shown["gates"]["gates"]} >= {"files", "finite", "evaluation_tokens"}
    assert "loss_recovered" in models(capfd, "show", f"{name}/2", *at)

    compared = json.loads(models(capfd, "compare", f"{name}/1", f"{name}/2", "--json", *gates, *at))
    assert compared["same_evaluation_set"]
    assert compared["stability"][0] is None
    assert compared["stability"][1]["champion"] == "1"
    assert "kept_share" in models(capfd, "compare", f"{name}/1", f"{name}/2", *gates, *at)
    assert "kept_share" in models(capfd, "show", f"{name}/2", *at)
    assert not compared["against_first"][f"{name}/2"]["passed"]

    refused = json.loads(models(capfd, "promote", f"{name}/2", "--json", *gates, *at, code=1))
    assert not refused["promoted"]
    assert "short by" in refused["reason"]
    assert "--reason" in models(capfd, "promote", f"{name}/2", "--force", *at, code=2)
    forced = models(capfd, "promote", f"{name}/2", "--force", "--reason", "a demonstration", *gates, *at)
    assert "is champion: forced: a demonstration" in forced
    back = json.loads(models(capfd, "rollback", name, "--reason", "enough", "--json", *at))
    assert back == {"name": name, "champion": 1, "replaced": 2, "reason": "enough"}

    (tmp_path / "reproduction.yaml").write_text(models(capfd, "show", f"{name}@champion", "--config", *at))
    tree = yaml.safe_load((tmp_path / "reproduction.yaml").read_text())
    assert "storage" in tree
    again = resolve(load_config(str(tmp_path / "reproduction.yaml"), [f"storage.root={tmp_path}/fresh"]))
    steps.extract(again)
    assert steps.train(again).weights_sha256 == record.weights_sha256
    assert again.sae_digest == plan.sae_digest


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["list", "--root", "/nowhere"], ["--root", "/nowhere", "no registry"]),
        (["show", "x/1", "--uri", "sqlite://user:secret@host/x"], ["tracking.uri", "password"]),
        (["promote", "x/1", "--reason", "because"], ["--reason", "--force"]),
    ],
)
def test_a_mistake_is_one_sentence(capfd: pytest.CaptureFixture, arguments: list[str], parts: list[str]):
    message = models(capfd, *arguments, code=2)
    assert message.count("\n") == 1
    for part in parts:
        assert part in message
    assert "secret" not in message
