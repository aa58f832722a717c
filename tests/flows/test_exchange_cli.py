"""`sae import`, `sae export` and `sae evaluate --sae`: SAEs of every format into the registry and out of it again."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
import yaml
from mlflow import MlflowClient
from typer.testing import CliRunner

from components.interop.formats import WRITERS, given_sae
from components.interop.saelens import saelens_files
from components.registry.catalogue import show
from components.run.config import parse_config
from components.run.specification import resolve
from components.sae.architectures.jumprelu import JumpReLUSAE, JumpReLUSettings
from components.sae.architectures.relu import ReLUSAE, ReLUSettings
from components.sae.architectures.topk import TopKSAE, TopKSettings
from components.sae.coder import Column
from components.tracking.runs import connect
from flows.cli import app

CPU = torch.device("cpu")


def sae(capfd: pytest.CaptureFixture, *arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    captured = capfd.readouterr()
    printed = result.stdout + captured.out if code == 0 else captured.err + result.stderr
    assert result.exit_code == code, (result.output, captured.err)
    return printed


@pytest.fixture
def config(tiny_tree: dict, tmp_path: Path) -> str:
    tiny_tree["evaluation"] = {"tokens": 300, "reference_tokens": 500, "baselines": []}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_tree))
    return str(path)


@pytest.fixture
def topk(tmp_path: Path) -> Path:
    """A folder as sparsify leaves it, at the hook point of the configuration."""
    coder = TopKSAE.autoencoder(TopKSettings(d_sae=64, k=6, decoder_init_norm=0.8), 32)
    coder.initialise(seed=1)
    folder = tmp_path / "layers.1"
    folder.mkdir()
    for name, content in WRITERS["sparsify"](coder.folded([1.0], [1.0]), {}).items():
        (folder / name).write_bytes(content)
    plain = json.loads((folder / "cfg.json").read_text())
    del plain["metadata"]
    (folder / "cfg.json").write_text(json.dumps(plain))
    return folder


def test_an_sae_made_elsewhere_is_imported_shown_and_exported_again(
    config: str, topk: Path, tmp_path: Path, capfd: pytest.CaptureFixture
):
    imported = json.loads(sae(capfd, "import", str(topk), "--config", config, "--json"))
    assert (imported["model_version"], imported["alias"]) == (1, "champion")
    assert imported["metrics"]["l0"] <= 6
    again = json.loads(sae(capfd, "import", str(topk), "--config", config, "--json"))
    assert again["model_version"] == 1  # the same SAE and the same measurement
    run = resolve(parse_config(yaml.safe_load(Path(config).read_text())))
    client: MlflowClient = connect(run.config.tracking, run.config.storage.root)
    name = imported["registered_model"]
    shown = show(client, f"{name}/1")
    assert shown["reproduce"][-1] == f"sae import {topk} --config reproduction.yaml"
    card = client.get_model_version(name, "1").description
    assert "imported, format: sparsify" in card
    assert "training:" not in card
    x = np.random.default_rng(0).standard_normal((20, 32)).astype(np.float32)
    features, y = given_sae(topk, str(topk)).load(CPU).reconstruct(torch.tensor(x))
    answer = mlflow.pyfunc.load_model(f"models:/{name}@champion").predict(x)
    np.testing.assert_allclose(answer["features"], features.dense(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(answer["reconstruction"], y, rtol=1e-5, atol=1e-5)
    for form in ("saelens", "sparsify"):
        target, root = tmp_path / f"as-{form}", str(run.config.storage.root)
        sae(capfd, "export", f"models:/{name}@champion", str(target), "--format", form, "--root", root)
        back = given_sae(target, str(target))
        assert back.metadata["hook_name"] == "resid_post.1"
        np.testing.assert_allclose(back.load(CPU).reconstruct(torch.tensor(x))[1], y, rtol=1e-5, atol=1e-5)
        measured = json.loads(sae(capfd, "evaluate", config, "--sae", str(target), "--json"))
        assert measured["metrics"]["ce_loss_sae"] == pytest.approx(imported["metrics"]["ce_loss_sae"], rel=1e-4)


def jumprelu(folder: Path, **metadata) -> Path:
    coder = JumpReLUSAE.autoencoder(JumpReLUSettings(d_sae=64), 32)
    coder.initialise(seed=1)
    folder.mkdir()
    for name, content in WRITERS["saelens"](coder, metadata).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("metadata", "parts"),
    [
        ({"model_name": "gpt2-small"}, ["model_name", "gpt2-small", "tiny-llama", "--another-model"]),
        ({"hook_name": "blocks.1.attn.hook_z"}, ["blocks.1.attn.hook_z", "resid_post.1"]),
        ({"hook_name": "layers.2"}, ["layers.2", "activations.hook_points=resid_post.2"]),
        ({"model_from_pretrained_kwargs": {"center_writing_weights": True}}, ["center_writing_weights", "LayerNorm"]),
        ({"model_from_pretrained_kwargs": {"checkpoint_index": 3}}, ["checkpoint_index", "3", "language_model.revision"]),
    ],
)
def test_an_sae_of_another_model_or_place_is_refused(
    config: str, tmp_path: Path, capfd: pytest.CaptureFixture, metadata: dict, parts: list[str]
):
    message = sae(capfd, "evaluate", config, "--sae", str(jumprelu(tmp_path / "sae", **metadata)), code=2)
    sentence = message[message.index("error --sae") :]
    assert sentence.count("\n") == 1
    for part in parts:
        assert part in sentence


def test_another_model_is_measured_where_that_is_wanted(config: str, tmp_path: Path, capfd: pytest.CaptureFixture):
    folder = jumprelu(tmp_path / "sae", model_name="gpt2-small", hook_name="model.layers.1")
    measured = json.loads(sae(capfd, "evaluate", config, "--sae", str(folder), "--another-model", "--json"))
    assert measured["metrics"]["l0"] > 0


def test_what_normalises_tokens_is_measured_and_not_registered(config: str, tmp_path: Path, capfd: pytest.CaptureFixture):
    folder = jumprelu(tmp_path / "sae")
    fields = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**fields, "normalize_activations": "layer_norm"}))
    assert "l0" in sae(capfd, "evaluate", config, "--sae", str(folder))
    message = sae(capfd, "import", str(folder), "--config", config, code=2)
    assert "normalises each token" in message
    exported = tmp_path / "exported"
    sae(capfd, "export", str(folder), str(exported))
    assert json.loads((exported / "cfg.json").read_text())["normalize_activations"] == "layer_norm"


def test_a_mean_norm_is_measured_before_it_is_registered(config: str, tmp_path: Path, capfd: pytest.CaptureFixture):
    folder = jumprelu(tmp_path / "sae")
    fields = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**fields, "normalize_activations": "expected_average_only_in"}))
    imported = json.loads(sae(capfd, "import", str(folder), "--config", config, "--json"))
    run = resolve(parse_config(yaml.safe_load(Path(config).read_text())))
    uri = f"models:/{imported['registered_model']}/1"
    sae(capfd, "export", uri, str(tmp_path / "plain"), "--root", run.config.storage.root)
    measured = json.loads(sae(capfd, "evaluate", config, "--sae", str(tmp_path / "plain"), "--json"))
    assert measured["metrics"]["ce_loss_sae"] == pytest.approx(imported["metrics"]["ce_loss_sae"], rel=1e-4)
    assert "expected_average_only_in" in sae(capfd, "export", str(folder), str(tmp_path / "raw"), code=2)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--format", "gemma"], ["--format", "gemma", "saelens, sparsify, circuit-tracer"]),
        (["--format", "sparsify"], ["--format", "jumprelu", "topk"]),
    ],
)
def test_a_format_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture, arguments: list[str], parts: list[str]
):
    message = sae(capfd, "export", str(jumprelu(tmp_path / "sae")), str(tmp_path / "to"), *arguments, code=2)
    assert message.count("\n") == 1
    for part in parts:
        assert part in message


def test_an_export_replaces_nothing(tmp_path: Path, capfd: pytest.CaptureFixture):
    folder = jumprelu(tmp_path / "sae")
    assert "holds files already" in sae(capfd, "export", str(folder), str(folder), code=2)


def test_transcoders_of_two_layers_become_one_set_and_come_back_one_by_one(
    config: str, tmp_path: Path, capfd: pytest.CaptureFixture
):
    target = tmp_path / "set"
    for layer in (0, 1):
        coder = ReLUSAE(ReLUSettings(d_sae=48), (Column(f"mlp_in.{layer}", 32),), (Column(f"mlp_out.{layer}", 32),), 48)
        coder.initialise(layer)
        folder = tmp_path / f"transcoder-{layer}"
        folder.mkdir()
        places = {"hook_name": f"mlp_in.{layer}", "hook_name_out": f"mlp_out.{layer}"}
        for name, content in saelens_files(coder.folded([0.5], [2.0]), places).items():
            (folder / name).write_bytes(content)
        sae(capfd, "export", str(folder), str(target), "--format", "circuit-tracer")
    assert {path.name for path in target.iterdir()} == {"config.yaml", "layer_0.safetensors", "layer_1.safetensors"}
    assert "accepted is the address of one" in sae(capfd, "evaluate", config, "--sae", str(target), code=2)
    sets = ("--set", "activations.hook_points=[mlp_in.1, mlp_out.1]", "--set", "training.target=mlp_out.1")
    of = ("evaluate", config, *sets, "--json", "--sae")
    theirs = json.loads(sae(capfd, *of, str(target / "layer_1.safetensors")))["metrics"]
    ours = json.loads(sae(capfd, *of, str(tmp_path / "transcoder-1")))["metrics"]
    assert theirs["ce_loss_sae"] == pytest.approx(ours["ce_loss_sae"], rel=1e-6)
    assert "it is a transcoder" in sae(capfd, "evaluate", config, "--sae", str(target / "layer_1.safetensors"), code=2)
