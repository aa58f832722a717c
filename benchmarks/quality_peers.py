"""SAEs by SAELens on our batches: `quality.py` runs this with `{FOLDER: WORK, ...}` as JSON where SAELens is."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

from components.activations.dataset.manifest import require_manifest
from components.activations.dataset.reader import ActivationReader

KINDS: dict[str, tuple[Any, Any]] = {
    "standard": (StandardTrainingSAE, StandardTrainingSAEConfig),
    "jumprelu": (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig),
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
    "matryoshka": (MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig),
}
BATCHES_FOR_SCALE = 50


def batches(work: dict[str, Any]) -> Iterator[torch.Tensor]:
    """Those that ours are trained on, after some of them from which SAELens takes the scale."""
    name = work["hook_point"]
    for stop in (BATCHES_FOR_SCALE, None):
        reader = ActivationReader(
            url=work["dataset_url"], manifest=require_manifest(work["dataset_url"]), columns=(name,),
            batch_size=work["batch_size"], seed=work["seed"], device=torch.device("cpu"),
        )  # fmt: skip
        for number, batch in enumerate(reader.batches()):
            if number == stop:
                break
            yield batch[name].float()


def main() -> None:
    for folder, work in json.loads(sys.argv[1]).items():
        train(work, Path(folder))


def train(work: dict[str, Any], folder: Path) -> None:
    torch.manual_seed(work["seed"])
    kind, config = KINDS[work["architecture"]]
    d_sae, steps, options = work["d_sae"], work["tokens"] // work["batch_size"], dict(work["options"])
    if "matryoshka_widths" in options:
        options["matryoshka_widths"] = [round(share * d_sae) for share in options["matryoshka_widths"]]
    if "l1_coefficient" in options:
        options["l1_warm_up_steps"] = steps // 20
    if "l0_coefficient" in options:
        options["l0_warm_up_steps"] = steps  # over the whole training, as Anthropic's form has it
    d_in = require_manifest(work["dataset_url"]).column(work["hook_point"]).d_in
    sae = kind(config(d_in=d_in, d_sae=d_sae, normalize_activations="expected_average_only_in", **options))
    settings = SAETrainerConfig(
        total_training_samples=work["tokens"],
        train_batch_size_samples=work["batch_size"],
        lr=work["learning_rate"],
        lr_end=0.0,
        lr_decay_steps=steps // 5,
        dead_feature_window=steps // 10,
        n_batches_for_norm_estimate=BATCHES_FOR_SCALE,
        logger=LoggingConfig(log_to_wandb=False),
    )
    SAETrainer(cfg=settings, sae=sae, data_provider=batches(work)).fit()
    sae.save_inference_model(str(folder))


if __name__ == "__main__":
    main()
