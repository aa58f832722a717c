"""What an evaluation takes from training text: the mean, the typical norm, and the directions that vary most.

Read from sequences of the train split that are spread evenly over it, through the language model; so an SAE made elsewhere
is measured against the same numbers as ours, with or without an activation dataset.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from components.activations.dataset.forward import counted_tokens
from components.activations.exclusion import NOTHING, Exclusion, sinks_warning
from components.corpus.tokens import joined, read_sequences
from components.evaluation.held_out import HeldOut, right_padded
from components.language_model.hook_points import HookPoint, capture, parse_hook_point

_SAMPLE_ROWS = 4_096


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Statistics of training activations at the hook point."""

    mean: Tensor
    """`[d_in]`"""
    mean_norm: float
    """Mean of `||x||`."""
    median_norm: float
    """Median of `||x||`."""
    exclusion: Exclusion
    """Tokens that do not count, here and in what is measured against it."""
    covariance: Tensor
    """`[d_in, d_in]`, float64."""
    sample: Tensor
    """Some of the rows, `[at most 4096, d_in]`."""

    @property
    def d_in(self) -> int:
        return len(self.mean)

    def sinks_warning(self, hook_point: str) -> str | None:
        """One sentence where a few of the tokens that count hold most of the squared norm."""
        squared = self.covariance.trace().item() + self.mean.double().square().sum().item()
        return sinks_warning(hook_point, squared, self.median_norm)

    def on(self, device: torch.device) -> Reference:
        """The same with every tensor on `device`."""
        return replace(self, mean=self.mean.to(device), covariance=self.covariance.to(device), sample=self.sample.to(device))


def reference_statistics(
    model: nn.Module,
    point: HookPoint,
    text: HeldOut,
    tokens: int,
    batch_sequences: int,
    device: torch.device,
    exclusion: Exclusion = NOTHING,
) -> Reference:
    """Statistics over about `tokens` tokens of the train split."""
    limits = {parse_hook_point(name): limit for name, limit in exclusion.norm_limits.items()}
    split = text.manifest.splits["train"]
    chosen = min(split.sequences, -(-tokens * split.sequences // split.tokens))
    numbers = np.arange(chosen) * split.sequences // chosen
    count, norms, samples = 0, [], []
    total, products = torch.zeros(()), torch.zeros(())
    for start in range(0, chosen, batch_sequences):
        block = joined(
            [
                right_padded(read_sequences(text.url, text.manifest, "train", number, number + 1))
                for number in numbers[start : start + batch_sequences].tolist()
            ]
        )
        counted = torch.tensor(counted_tokens(block, exclusion)).to(device)
        captured = capture(model, list(dict.fromkeys([point, *limits])), text.inputs(block, device))
        for limited, limit in limits.items():
            wide = captured[limited].to(torch.promote_types(captured[limited].dtype, torch.float32))
            counted &= wide.norm(dim=-1) <= limit
        x = captured[point][counted]
        rows = x.double()
        count += len(rows)
        norms.append(rows.norm(dim=1).cpu())
        total = total.to(rows) + rows.sum(dim=0)
        products = products.to(rows) + rows.T @ rows
        samples.append(x[:: max(1, len(x) * chosen // (_SAMPLE_ROWS * len(block)))])
    mean = total / count
    lengths = torch.cat(norms)
    sample = torch.cat(samples)[:_SAMPLE_ROWS]
    return Reference(
        mean=mean.to(torch.promote_types(sample.dtype, torch.float32)),
        mean_norm=lengths.mean().item(),
        median_norm=lengths.median().item(),
        exclusion=exclusion,
        covariance=products / count - mean[:, None] * mean,
        sample=sample.to(torch.promote_types(sample.dtype, torch.float32)),
    )
