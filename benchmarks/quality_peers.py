"""SAEs by SAELens, dictionary_learning and sparsify on our batches, each trained by its own library: `quality.py` runs this
with `{FOLDER: WORK, ...}` as JSON where those are installed. A folder is there once what is in it is whole; what fails is told
of, and the others are trained."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

from components.activations.dataset.manifest import require_manifest
from components.activations.dataset.reader import ActivationReader

BATCHES_FOR_SCALE = 50


class Batches(Protocol):
    """Those that ours are trained on, without end, from the first on each time they are asked for."""

    d_in: int

    def __iter__(self) -> Iterator[Tensor]: ...


class Stored:
    """Those of an activation dataset."""

    def __init__(self, work: dict[str, Any]) -> None:
        self.work, self.manifest = work, require_manifest(work["dataset_url"])
        self.d_in = self.manifest.column(work["hook_point"]).d_in

    def __iter__(self) -> Iterator[Tensor]:
        name = self.work["hook_point"]
        reader = ActivationReader(
            url=self.work["dataset_url"], manifest=self.manifest, columns=(name,), batch_size=self.work["batch_size"],
            seed=self.work["seed"], device=torch.device("cpu"),
        )  # fmt: skip
        for batch in reader.batches():
            yield batch[name].float()


def by_saelens(work: dict[str, Any], batches: Batches, steps: int, folder: Path) -> Path:
    import sae_lens
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    kinds = {
        "standard": "StandardTrainingSAE", "gated": "GatedTrainingSAE", "jumprelu": "JumpReLUTrainingSAE",
        "topk": "TopKTrainingSAE", "batchtopk": "BatchTopKTrainingSAE", "matryoshka": "MatryoshkaBatchTopKTrainingSAE",
    }  # fmt: skip
    name, options = kinds[work["architecture"]], dict(work["options"])
    if "matryoshka_widths" in options:
        options["matryoshka_widths"] = [round(share * work["d_sae"]) for share in options["matryoshka_widths"]]
    if "l1_coefficient" in options:
        options["l1_warm_up_steps"] = steps // 20
    if "l0_coefficient" in options:
        options["l0_warm_up_steps"] = steps  # over the whole training, as Anthropic's form has it
    config = getattr(sae_lens, f"{name}Config")(
        d_in=batches.d_in, d_sae=work["d_sae"], normalize_activations="expected_average_only_in", **options
    )
    sae = getattr(sae_lens, name)(config)
    settings = SAETrainerConfig(
        total_training_samples=steps * work["batch_size"],
        train_batch_size_samples=work["batch_size"],
        lr=work["learning_rate"],
        lr_end=0.0,
        lr_warm_up_steps=round(work["warmup"] * steps),
        lr_decay_steps=steps // 5,
        dead_feature_window=max(1, steps // 10),
        n_batches_for_norm_estimate=BATCHES_FOR_SCALE,
        logger=LoggingConfig(log_to_wandb=False),
    )

    def rows() -> Iterator[Tensor]:
        for number, batch in enumerate(batches):  # from which it takes the scale
            if number == BATCHES_FOR_SCALE:
                break
            yield batch
        yield from batches

    SAETrainer(cfg=settings, sae=sae, data_provider=rows()).fit()
    sae.save_inference_model(str(folder))
    return folder


def by_dictionary_learning(work: dict[str, Any], batches: Batches, steps: int, folder: Path) -> Path:
    """Its steps are lengths of long trainings (warm-up 1,000, thresholds from the 1,000th on, dead after 10 million tokens):
    shares of this one instead."""
    absent = [name for name in ("nnsight", "zstandard") if name not in sys.modules]  # to buffer activations and to read text
    sys.modules.update({name: MagicMock() for name in absent})
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.gdm import GatedSAETrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate
    from dictionary_learning.trainers.top_k import TopKTrainer
    from dictionary_learning.training import trainSAE

    for unused in absent:
        del sys.modules[unused]  # other libraries ask whether they are there
    kind = {
        "standard": StandardTrainerAprilUpdate, "gated": GatedSAETrainer, "jumprelu": JumpReluTrainer,
        "topk": TopKTrainer, "batchtopk": BatchTopKTrainer, "matryoshka": MatryoshkaBatchTopKTrainer,
    }[work["architecture"]]  # fmt: skip
    ranks = work["architecture"] in ("topk", "batchtopk", "matryoshka")
    settings: dict[str, Any] = {
        "steps": steps, "activation_dim": batches.d_in, "dict_size": work["d_sae"], "layer": 0, "lm_name": "ours",
        "warmup_steps": round(work["warmup"] * steps), "decay_start": round(0.8 * steps), "seed": work["seed"], "device": "cpu",
        **work["options"],
    }  # fmt: skip
    if work["learning_rate"] is not None:
        settings["lr"] = work["learning_rate"]
    if ranks:
        settings |= {"threshold_start_step": round(0.8 * steps), "threshold_beta": 0.9}
    else:
        settings["sparsity_warmup_steps"] = steps // 20

    def trainer(**named: Any) -> Any:
        made = kind(**named)
        made.dead_feature_threshold = work["tokens"] // 10
        return made

    torch.manual_seed(work["seed"])  # one of its trainers takes no notice of its seed
    trainSAE(batches, [{"trainer": trainer, **settings}], steps, save_dir=str(folder), normalize_activations=True, device="cpu")
    return folder / "trainer_0"


class _Model(nn.Module):
    """What sparsify takes for a language model: its one module gives the batches in turn."""

    device, dummy_inputs, config = torch.device("cpu"), {}, None

    def __init__(self, batches: Batches) -> None:
        super().__init__()
        self.rows, self.d_in, self.point = iter(batches), batches.d_in, nn.Identity()

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, tokens: Tensor | None = None) -> Tensor:
        given: Tensor = self.point(torch.zeros(1, 1, self.d_in) if tokens is None else next(self.rows)[None])
        return given


def by_sparsify(work: dict[str, Any], batches: Batches, steps: int, folder: Path) -> Path:
    from sparsify import SparseCoderConfig, TrainConfig, Trainer

    settings = dict(work["options"])
    coder = SparseCoderConfig(num_latents=work["d_sae"], k=settings.pop("k"))
    config = TrainConfig(
        coder, batch_size=1, hookpoints=["point"], init_seeds=[work["seed"]], lr=work["learning_rate"],
        lr_warmup_steps=round(work["warmup"] * steps), dead_feature_threshold=work["tokens"] // 10, save_every=10**9,
        log_to_wandb=False, save_dir=str(folder), run_name="run", **settings,
    )  # fmt: skip
    one = {"input_ids": torch.zeros(work["batch_size"], dtype=torch.long)}
    Trainer(config, [one] * steps, _Model(batches)).fit()  # type: ignore[arg-type]
    return folder / "run" / "point"


LIBRARIES = {"saelens": by_saelens, "dictionary_learning": by_dictionary_learning, "sparsify": by_sparsify}


def main() -> None:
    failed = 0
    for number, (folder, work) in enumerate(json.loads(Path(sys.argv[1]).read_text()).items()):
        print(f"peers: {number}: {work['library']} {work['architecture']} {work['options']}", file=sys.stderr, flush=True)
        torch.manual_seed(work["seed"])
        with tempfile.TemporaryDirectory(dir=Path(folder).parent) as scratch:
            try:
                made = LIBRARIES[work["library"]](
                    work, Stored(work), work["tokens"] // work["batch_size"], Path(scratch) / "made"
                )
            except Exception:
                traceback.print_exc()
                failed += 1
            else:
                shutil.move(made, folder)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
