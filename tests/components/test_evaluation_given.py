"""SAEs that others made, from the command line to the report, and the sentence for each that cannot be measured."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from components import steps
from components.evaluation.given import hook_point_of, require_same_model, require_same_place
from components.interop.saelens import load_saelens, saelens_files
from components.language_model.hook_points import HookPoint
from components.run.config import parse_config
from components.run.specification import resolve
from components.sae.architectures.relu import ReLUSAE, ReLUSettings
from components.sae.coder import Column
from components.settings import UserError
from components.tracking.runs import connect
from flows.cli import app


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An SAE of the tiny model in SAELens' format."""
    sae = ReLUSAE.autoencoder(ReLUSettings(d_sae=64, decoder_init_norm=0.5), 32)
    sae.initialise(seed=1)
    path = tmp_path / "made-elsewhere"
    path.mkdir()
    for name, content in saelens_files(sae, {"hook_name": "blocks.1.hook_resid_post"}).items():
        (path / name).write_bytes(content)
    return path


def test_a_given_sae_is_measured_like_our_own_and_tracked(tiny_tree: dict, tmp_path: Path):
    tiny_tree["evaluation"] = {"tokens": 900, "reference_tokens": 1_000, "baseline_tokens": 200}
    tiny_tree["training"]["tokens"] = 5_000
    plan = resolve(parse_config(tiny_tree))
    steps.extract(plan)
    steps.train(plan)
    own = steps.evaluate(plan)
    shutil.copytree(plan.sae_url, tmp_path / "copy", ignore=shutil.ignore_patterns("*.json", "*.parquet", "*.html"))
    shutil.copy(Path(plan.sae_url, "cfg.json"), tmp_path / "copy")
    _, given = steps.evaluate_given(plan, str(tmp_path / "copy"))
    assert given.metrics.keys() == own.metrics.keys()
    for name, value in own.metrics.items():
        assert given.metrics[name] == (None if value is None else pytest.approx(value, rel=1e-5, abs=1e-7)), name
    assert [row["name"] for row in own.baselines] == ["sae", *plan.config.evaluation.baselines]
    client = connect(plan.config.tracking, plan.config.storage.root)
    (run,) = client.search_runs([client.get_experiment_by_name(plan.config.tracking.experiment).experiment_id])
    assert run.data.metrics["eval/ce_loss_sae_low"] == pytest.approx(given.metrics["ce_loss_sae_low"])
    kept = {entry.path for entry in client.list_artifacts(run.info.run_id, "evaluation")}
    assert {Path(path).name for path in kept} == {"evaluation.json", "features.parquet", "report.html"}
    with steps.tracked(plan, {}) as tracked:
        outcome = steps.register(plan, tracked)
    page = Path(MlflowClient().download_artifacts(tracked.run_id, "sae/report.html")).read_text()
    assert "No earlier version" in page
    _, registered = steps.evaluate_given(plan, f"models:/{outcome.registered_model}@champion")
    assert registered.digest == given.digest


def evaluated(tree: dict, tmp_path: Path, sae: Path | str, capfd: pytest.CaptureFixture, *more: str) -> tuple[int, str, str]:
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(tree))
    result = CliRunner().invoke(app, ["evaluate", str(config), "--sae", str(sae), *more])
    captured = capfd.readouterr()
    return result.exit_code, result.stdout + captured.out, result.stderr + captured.err


def test_the_command_needs_no_activation_dataset_and_prints_one_object(
    folder: Path, tiny_tree: dict, tmp_path: Path, capfd: pytest.CaptureFixture
):
    tiny_tree["evaluation"] = {"tokens": 100, "reference_tokens": 500, "baselines": ["pca"], "baseline_tokens": 100}
    code, out, err = evaluated(tiny_tree, tmp_path, folder, capfd, "--json")
    assert code == 0, err
    printed = json.loads(out)
    assert [row["name"] for row in printed["baselines"]] == ["sae", "pca"]
    assert Path(printed["url"], "report.html").is_file()
    assert not (tmp_path / "root" / "activations").exists()


def change(folder: Path, **config) -> None:
    path = folder / "cfg.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


