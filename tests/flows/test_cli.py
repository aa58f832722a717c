"""The command as a user meets it: exit codes, one sentence for a mistake, one JSON object for a program."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from flows.cli import app

SAE = str(Path(sys.executable).parent / "sae")


@pytest.fixture
def config(tiny_tree: dict, tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_tree))
    return str(path)


def sae(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([SAE, *arguments], capture_output=True, text=True)


def test_help_names_every_command():
    result = CliRunner().invoke(app, ["--help"])
    for command in ("run", "plan", "extract", "train", "evaluate", "register", "ui"):
        assert command in result.output


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("training.token=5", ["training.token", "no such field"]),
        ("training.tokens=many", ["training.tokens", "many", "integer"]),
        ("activations.hook_points=[resid_post.9]", ["activations.hook_points", "resid_post.9", "layers 0 to 2"]),
        ("corpus.paths=[/nowhere/*.txt]", ["corpus.paths", "/nowhere/*.txt"]),
        ("sae.d_sae=0", ["sae.d_sae", "0", "greater than or equal to 1"]),
        ("storage.root=/proc/none", ["storage.root", "/proc/none"]),
        ("training.hook_point=mlp_out.0", ["training.hook_point", "mlp_out.0", "resid_post.1"]),
        ("corpus.context_length=4096", ["corpus.context_length", "4096", "128"]),
        ("device=cuda:7", ["device", "cuda:7"]),
        ("language_model.name=builtin/none", ["language_model.name", "builtin/stdlib-llama"]),
        ("activations.split=held_out", ["activations.split", "train"]),
        ("activations.hook_points=[resid_post.01]", ["activations.hook_points", "resid_post.01"]),
        ("device=meta", ["device", "meta", "cuda"]),
        ("tracking.uri=nonsense://x", ["tracking.uri", "nonsense", "http"]),
        ("training.adam_betas=[0.9,1.0]", ["training.adam_betas", "1.0", "less than 1"]),
        ("training.learning_rate=.inf", ["training.learning_rate", "inf", "finite"]),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2_before_any_work(
    config: str, tmp_path: Path, override: str, parts: list[str], capfd: pytest.CaptureFixture
):
    result = CliRunner().invoke(app, ["run", config, "--set", override])
    assert result.exit_code == 2
    message = capfd.readouterr().err + result.stderr
    assert message.count("\n") == 1
    for part in parts:
        assert part in message
    root = tmp_path / "root"
    assert not root.exists() or not any(root.iterdir())


def test_a_plan_writes_nothing_and_says_what_a_run_would_do(config: str, tmp_path: Path):
    done = sae("plan", config, "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert not plan["activations"]["exists"]
    assert plan["sae"]["parameters"] == 2 * 32 * 64 + 32 + 64
    assert plan["training"]["steps"] == 79
    assert plan["activations"]["bytes_per_token"] == 16 + 2 * 32
    assert not any((tmp_path / "root").iterdir())


def test_the_steps_one_by_one_hand_over_and_say_what_is_missing(config: str, tmp_path: Path):
    early = sae("train", config)
    assert early.returncode == 2
    assert "sae extract" in early.stderr
    assert sae("register", config).returncode == 2
    assert not (tmp_path / "root" / "mlflow.db").exists()
    extracted = json.loads(sae("extract", config, "--json").stdout)
    trained = json.loads(sae("train", config, "--json").stdout)
    evaluated = json.loads(sae("evaluate", config, "--json").stdout)
    registered = json.loads(sae("register", config, "--json").stdout)
    assert extracted["activations"]["tokens"] == 6_000
    assert Path(trained["url"], "sae_weights.safetensors").is_file()
    assert 0 <= evaluated["metrics"]["dead_fraction"] <= 1
    assert (registered["alias"], registered["model_version"]) == ("champion", 1)
    plan = json.loads(sae("plan", config, "--json").stdout)
    assert all(plan[part]["exists"] for part in ("tokens", "activations", "sae", "evaluation"))
    assert plan["activations"]["bytes"] == 6_000 * 80
