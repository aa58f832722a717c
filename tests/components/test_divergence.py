"""A training that diverges keeps its batch, and running the step again says what is not finite; checkpoints by time."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from components import steps, storage
from components.activations.dataset.reader import ActivationReader
from components.run.config import parse_config
from components.run.specification import Specification, resolve
from components.settings import UserError
from components.training import loop
from components.training.checkpoint import checkpoint_folder
from components.training.process import CONTINUE
from flows.cli import app

CPU = torch.device("cpu")


def planned(tree: dict, sae: dict[str, Any] | None = None, **training: Any) -> Specification:
    run = resolve(parse_config({**tree, "sae": {**tree["sae"], **(sae or {})}, "training": {**tree["training"], **training}}))
    steps.extract(run)
    return run


def test_the_batch_by_which_it_diverged_is_kept_and_run_again(tiny_tree: dict):
    run = planned(tiny_tree, learning_rate=1e15, learning_rate_warmup=0.5, checkpoint_tokens=256)
    with pytest.raises(UserError, match=r"--replay: no step of this training has diverged"):
        steps.replay(run)
    with pytest.raises(FloatingPointError, match=r"diverged at step (\d+): .*--replay") as error:
        steps.train(run)
    found = steps.replay(run)
    step, kept = found["step"], load_file(Path(run.sae_url, "diverged", "batch.safetensors"))
    assert f"diverged at step {step}:" in str(error.value)
    assert f"the last good checkpoint is that of step {step - 1}," in str(error.value)
    reader = ActivationReader(
        url=run.dataset_url, manifest=run.dataset_manifest(), columns=("resid_post.1",), batch_size=256, seed=run.config.seed
    )
    batches = reader.batches((step - 1) * 256)
    scale = run.dataset_manifest().column("resid_post.1").scale
    assert torch.equal(kept["resid_post.1"], next(batches)["resid_post.1"].float() * scale)
    batches.close()
    assert found["batch"]["resid_post.1"] == kept["resid_post.1"].abs().max().item()
    assert found["not_finite"] or found["terms"]["reconstruction"] > 1e9 * 32


def test_a_term_that_is_not_finite_is_named(tiny_tree: dict, monkeypatch: pytest.MonkeyPatch):
    """A row of the data is broken: the batch is, and all that is computed of it."""
    run = planned(tiny_tree)
    batches = ActivationReader.batches

    def broken(self: ActivationReader, start: int = 0, rank: int = 0, ranks: int = 1) -> Any:
        for number, batch in enumerate(batches(self, start, rank, ranks), start // self.batch_size):
            if number == 20:
                batch["resid_post.1"][17, 3] = torch.inf
            yield batch

    monkeypatch.setattr(ActivationReader, "batches", broken)
    with pytest.raises(FloatingPointError, match=r"diverged at step 21: .*the last good checkpoint is that of step 15"):
        steps.train(run)
    monkeypatch.undo()
    found = steps.replay(run)
    assert "column resid_post.1" in found["not_finite"]
    assert "term reconstruction" in found["not_finite"]
    assert not [name for name in found["not_finite"] if name.startswith("weight ")]
    assert found["rows"][0] == 17
    json.dumps(found, allow_nan=False)
    # The data is whole again: it continues, and ends as if nothing had been.
    again = steps.train(run)
    assert not storage.exists(f"{run.sae_url}/diverged")
    storage.delete(run.sae_url)
    assert steps.train(run).weights_sha256 == again.weights_sha256


def test_an_explosion_is_an_end_although_it_is_finite(tiny_tree: dict):
    run = planned(tiny_tree, learning_rate=1e4)
    with pytest.raises(FloatingPointError, match="beyond all bounds"):
        steps.train(run)
    found = steps.replay(run)
    assert found["not_finite"] == []
    assert found["terms"]["reconstruction"] > 1e9 * 32


def test_the_step_that_is_run_again_has_the_same_dead_features(tiny_tree: dict):
    run = planned(tiny_tree, {"auxk_coefficient": 0.1}, learning_rate=300.0, learning_rate_warmup=0.5, dead_after_share=1e-6)
    with pytest.raises(FloatingPointError):
        steps.train(run)
    assert steps.replay(run)["terms"]["auxk"] > 0


class Interrupted(Exception):
    pass


def test_checkpoints_come_by_time_too_and_the_newest_stay(tiny_tree: dict, monkeypatch: pytest.MonkeyPatch):
    clock = iter(range(10_000))
    monkeypatch.setattr(loop.time, "monotonic", lambda: 10.0 * next(clock))  # ten seconds pass whenever somebody looks
    run = planned(tiny_tree, checkpoint_tokens=10**9, checkpoint_minutes=0.5, checkpoints_kept=3)

    def stop(points: list[dict]) -> None:
        if points[-1]["tokens"] >= 15_000:
            raise Interrupted

    with pytest.raises(Interrupted):
        steps.train(run, stop)
    monkeypatch.undo()
    kept = sorted(name for name in storage.list_names(checkpoint_folder(run.sae_url)) if name.endswith(".safetensors"))
    numbers = [int(name.removeprefix("step-").removesuffix(".safetensors")) for name in kept]
    assert len(numbers) == 3
    assert numbers[2] - numbers[1] == numbers[1] - numbers[0] <= 4
    assert numbers[2] > 50


def test_sae_train_that_is_asked_to_stop_says_how_to_go_on(tiny_tree: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = planned(tiny_tree, checkpoint_tokens=10**9)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(run.config.model_dump(mode="json", exclude_unset=True)))
    train, sent = loop.train, []

    def interrupted(job: Any, device: Any, on_points: Any, should_stop: Any, *more: Any) -> Any:
        def points(found: list[dict]) -> None:
            if not sent:
                sent.append(os.kill(os.getpid(), signal.SIGTERM))

        return train(job, device, points, should_stop, *more)

    monkeypatch.setattr(loop, "train", interrupted)
    first = CliRunner().invoke(app, ["train", str(config)])
    assert first.exit_code == CONTINUE, first.output
    assert "at a checkpoint" in first.output
    assert len(storage.list_names(checkpoint_folder(run.sae_url))) == 1
    assert CliRunner().invoke(app, ["train", str(config)]).exit_code == 0
    weights = run.training_record().weights_sha256
    storage.delete(run.sae_url)
    assert steps.train(run).weights_sha256 == weights
