"""An architecture of somebody else's, in one file: trained, killed, resumed, folded, exported, evaluated, registered."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from processes import training_processes

from components import steps, storage
from components.interop.saelens import load_saelens, saelens_files
from components.run.config import parse_config
from components.run.specification import resolve
from components.sae.architectures import architectures
from components.sae.coder import Column
from components.settings import UserError
from components.training.checkpoint import checkpoint_folder
from components.training.start import load_start
from components.training.step import new_coder

TOY = '''
"""Features fire over a floor that follows how strongly they usually do."""

from typing import Literal

import torch
from pydantic import Field

from components.sae.coder import Coder, Exported, Losses, reconstruction_loss
from components.sae.features import DenseFeatures
from components.sae.settings import CoderSettings


class ToySettings(CoderSettings):
    decides = (*CoderSettings.decides, "share")

    architecture: Literal["toy"] = "toy"
    """For a test."""

    share: float = Field(default=0.3, ge=0, le=1)
    """Of its usual activation, under which a feature stays off."""


class ToySAE(Coder):
    Settings = ToySettings
    scaled_like_features = ("b_enc", "floor")

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.register_buffer("floor", torch.zeros(self.d_sae))

    def encode(self, x):
        z = self.pre_activations(x.reshape(-1, self.d_in))
        return DenseFeatures(torch.relu(z) * (z > self.floor))

    def losses(self, x, y, progress):
        features = self.encode(x)
        self._seen = features.means().detach()
        sparsity = features.means() @ self.W_dec.norm(dim=1)
        terms = {"reconstruction": reconstruction_loss(y, self.decode(features)), "sparsity": sparsity}
        return Losses(terms, {"reconstruction": 1.0, "sparsity": 0.5}, features.detach())

    @torch.no_grad()
    def after_step(self):
        self.floor.mul_(0.9).add_(0.1 * self.settings.share * self._seen)

    def exported(self):
        tensors = dict(self.state_dict())
        return Exported("jumprelu", {"threshold": tensors.pop("floor"), **tensors}, {})

    def load_exported(self, tensors):
        super().load_exported({"floor" if name == "threshold" else name: value for name, value in tensors.items()})
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package that was installed: its module, and the metadata that names it."""
    site = tmp_path / "site"
    metadata = site / "toy_architecture-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / "toy_architecture.py").write_text(TOY)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-architecture\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[sae_foundry.architectures]\ntoy = toy_architecture\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]))
    architectures.cache_clear()
    yield
    sys.modules.pop("toy_architecture", None)
    architectures.cache_clear()


def test_one_file_is_all_that_an_architecture_takes(toy: None, tiny_tree: dict):
    tiny_tree["sae"] = {"architecture": "toy", "d_sae": 64, "share": 0.5}
    tiny_tree["training"] |= {"tokens": 60_000, "learning_rate": 1e-2}
    run = resolve(parse_config(tiny_tree))
    steps.extract(run)

    def kill(points: list[dict]) -> None:
        if points[-1]["tokens"] >= 20_000:
            for child in training_processes():
                child.kill()

    with pytest.raises(RuntimeError, match="SIGKILL"):
        steps.launch_training(run, kill)
    assert storage.list_names(checkpoint_folder(run.sae_url))
    resumed = steps.launch_training(run)
    resumed_weights = storage.read_bytes(f"{run.sae_url}/sae_weights.safetensors")
    storage.delete(run.sae_url)
    undisturbed = steps.train(run)
    assert resumed.weights_sha256 == undisturbed.weights_sha256
    assert storage.read_bytes(f"{run.sae_url}/sae_weights.safetensors") == resumed_weights

    exported = load_saelens(Path(run.sae_url), torch.device("cpu"))
    assert exported.threshold.min() > 0  # the buffer has moved, and has come along
    torch.testing.assert_close(exported.W_dec.norm(dim=1), torch.ones(64))
    measured = steps.evaluate(run)
    assert measured.about.architecture == "toy"
    assert measured.metrics["explained_variance"] > 0
    with steps.tracked(run, {}) as open_run:
        assert steps.register(run, open_run).alias == "champion"

    tiny_tree["training"] |= {"start_from": "champion", "tokens": 70_000}
    warm = resolve(parse_config(tiny_tree))
    assert warm.start.location == f"models:/{run.registered_model}/1"
    training = new_coder(warm.training(), (Column("resid_post.1", 32),), (Column("resid_post.1", 32),), torch.device("cpu"))
    scale = run.dataset_manifest().column("resid_post.1").scale
    load_start(training.coder, warm.start.model_copy(update={"location": run.sae_url}), [scale], [scale])
    x = torch.randn(50, 32)
    with torch.no_grad():
        torch.testing.assert_close(training.coder(x * scale) / scale, exported(x), rtol=1e-5, atol=1e-5)


def test_one_that_cannot_be_read_back_is_no_start(toy: None, tiny_tree: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    kind = architectures()["toy"]
    coder = kind.autoencoder(kind.Settings(d_sae=64), 32)
    for name, content in saelens_files(coder, {}).items():
        (tmp_path / name).write_bytes(content)
    tiny_tree["sae"] = {"architecture": "toy", "d_sae": 64}
    tiny_tree["training"]["start_from"] = str(tmp_path)
    assert resolve(parse_config(tiny_tree)).start is not None
    monkeypatch.delattr(kind, "load_exported")
    with pytest.raises(UserError, match=r"training\.start_from: .* sae\.architecture 'toy' has no `load_exported`"):
        resolve(parse_config(tiny_tree))


def test_a_field_of_another_architecture_is_refused_with_those_that_there_are(toy: None, tiny_tree: dict):
    tiny_tree["sae"] = {"architecture": "toy", "d_sae": 64, "sparsity_coefficient": 3.0}
    with pytest.raises(UserError, match=r"sae\.sparsity_coefficient: there is no such field.*share"):
        parse_config(tiny_tree)
    tiny_tree["sae"] = {"architecture": "toys"}
    with pytest.raises(UserError, match=r"sae\.architecture: 'toys'.*relu.*toy"):
        parse_config(tiny_tree)


def test_a_field_that_moved_is_refused_with_its_new_place(tiny_tree: dict):
    tiny_tree["training"]["sparsity_coefficient"] = 3.0
    with pytest.raises(UserError, match=r"training\.sparsity_coefficient.*sae\.sparsity_coefficient"):
        parse_config(tiny_tree)
