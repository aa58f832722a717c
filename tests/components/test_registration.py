"""A coder on its way into the registry: what goes with it, what is run of it, and that its files are those that were sent."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import save_file

from components.interop.saelens import saelens_files
from components.registry import model_files, registration
from components.registry.card import shortened
from components.registry.gates import Gates
from components.registry.promotion import check_files
from components.registry.pyfunc_sae import SAE
from components.registry.records import Lineage
from components.sae.architectures.relu import ReLUSAE, ReLUSettings
from components.storage import file_sha256
from components.tracking.runs import tracked_run
from components.tracking.settings import TrackingSettings
from components.tracking.store import connect

LINEAGE = Lineage(
    mlflow_run="r", sae_digest="s", weights_sha256="w", dataset_digest="d", dataset_url="u", token_digest="t",
    token_url="file:///tokens",
    configuration={
        "corpus": {"source": "files", "train_tokens": 10, "context_length": 4}, "language_model": {"name": "tiny"},
        "activations": {"hook_points": ["resid_post.1"]}, "sae": {"d_sae": 8}, "training": {}, "seed": 0,
    },
)  # fmt: skip


def candidate(folder: Path, d_in: int = 4, d_sae: int = 8) -> registration.Candidate:
    """An artifact of a coder with random weights."""
    folder.mkdir(parents=True)
    coder = ReLUSAE.autoencoder(ReLUSettings(d_sae=d_sae), d_in)
    coder.initialise(0)
    for name, content in saelens_files(coder, {}).items():
        (folder / name).write_bytes(content)
    (folder / "lineage.json").write_text(LINEAGE.model_dump_json())
    return registration.Candidate(
        name="tiny.resid", folder=folder, run_digest="run-1", evaluation_set="set",
        weights_sha256=file_sha256(folder / "sae_weights.safetensors"), metrics={"l0": 2.0, "evaluation_tokens": 100},
        lineage=LINEAGE, tags={}, model_tags={},
    )  # fmt: skip


def registered(root: Path, made: registration.Candidate) -> tuple[MlflowClient, str]:
    settings = TrackingSettings(registered_model=made.name)
    with tracked_run(settings, str(root), "tiny", made.run_digest, {}, {}) as run:
        version, decision = registration.register(run, made, Gates(evaluation_tokens=1))
    assert decision.alias == "champion", decision.reason
    return connect(settings, str(root)), str(version.version)


def test_code_that_the_store_gives_back_changed_is_not_run_and_the_model_is_not_registered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    upload = MlflowClient.log_model_artifacts

    def changing(client: MlflowClient, model_id: str, folder: str) -> None:
        upload(client, model_id, folder)
        for code in (tmp_path / "root").rglob("pyfunc_sae.py"):
            code.write_text(f"open({str(tmp_path / 'was run')!r}, 'w')\n{code.read_text()}")

    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match=r"another model than was sent: pyfunc_sae\.py is changed"),
    ):
        patch.setattr(MlflowClient, "log_model_artifacts", changing)
        registered(tmp_path / "root", candidate(tmp_path / "sae"))
    assert not (tmp_path / "was run").exists()
    client, number = registered(tmp_path / "root", candidate(tmp_path / "again" / "sae"))
    version = client.get_model_version("tiny.resid", number)
    assert check_files(client, version).passed
    model_id = version.source.removeprefix("models:/")  # the model that was refused is in the store too
    (stored,) = [path for path in (tmp_path / "root").rglob("MLmodel") if model_id in path.parts]
    stored.write_text(stored.read_text() + "\n# changed later")
    found = check_files(client, version)
    assert (found.passed, found.measured) == (False, "MLmodel is changed")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "a.py").write_text("other"), "a.py is changed"),
        (lambda folder: (folder / "sub" / "b.bin").unlink(), "sub/b.bin is missing"),
        (lambda folder: (folder / "sub" / "c.py").write_text("new"), "sub/c.py is not one of its files"),
        (lambda folder: (folder / "MODEL_FILES.json").write_text("{}"), "MODEL_FILES.json is changed"),
        (lambda folder: (folder / "MODEL_FILES.json").unlink(), "MODEL_FILES.json is missing"),
        (lambda folder: (folder / "registered_model_meta").write_text("MLflow's own"), None),
    ],
)
def test_any_file_that_differs_is_named(tmp_path: Path, change, said: str | None):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.py").write_text("code")
    (tmp_path / "sub" / "b.bin").write_bytes(b"weights")
    wanted = model_files.list_files(tmp_path)
    assert model_files.difference(tmp_path, wanted) is None
    change(tmp_path)
    assert model_files.difference(tmp_path, wanted) == said


D_IN, D_SAE, D_OUT = 5, 12, 7


def weights(names: str, d_out: int = D_IN) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, d_out), "b_dec": (d_out,)}
    return {name: torch.randn(shapes.get(name, (D_SAE,))) for name in names.split()}


def relu(w: dict, x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x @ w["W_enc"] + w["b_enc"])


def topk(w: dict, x: torch.Tensor) -> torch.Tensor:
    before = x @ w["W_enc"] + w["b_enc"]
    limit = before.sort(dim=1, descending=True).values[:, 2:3]  # the third largest
    return torch.where(before >= limit, before.clamp_min(0), 0)


def jumprelu(w: dict, x: torch.Tensor) -> torch.Tensor:
    before = x @ w["W_enc"] + w["b_enc"]
    return torch.where(before > w["threshold"], before, 0).clamp_min(0)


def gated(w: dict, x: torch.Tensor) -> torch.Tensor:
    opened = (x @ w["W_enc"] + w["b_gate"] > 0).float()
    return opened * torch.relu(x @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"])


CODERS = {
    "standard": ("W_enc b_enc W_dec b_dec", D_IN, {}, relu),
    "topk": ("W_enc b_enc W_dec b_dec", D_IN, {"k": 3}, topk),
    "jumprelu": ("W_enc b_enc W_dec b_dec threshold", D_IN, {}, jumprelu),
    "gated": ("W_enc W_dec b_dec b_gate r_mag b_mag", D_IN, {}, gated),
    "transcoder": ("W_enc b_enc W_dec b_dec", D_OUT, {"d_out": D_OUT}, relu),
}


def loaded(folder: Path, tensors: dict, **config) -> SAE:
    plain = {"d_in": D_IN, "d_sae": D_SAE, "apply_b_dec_to_input": False, "normalize_activations": "none"}
    (folder / "cfg.json").write_text(json.dumps({**plain, **config}))
    save_file(tensors, folder / "sae_weights.safetensors")
    model = SAE()
    model.load_context(SimpleNamespace(artifacts={"sae": str(folder)}))
    return model


@pytest.mark.parametrize("architecture", CODERS)
def test_the_stored_code_computes_what_the_architecture_is(tmp_path: Path, architecture: str):
    names, d_out, options, features = CODERS[architecture]
    tensors = weights(names, d_out)
    model = loaded(tmp_path, tensors, architecture=architecture, **options)
    x = torch.randn(50, D_IN)
    answer, expected = model.predict(None, x.numpy()), features(tensors, x)
    assert 0 < int((expected > 0).sum()) < expected.numel()
    assert answer["features"].dtype == np.float32
    np.testing.assert_allclose(answer["features"], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(answer["reconstruction"], expected @ tensors["W_dec"] + tensors["b_dec"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "field",
    [{"architecture": "matryoshka"}, {"apply_b_dec_to_input": True}, {"normalize_activations": "layer_norm"}],
)
def test_the_stored_code_refuses_what_it_does_not_compute(tmp_path: Path, field: dict):
    (name,) = field
    with pytest.raises(ValueError, match=f"{name} is .*accepted is"):
        loaded(tmp_path, weights("W_enc b_enc W_dec b_dec"), **{"architecture": "standard", **field})


def test_a_long_card_is_cut_between_lines_for_the_version_and_whole_in_the_run():
    card = "# name\n" + "".join(f"- line {number}\n" for number in range(1_000))
    short = shortened(card)
    assert len(short) <= 5_000
    assert short.endswith("`MODEL_CARD.md` in the run's folder `sae`.\n")
    lines = short.split("\n\nThe whole")[0].splitlines()
    assert lines == card.splitlines()[: len(lines)]
    assert shortened("short") == "short"
