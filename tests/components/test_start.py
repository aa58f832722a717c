"""Training that continues from a coder: what it computes at its first step, what it is refused for, and what is remembered."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import training_processes
from safetensors.numpy import load_file, save_file

from components import steps, storage
from components.interop.saelens import saelens_files
from components.run import identity
from components.run.config import RunConfig, parse_config
from components.run.specification import Specification, resolve
from components.sae.architectures import architectures
from components.sae.coder import Coder, Column, Progress
from components.settings import UserError
from components.training.checkpoint import checkpoint_folder
from components.training.job import read_training_record
from components.training.start import content_of, load_start

D_IN, D_SAE = 8, 24
SCALE = 0.37
ALL = [name for name in ("relu", "topk", "batchtopk", "matryoshka", "jumprelu", "gated") if name in architectures()]


def coder_of(name: str, d_in: int = D_IN, d_sae: int = D_SAE, seed: int = 1) -> Coder:
    """One as it is in the middle of a training: no parameter or buffer is where it began."""
    kind = architectures()[name]
    small = {"k": 4} if "k" in kind.Settings.model_fields else {}
    coder = kind.autoencoder(kind.Settings(d_sae=d_sae, **small), d_in, "resid_post.1")
    coder.initialise(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in coder.named_parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter += noise.abs() if key == "threshold" else noise
    x = torch.randn(64, d_in, generator=generator)
    coder.losses(x, x, Progress(100, 100))
    coder.after_step()
    return coder


def exported_to(coder: Coder, folder: Path, scale: float = SCALE, **changed: object) -> Path:
    folder.mkdir(parents=True)
    for name, content in saelens_files(coder.folded([scale], [scale]), {"hook_name": "resid_post.1"}).items():
        (folder / name).write_bytes(content)
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**config, **changed}))
    return folder


def in_numpy(folder: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features and reconstruction of the files in a folder, in float64, by SAELens' definitions."""
    config = json.loads((folder / "cfg.json").read_text())
    w = {name: value.astype(np.float64) for name, value in load_file(folder / "sae_weights.safetensors").items()}
    given = x - w["b_dec"] if config["apply_b_dec_to_input"] else x
    z = given @ w["W_enc"]
    match config["architecture"]:
        case "standard":
            f = np.maximum(z + w["b_enc"], 0)
        case "topk":
            f = np.maximum(z + w["b_enc"], 0)
            limit = np.sort(f, axis=1)[:, -config["k"]][:, None]
            f = np.where(f >= limit, f, 0)
        case "jumprelu":
            f = np.maximum(z + w["b_enc"], 0) * (z + w["b_enc"] > w["threshold"])
        case "gated":
            f = (z + w["b_gate"] > 0) * np.maximum(z * np.exp(w["r_mag"]) + w["b_mag"], 0)
    return f, f @ w["W_dec"] + w["b_dec"]


def continued(name: str, folder: Path) -> Coder:
    """What training would begin with, on activations that are multiplied by SCALE."""
    kind = architectures()[name]
    column = Column("resid_post.1", D_IN)
    small = {"k": 4} if "k" in kind.Settings.model_fields else {}
    coder = kind(kind.Settings(d_sae=D_SAE, **small), (column,), (column,), D_SAE)
    coder.initialise(9)
    load_start(coder, content_of(folder, str(folder)), [SCALE], [SCALE])
    return coder


@pytest.mark.parametrize("name", ALL)
def test_the_first_step_computes_what_the_given_coder_does(name: str, tmp_path: Path):
    folder = exported_to(coder_of(name), tmp_path / "given")
    raw = np.random.default_rng(3).standard_normal((400, D_IN)) / SCALE
    features, reconstruction = in_numpy(folder, raw)
    assert 0.02 < (features > 0).mean() < 0.9
    coder = continued(name, folder)
    with torch.no_grad():
        found, y = coder.reconstruct(torch.from_numpy(raw * SCALE).float())
    np.testing.assert_allclose(y.numpy() / SCALE, reconstruction, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.dense().numpy() / SCALE, features, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_there_and_back_gives_the_same_files(name: str, tmp_path: Path):
    folder = exported_to(coder_of(name), tmp_path / "given")
    again = exported_to(continued(name, folder), tmp_path / "again")
    first, second = (load_file(path / "sae_weights.safetensors") for path in (folder, again))
    assert first.keys() == second.keys()
    for key, value in first.items():
        np.testing.assert_allclose(second[key], value, rtol=1e-5, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", ["relu", "jumprelu", "gated"])
def test_a_coder_of_others_is_understood(name: str, tmp_path: Path):
    """Rows of any norm, and a decoder bias that is subtracted first."""
    coder = coder_of(name)
    folder = tmp_path / "given"
    folder.mkdir()
    for file, content in saelens_files(coder, {}).items():
        (folder / file).write_bytes(content)
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**config, "apply_b_dec_to_input": True}))
    raw = np.random.default_rng(3).standard_normal((400, D_IN))
    expected = in_numpy(folder, raw)[1]
    with torch.no_grad():
        y = continued(name, folder)(torch.from_numpy(raw * SCALE).float())
    np.testing.assert_allclose(y.numpy() / SCALE, expected, rtol=1e-5, atol=1e-5)


