"""Measure an SAE on held-out documents, through the real language model with the SAE spliced in at its hook point."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from components import storage
from components.activations.manifest import Column
from components.corpus.tokens import PADDING, Sequences, read_sequences
from components.evaluation.metrics import LossSums, ReconstructionSums
from components.evaluation.settings import EvaluationSettings
from components.language_model.hook_points import HookPoint, spliced_logits
from components.progress import progress
from components.settings import UserError, digest

# Raised when the same SAE and text would no longer give the same metrics.
METRICS_VERSION = 1

logger = logging.getLogger(__name__)


class Autoencoder(Protocol):
    """Anything with features and reconstructions: an SAE, or a baseline to compare it with."""

    def encode(self, x: Tensor) -> Tensor: ...

    def decode(self, features: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The held-out sequences of a token dataset."""

    url: str
    manifest: dict[str, Any]

    def batches(self, tokens: int, size: int) -> Iterator[Sequences]:
        """Sequences in blocks of `size` until `tokens` counted tokens; the last sequence is cut there."""
        left, total = tokens, self.manifest["splits"]["held_out"]["sequences"]
        for start in range(0, total, size):
            block = read_sequences(self.url, self.manifest, "held_out", start, min(start + size, total))
            counted = block.documents >= 0
            running = counted.ravel().cumsum().reshape(counted.shape)
            documents = np.where(counted & (running > left), PADDING, block.documents)
            whole = (documents >= 0).any(axis=1)
            if whole.any():
                yield Sequences(tokens=block.tokens, documents=documents, positions=block.positions)[slice(int(whole.sum()))]
            left -= int(counted.sum())
            if left <= 0:
                return


def evaluation_identity(
    settings: EvaluationSettings, weights_sha256: str, token_digest: str, model: dict[str, Any], hook_point: str
) -> dict[str, Any]:
    """Everything that decides the metrics (on one kind of device)."""
    return {
        "kind": "evaluation",
        "metrics_version": METRICS_VERSION,
        "weights": weights_sha256,
        "tokens": token_digest,
        "model": model,
        "hook_point": hook_point,
        "settings": settings.model_dump(mode="json", exclude={"batch_sequences"}),
    }


def read_evaluation(url: str, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The evaluation beside the artifact at `url`, None unless it is the one of `identity`."""
    record = storage.read_json_if_present(storage.join(url, "evaluation.json"))
    return record if record is not None and record["digest"] == digest(identity) else None


def evaluate(
    settings: EvaluationSettings,
    sae: Autoencoder,
    d_sae: int,
    model: nn.Module,
    point: HookPoint,
    held_out: HeldOut,
    column: Column,
    device: torch.device,
) -> tuple[dict[str, Any], pa.Table]:
    """The metrics of one SAE, and a table with one row per feature.

    column: the dataset column that the SAE was trained on; its mean is the one of `ce_loss_mean`, its median norm that of
    `settings.exclude_norms_above`. Memory: the logits of two passes of one batch.
    """
    mean = torch.tensor(column.mean, device=device, dtype=torch.float32)
    limit = None if settings.exclude_norms_above is None else settings.exclude_norms_above * column.median_norm
    reconstruction = ReconstructionSums(column.d_in, d_sae, mean)
    losses = LossSums()
    documents: set[int] = set()
    total = min(settings.tokens, held_out.manifest["splits"]["held_out"]["tokens"])
    with progress(logger, "evaluate", total, "tokens") as advance:
        for block in held_out.batches(settings.tokens, settings.batch_sequences):
            owner = torch.tensor(block.documents).to(device)
            tokens = torch.tensor(block.tokens).to(device).long()
            _add_batch(sae, model, point, tokens, owner, mean, limit, reconstruction, losses)
            counted = block.documents[block.documents >= 0]
            documents.update(np.unique(counted).tolist())
            advance(len(counted), "")
    if reconstruction.tokens == 0 or losses.positions == 0:
        raise UserError(
            f"evaluation: no held-out token is left to measure on; raise evaluation.tokens ({settings.tokens}) or "
            f"evaluation.exclude_norms_above ({settings.exclude_norms_above})"
        )
    metrics = {
        **reconstruction.metrics(),
        **losses.metrics(),
        "evaluation_tokens": reconstruction.tokens,
        "evaluation_documents": len(documents),
    }
    return metrics, feature_table(reconstruction)


def _add_batch(
    sae: Autoencoder,
    model: nn.Module,
    point: HookPoint,
    tokens: Tensor,
    owner: Tensor,
    mean: Tensor,
    limit: float | None,
    reconstruction: ReconstructionSums,
    losses: LossSums,
) -> None:
    """Four passes over one batch: as it is, and with the counted positions replaced by x_hat, zero and the mean."""
    seen: list[Tensor] = []
    clean = spliced_logits(model, point, seen.append, tokens)
    x = seen[0]
    counted = owner >= 0
    if limit is not None:
        counted = counted & (x.float().norm(dim=-1) <= limit)
    rows = x[counted].float()
    with torch.no_grad():
        features = sae.encode(rows)
        x_hat = sae.decode(features)
    reconstruction.add(rows, x_hat, features)
    stand_ins = {"sae": x_hat, "zero": torch.zeros_like(rows), "mean": mean.expand_as(rows)}

    def logits_with(stand_in: Tensor) -> Tensor:
        # Positions that are not counted (BOS, above all) keep their own activation in every variant.
        return spliced_logits(model, point, lambda x: x.masked_scatter(counted[..., None], stand_in.to(x.dtype)), tokens)

    replaced = {name: logits_with(stand_in) for name, stand_in in stand_ins.items()}
    predicting = counted[:, :-1] & (owner[:, 1:] != PADDING)
    for row in range(len(tokens)):
        losses.add(
            clean[row, :-1],
            {name: logits[row, :-1] for name, logits in replaced.items()},
            tokens[row, 1:],
            predicting[row],
        )


def feature_table(sums: ReconstructionSums) -> pa.Table:
    """Per feature: density (share of tokens on which it fires), mean activation where it fires, largest activation."""
    fired = sums.fired.cpu().numpy()
    activation = sums.activation.cpu().numpy()
    return pa.table(
        {
            "feature": np.arange(len(fired), dtype=np.int64),
            "density": fired / sums.tokens,
            "mean_activation": np.divide(activation, fired, out=np.zeros_like(activation), where=fired > 0),
            "max_activation": sums.largest.cpu().numpy(),
        }
    )


def write_evaluation(
    url: str, identity: dict[str, Any], metrics: dict[str, Any], features: pa.Table, device: torch.device
) -> dict[str, Any]:
    """Put `features.parquet` and then `evaluation.json` beside the artifact at `url`."""
    with storage.whole_file(storage.join(url, "features.parquet")) as path:
        pq.write_table(features, path, compression="zstd")
    record = {"digest": digest(identity), "identity": identity, "metrics": metrics, "device": str(device)}
    storage.put_json(record, storage.join(url, "evaluation.json"))
    return record
