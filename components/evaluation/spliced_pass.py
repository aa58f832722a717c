"""One pass over a span of held-out text: every variant of a hook point measured on the same tokens."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from components.activations.dataset.forward import counted_tokens
from components.activations.exclusion import Exclusion
from components.corpus.tokens import PADDING, Sequences
from components.evaluation.baselines import Rows, Variant
from components.evaluation.held_out import HeldOut, right_padded
from components.evaluation.intervals import DocumentGroups
from components.evaluation.job import Span, batch_size
from components.evaluation.metrics import GroupedSums, column_names, reconstruction_columns, token_losses
from components.evaluation.span_totals import SpanSums
from components.evaluation.splicing import Splicer
from components.evaluation.token_classes import CLASSES, TokenClasses
from components.hardware import keep_freed_memory
from components.progress import progress

logger = logging.getLogger(__name__)


class Measurement:
    """Adds up batch after batch; `finish` gives the sums."""

    def __init__(
        self,
        splicer: Splicer,
        variants: Mapping[str, Variant],
        with_kl: frozenset[str],
        shift: Tensor,
        exclusion: Exclusion,
        context_length: int,
        classes: TokenClasses | None,
        at_once: int | None = None,
    ) -> None:
        """shift `[d_in]`: any vector near the mean; it only keeps the variance from cancelling. exclusion:
        tokens that do not count. at_once: variants in one forward pass; all of them where it is not given."""
        self.splicer, self.variants, self.exclusion, self.classes = splicer, variants, exclusion, classes
        self.at_once = len(variants) if at_once is None else at_once
        self._with_kl = [name in with_kl for name in variants]
        self._shift = shift.double()
        # the first one may have begun in an earlier span, where its group is another
        self._documents = DocumentGroups(first_alone=True)
        self._names = column_names(tuple(variants))

        def sums(groups: int) -> GroupedSums:
            return GroupedSums(groups, len(self._names), len(shift), shift.device)

        self._by_document = sums(self._documents.most)
        self._by_position = sums(context_length.bit_length() + 1)
        self._by_class = sums(len(CLASSES)) if classes is not None else None

    def add(self, block: Sequences, text: HeldOut) -> int:
        """One batch of the text; returns how many tokens of it were counted."""
        block = right_padded(block)
        device = self._shift.device
        tokens, owner = torch.tensor(block.tokens).to(device).long(), torch.tensor(block.documents).to(device)
        x, clean = self.splicer.clean(text.inputs(block, device))
        counted = torch.tensor(counted_tokens(block, self.exclusion)).to(device)
        wide = torch.promote_types(x.dtype, torch.float32)
        for point, activation in {self.splicer.point: x, **self.splicer.read}.items():
            limit = self.exclusion.norm_limits.get(str(point))
            if limit is not None:
                counted = counted & (activation.to(wide).norm(dim=-1) <= limit)
        rows = x[counted].to(wide)
        if len(rows) == 0:
            return 0
        neurons, read = self.splicer.neurons, [self.splicer.read[point][counted].to(wide) for point in self.splicer.reads]
        given = Rows(rows, torch.cat(read, dim=1) if read else rows, None if neurons is None else neurons[counted])
        predicting = _predicting(text, counted, owner)
        predicts = predicting[counted]
        exact = rows.double()
        shifted = exact - self._shift
        columns: list[Tensor] = []
        variants = list(zip(self.variants.values(), self._with_kl, strict=True))
        for start in range(0, len(variants), self.at_once):
            some = variants[start : start + self.at_once]
            rebuilt = [variant(given) for variant, _ in some]
            if clean is None:
                ce_clean = torch.zeros(tokens.shape, dtype=torch.float64, device=device)
                ce = kl = ce_clean.expand(len(rebuilt), *tokens.shape)
            else:
                # Positions that are not counted (BOS, above all) keep their own activation in every variant.
                spliced = x.expand(len(rebuilt), *x.shape).clone()
                for stream, reconstruction in zip(spliced, rebuilt, strict=True):
                    stream[counted] = reconstruction.x_hat.to(x.dtype)
                logits = self.splicer.spliced(spliced)
                ce_clean, ce, kl = self._losses(clean, logits, tokens, predicting, [with_kl for _, with_kl in some])
            if not columns:
                columns = [torch.ones_like(exact[:, 0]), predicts.double(), shifted.square().sum(dim=1), ce_clean[counted]]
            for reconstruction, loss, divergence in zip(rebuilt, ce, kl, strict=True):
                columns += reconstruction_columns(exact, reconstruction.x_hat.double(), reconstruction.active)
                columns += [loss[counted], divergence[counted]]
        self._group(block, counted, torch.stack(columns, dim=1), shifted)
        return len(rows)

    def finish(self) -> SpanSums:
        used = self._documents.used
        return SpanSums(
            variants=tuple(self.variants),
            documents=self._documents.documents,
            by_document=self._by_document.rows(used),
            by_position=self._by_position.rows(),
            by_class=None if self._by_class is None else self._by_class.rows(),
        )

    def _losses(
        self, clean: Tensor, logits: Tensor, tokens: Tensor, predicting: Tensor, with_kl: Sequence[bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropies `[batch, length]`, `[variants, batch, length]` and KL alike, zero where nothing is predicted."""
        ce_clean = torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device)
        ce = ce_clean.expand(len(logits), *tokens.shape).clone()
        kl = torch.zeros_like(ce)
        if clean.shape[1] < tokens.shape[1]:  # of an image as a whole
            rows = predicting.any(dim=1)
            targets = tokens.new_zeros(int(rows.sum()))
            kl[:, predicting] = token_losses(clean[rows, 0], logits[:, rows, 0], targets, with_kl)[2].double()
            return ce_clean, ce, kl
        # Sequence by sequence: one vocabulary of float32 per position is what takes memory, and what should stay in cache.
        # The last position predicts nothing, or an answer that is in no text: of that, the KL alone is looked at.
        targets = torch.nn.functional.pad(tokens[:, 1:], (0, 1))
        stop = tokens.shape[1] - 1 + bool(predicting[:, -1].any())
        for row in range(len(tokens)):
            here, others, divergences = token_losses(clean[row, :stop], logits[:, row, :stop], targets[row, :stop], with_kl)
            keep = predicting[row, :stop]
            ce_clean[row, :stop] = here.double().where(keep, 0.0)
            ce[:, row, :stop] = others.double().where(keep, 0.0)
            kl[:, row, :stop] = divergences.double().where(keep, 0.0)
        return ce_clean, ce, kl

    def _group(self, block: Sequences, counted: Tensor, values: Tensor, shifted: Tensor) -> None:
        mask = counted.cpu().numpy()
        places = np.broadcast_to(np.arange(mask.shape[1]), mask.shape)[mask]
        # frexp's exponent of a whole number is its bit length
        groups = {"position": np.frexp(places)[1], "document": self._documents.of(block.documents[mask])}
        self._by_position.add(torch.tensor(groups["position"]).to(values.device).long(), values, shifted)
        self._by_document.add(torch.tensor(groups["document"]).to(values.device), values, shifted)
        if self.classes is not None and self._by_class is not None:
            classes = self.classes.of(block.tokens)[mask]
            self._by_class.add(torch.tensor(classes).to(values.device), values, shifted)