def test_a_topk_of_others_whose_rows_differ_in_length_ranks_otherwise(tmp_path: Path):
    (tmp_path / "given").mkdir()
    for file, content in saelens_files(coder_of("topk"), {}).items():
        (tmp_path / "given" / file).write_bytes(content)
    with pytest.raises(UserError, match=r"training\.start_from: it ranks features by activation and its decoder rows differ"):
        continued("topk", tmp_path / "given")


def test_thresholds_that_differ_are_no_batchtopk(tmp_path: Path):
    folder = exported_to(coder_of("jumprelu"), tmp_path / "given")
    with pytest.raises(
        UserError, match=r"training\.start_from: its thresholds differ between features, and 'batchtopk' has one"
    ):
        continued("batchtopk", folder)


# Runs


@pytest.fixture
def given(tmp_path: Path) -> Path:
    return exported_to(coder_of("relu", 32, 64), tmp_path / "given", scale=1.0)


def config_of(tree: dict, **training: object) -> RunConfig:
    return parse_config({**tree, "training": {**tree["training"], **training}})


def starting(tree: dict, start_from: object, **training: object) -> Specification:
    return resolve(config_of(tree, start_from=str(start_from), **training))


def test_the_start_is_part_of_the_identity_where_it_is_set_and_by_content(tiny_tree: dict, given: Path, tmp_path: Path):
    plain = resolve(parse_config(tiny_tree))
    assert "start" not in plain.sae_identity
    for nothing in ("scratch", "champion"):  # there is no registry, and so no champion
        assert starting(tiny_tree, nothing).sae_digest == plain.sae_digest
    warm = starting(tiny_tree, given)
    assert warm.sae_digest != plain.sae_digest
    assert warm.dataset_digest == plain.dataset_digest
    assert warm.start.weights_sha256 == storage.file_sha256(given / "sae_weights.safetensors")
    assert Specification.from_json(warm.to_json()).start == warm.start
    given.rename(tmp_path / "moved")
    assert starting(tiny_tree, tmp_path / "moved").sae_digest == warm.sae_digest
    other = exported_to(coder_of("relu", 32, 64, seed=2), tmp_path / "other")
    assert starting(tiny_tree, other).sae_digest != warm.sae_digest
    assert identity.digest(plain.sae_identity) == identity.digest(
        identity.coder_identity(
            plain.config.training, plain.config.sae.identity(32), plain.dataset_digest, ("resid_post.1",), ("resid_post.1",),
            0, None,
        )
    )  # fmt: skip