REFUSED = {
    "architecture": (lambda f: change(f, architecture="matching_pursuit"), ["architecture", "matching_pursuit", "jumprelu"]),
    "whitening": (lambda f: change(f, normalize_activations="covariance_whitening"), ["covariance_whitening", "layer_norm"]),
    "heads": (lambda f: change(f, reshape_activations="hook_z"), ["reshape_activations", "hook_z"]),
    "one head": (lambda f: change(f, metadata={"hook_head_index": 3}), ["attention head"]),
    "old topk": (lambda f: change(f, activation_fn="topk"), ["activation_fn", "topk", "relu"]),
    "no k": (lambda f: change(f, architecture="topk"), ["k is None"]),
    "another model": (lambda f: change(f, d_in=768), ["768", "32"]),
    "another place": (lambda f: change(f, metadata={"hook_name": "blocks.2.hook_resid_post"}), ["blocks.2", "resid_post.1"]),
    "no weights": (lambda f: (f / "sae_weights.safetensors").unlink(), ["sae_weights.safetensors"]),
    "no configuration": (lambda f: (f / "cfg.json").write_text("{"), ["cfg.json"]),
    "broken weights": (lambda f: (f / "sae_weights.safetensors").write_bytes(b"x" * 50), ["cannot be read"]),
    "missing tensor": (lambda f: change(f, architecture="jumprelu"), ["threshold", "jumprelu"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_measured_is_refused_in_one_sentence(
    folder: Path, tiny_tree: dict, tmp_path: Path, capfd: pytest.CaptureFixture, case: str
):
    spoil, parts = REFUSED[case]
    spoil(folder)
    code, _, message = evaluated(tiny_tree, tmp_path, folder, capfd)
    assert code == 2
    sentence = message[message.index("error") :]
    assert sentence.count("\n") == 1
    for part in ("--sae", *parts):
        assert part in sentence


def test_a_registered_model_that_is_not_there_is_a_sentence(tiny_tree: dict, tmp_path: Path, capfd: pytest.CaptureFixture):
    code, _, message = evaluated(tiny_tree, tmp_path, "models:/nothing@champion", capfd)
    assert code == 2
    assert "models:/nothing@champion" in message[message.index("error --sae") :]


def test_weights_that_are_not_finite_are_refused(folder: Path):
    weights = load_file(folder / "sae_weights.safetensors")
    weights["b_dec"][3] = float("nan")
    save_file(weights, folder / "sae_weights.safetensors")
    with pytest.raises(ValueError, match="not finite"):
        load_saelens(folder, torch.device("cpu"), 1.0)


@pytest.mark.parametrize(
    ("name", "point"),
    [
        ("blocks.6.hook_resid_pre", "resid_pre.6"),
        ("blocks.0.hook_mlp_out", "mlp_out.0"),
        ("model.layers.11", "resid_post.11"),
        ("attn_out.2", "attn_out.2"),
        ("blocks.0.attn.hook_z", "None"),
    ],
)
def test_hook_points_have_the_names_that_others_give_them(name: str, point: str):
    assert str(hook_point_of(name)) == point


@pytest.mark.parametrize(
    ("point", "norm", "refused"),
    [
        (HookPoint("resid_post", 1), torch.nn.LayerNorm(4), None),
        (HookPoint("mlp_in", 1), torch.nn.LayerNorm(4), "mlp_in.1"),
        (HookPoint("resid_post", 1), torch.nn.RMSNorm(4), "LayerNorm"),
    ],
)
def test_a_centred_model_is_one_with_layer_norm_read_where_it_is_centred(
    point: HookPoint, norm: torch.nn.Module, refused: str | None
):
    source = SimpleNamespace(skeleton=torch.nn.Sequential(norm), settings=SimpleNamespace(revision="main"))
    metadata = {"hook_name": str(point), "model_from_pretrained_kwargs": {"center_writing_weights": True}}
    with nullcontext() if refused is None else pytest.raises(UserError, match=f"center_writing_weights.*{refused}"):
        column = (Column(str(point), 4),)
        require_same_place({"d_in": 4, "metadata": metadata}, column, column, source)


@pytest.mark.parametrize(
    ("name", "point", "here"),
    [
        ("layers.3.mlp", "model.layers.3.mlp", True),
        ("layers.3.mlp", "model.layers.13.mlp", False),
        ("layers.3", "resid_post.3", True),
        ("h.3", "resid_pre.4", True),
        ("blocks.3.hook_mlp_out", "resid_post.3", False),
    ],
)
def test_a_modules_path_may_leave_out_what_is_above_the_blocks(name: str, point: str, here: bool):
    source = SimpleNamespace(skeleton=torch.nn.Linear(1, 1), settings=SimpleNamespace(revision="main"))
    with nullcontext() if here else pytest.raises(UserError, match=f"trained at '{name}'"):
        column = (Column(point, 4),)
        require_same_place({"d_in": 4, "metadata": {"hook_name": name}}, column, column, source)


@pytest.mark.parametrize(
    ("theirs", "ours", "same"),
    [
        ("gpt2-small", "openai-community/gpt2", True),
        ("Gemma-2-2B", "google/gemma-2-2b", True),
        ("gemma-2-2b", "google/gemma-2-2b-it", False),
        (None, "/somewhere/a-model", True),
    ],
)
def test_a_models_name_counts_without_its_owner(theirs: str | None, ours: str, same: bool):
    with nullcontext() if same else pytest.raises(UserError, match="--another-model"):
        require_same_model({"metadata": {"model_name": theirs}}, ours)