def _predicting(text: HeldOut, counted: Tensor, owner: Tensor) -> Tensor:
    """Where the logits are looked at, bool `[batch, length]`: wherever the next token is text and not padding; of images with a
    prompt at the end, too, where the answer begins; of images with classes once, at the first patch that counts."""
    after = torch.nn.functional.pad(owner[:, 1:] != PADDING, (0, 1))
    if text.images is None:
        return counted & after
    if text.predicts == "nothing":
        return torch.zeros_like(counted)
    if text.predicts == "classes":
        return counted & (counted.cumsum(dim=1) == 1)
    within_image = torch.zeros(counted.shape[1], dtype=torch.bool, device=counted.device)
    within_image[[place - 1 for place in text.images.layout.places if place > 0]] = True
    return counted & ~within_image


def measure(measurement: Measurement, text: HeldOut, span: Span, batch_sequences: int, title: str) -> SpanSums:
    """All batches of a span of the text."""
    keep_freed_memory()
    part = dataclasses.replace(text, sequences=span.sequences)
    with progress(logger, title, min(span.tokens, text.tokens), "tokens") as advance:
        for block in part.batches(span.tokens, batch_size(batch_sequences, measurement.at_once)):
            measurement.add(block, text)
            advance(int((block.documents >= 0).sum()), "")
    return measurement.finish()