def test_training_begins_with_the_given_coder_and_its_own_optimizer(tiny_tree: dict, given: Path):
    """One step of no length leaves the given coder; so its files come back."""
    run = starting(tiny_tree, given, tokens=256, batch_size=256, learning_rate=1e-12)
    steps.extract(run)
    steps.train(run)
    before, after = (load_file(Path(folder) / "sae_weights.safetensors") for folder in (given, run.sae_url))
    for name, value in before.items():
        np.testing.assert_allclose(after[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    assert run.training_record().identity["start"]["weights"] == run.start.weights_sha256


class Interrupted(Exception):
    pass


def stopping_after(tokens: int):
    def on_points(points: list[dict]) -> None:
        if points[-1]["tokens"] >= tokens:
            raise Interrupted

    return on_points


@pytest.mark.parametrize("stops", [[2_000], [5_000, 9_000]])
def test_an_interrupted_warm_training_ends_with_the_same_bytes(tiny_tree: dict, given: Path, stops: list[int]):
    run = starting(tiny_tree, given)
    steps.extract(run)
    record = steps.train(run)
    weights = storage.read_bytes(f"{run.sae_url}/sae_weights.safetensors")
    cold = resolve(parse_config(tiny_tree))
    assert steps.train(cold).weights_sha256 != record.weights_sha256
    storage.delete(run.sae_url)
    for tokens in stops:
        with pytest.raises(Interrupted):
            steps.train(run, stopping_after(tokens))
    assert len(storage.list_names(checkpoint_folder(run.sae_url))) == (1 if stops[-1] > 4_000 else 0)
    again = steps.launch_training(run)  # in a process of its own, as a flow does it
    assert storage.read_bytes(f"{run.sae_url}/sae_weights.safetensors") == weights
    assert again.curves == record.curves
    assert read_training_record(run.sae_url).weights_sha256 == record.weights_sha256


def test_a_killed_warm_training_ends_with_the_same_bytes(tiny_tree: dict, given: Path):
    run = starting(tiny_tree, given, tokens=60_000)
    steps.extract(run)

    def kill(points: list[dict]) -> None:
        if points[-1]["tokens"] >= 20_000:
            for child in training_processes():
                child.kill()

    with pytest.raises(RuntimeError, match="SIGKILL"):
        steps.launch_training(run, kill)
    assert storage.list_names(checkpoint_folder(run.sae_url))
    resumed = steps.launch_training(run)
    storage.delete(run.sae_url)
    assert steps.train(run).weights_sha256 == resumed.weights_sha256


def test_a_coder_that_changed_since_the_run_began_is_named(tiny_tree: dict, given: Path, tmp_path: Path):
    run = starting(tiny_tree, given)
    steps.extract(run)
    tensors = load_file(given / "sae_weights.safetensors")
    save_file({**tensors, "b_dec": tensors["b_dec"] + 1}, given / "sae_weights.safetensors")
    with pytest.raises(UserError, match=r"training\.start_from: .* is not the one that the run began with"):
        steps.train(run)


WRONG = {
    "shape": ({"sae": {"d_sae": 128}}, {}, r"it has 64 features; sae\.d_sae .* asks for 128"),
    "width": ({}, {"d_in": 16}, r"it reads 16 dimensions; 'resid_post\.1' of this language model has 32"),
    "architecture": (
        {"sae": {"architecture": "topk", "d_sae": 64}}, {},
        r"its architecture is 'standard' in SAELens' terms; accepted is 'topk', which is what sae\.architecture 'topk' is",
    ),
    "hook point": (
        {}, {"metadata": {"hook_name": "blocks.2.hook_resid_post"}}, r"trained at 'blocks\.2\.hook_resid_post'.*resid_post\.1",
    ),
    "model": ({}, {"metadata": {"model_name": "pythia-70m"}}, r"its model_name is 'pythia-70m'; language_model\.name is"),
    "normalisation": ({}, {"normalize_activations": "layer_norm"}, r"normalize_activations is 'layer_norm'; accepted is"),
    "scale": (
        {}, {"normalize_activations": "expected_average_only_in"},
        r"normalize_activations is 'expected_average_only_in'; accepted is 'none'",
    ),
    "a foreign architecture": (
        {}, {"architecture": "matching_pursuit"}, r"architecture is 'matching_pursuit'; accepted is standard",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_one_sentence_before_any_work(case: str, tiny_tree: dict, tmp_path: Path):
    tree, changed, said = WRONG[case]
    folder = exported_to(coder_of("relu", 32, 64), tmp_path / "given", **changed)
    with pytest.raises(UserError, match=r"training\.start_from: '.*given' does not fit: .*" + said) as caught:
        starting({**tiny_tree, **tree}, folder)
    assert "\n" not in str(caught.value)
    assert not Path(tiny_tree["storage"]["root"]).exists()


def test_a_folder_without_a_coder_is_named_with_what_is_accepted(tiny_tree: dict, tmp_path: Path):
    with pytest.raises(
        UserError, match=r"training\.start_from: '.*nowhere' holds no cfg\.json; accepted are 'champion'.*models:/"
    ):
        starting(tiny_tree, tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"training\.start_from: there is no registry yet that could hold 'models:/x/1'"):
        starting(tiny_tree, "models:/x/1")
