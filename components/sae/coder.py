"""The interface of every coder: features that are read from some columns of activations and write others.

What is read is one or several columns side by side, `x` `[n, d_in]`; what is written likewise, `y` `[n, d_out]`. A sparse
autoencoder reads and writes the same column, a transcoder two different ones, a crosscoder several. An architecture is one
file under `architectures/` with its settings beside it; nothing else has to know of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from components.sae.features import Features
from components.sae.kernels.asked import Asked
from components.sae.mesh import Mesh
from components.sae.settings import CoderSettings

_DRAWN_ENTRIES = 1 << 22
"""Random numbers that are held at once: 16 MB."""


@dataclass(frozen=True)
class Column:
    """A column of activations that a coder reads or writes."""

    name: str
    """Of the hook point."""
    width: int


@dataclass(frozen=True)
class Progress:
    """Where a training is."""

    step: int
    """Optimizer steps taken."""
    steps: int
    """Of the whole training."""
    dead: Tensor | None = None
    """Which features count as dead, bool `[d_sae]`."""
    dead_count: Asked | None = None
    """How many those are."""

    def rise(self, share: float) -> float:
        """0 at the start, 1 after that share of the training, linear between."""
        length = share * self.steps
        return min(1.0, self.step / length) if length > 0 else 1.0

    def fall(self, share: float) -> float:
        """1 until that share of the training is left, 0 at its end, linear between."""
        length = share * self.steps
        return min(1.0, (self.steps - self.step) / length) if length > 0 else 1.0


@dataclass(frozen=True)
class Losses:
    """The terms of a loss, each a mean over the batch in float32, and what each counts."""

    terms: Mapping[str, Tensor]
    """`reconstruction` is `E ||y - y_hat||^2`, and always there."""
    weights: Mapping[str, float]
    features: Features
    """Detached."""

    @property
    def total(self) -> Tensor:
        terms = [self.terms[name] if weight == 1.0 else weight * self.terms[name] for name, weight in self.weights.items()]
        return sum(terms[1:], terms[0])


@dataclass(frozen=True)
class Exported:
    """A coder in terms of SAELens: the form in which it leaves the project."""

    architecture: str
    """`standard`, `topk`, `jumprelu` or `gated`: how features are read, whatever they write."""
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    """Further fields of `cfg.json`, such as `k`."""


class Coder(nn.Module, ABC):
    """W_enc `[d_in, d_sae]`, b_enc `[d_sae]`, W_dec `[d_sae, d_out]`, b_dec `[d_out]`; with an affine path beside the features
    W_skip `[d_out, d_in]` (the layout of SAELens)."""

    Settings: ClassVar[type[CoderSettings]]
    scaled_like_features: ClassVar[tuple[str, ...]] = ("b_enc",)
    """Parameters and buffers `[d_sae]` that have the unit of a feature's activation: `folded` scales them with it."""
    encoder_biases: ClassVar[tuple[str, ...]] = ("b_enc",)
    """Parameters `[d_sae]` that are added to `x W_enc`, each zero at the start."""
    by_feature_from: ClassVar[tuple[int, int] | None] = None
    """`d_in` and `d_sae` from which on W_enc lies in memory feature by feature, as the gradients of few features want it."""
    scaled_like_outputs: ClassVar[tuple[str, ...]] = ()
    """Those that have the unit of what is written."""
    parallel: ClassVar[bool] = False
    """Whether `losses` is right where this is a share of a coder: sums over features through `over_features`, what is no plain
    mean over tokens through `over_tokens`."""

    def __init__(self, settings: CoderSettings, reads: Sequence[Column], writes: Sequence[Column], d_sae: int) -> None:
        super().__init__()
        self.settings, self.reads, self.writes = settings, tuple(reads), tuple(writes)
        d_in, d_out = (sum(column.width for column in columns) for columns in (reads, writes))
        large = self.by_feature_from
        by_feature = large is not None and d_in >= large[0] and d_sae >= large[1]
        self.W_enc = nn.Parameter(torch.zeros(d_sae, d_in).T if by_feature else torch.zeros(d_in, d_sae))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_out))
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        self.subtracts = settings.subtract_decoder_bias
        """Whether features read `x - b_dec`: not where that is folded."""
        self.unit: Tensor | None = None
        """By what each dimension that is written is multiplied where lengths are taken, `[d_out]`; None for 1. Columns that
        were scaled differently in training differ in it afterwards."""
        self.mesh: Mesh | None = None
        """Where this holds a share of the features, or sees a share of every batch: the place among those that do."""
        self.read_b_dec: Tensor | None = None
        """Of a share of the features, the decoder bias as they have read it since the last step; its gradient is their part."""
        self.W_skip: nn.Parameter | None = nn.Parameter(torch.zeros(d_out, d_in)) if settings.skip else None

    @classmethod
    def autoencoder(cls, settings: CoderSettings, width: int, name: str = "activations") -> Self:
        """One that reads and writes the same column."""
        column = Column(name, width)
        return cls(settings, (column,), (column,), settings.features(width))

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

    @property
    def d_out(self) -> int:
        return self.W_dec.shape[1]

    @property
    def features_of_all(self) -> int:
        """`d_sae` of the whole, where this holds a share of the features."""
        return self.d_sae if self.mesh is None else self.d_sae * self.mesh.features

    @property
    def first_feature(self) -> int:
        """Its place among all features."""
        return 0 if self.mesh is None else self.d_sae * self.mesh.feature_rank

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Decoder rows of random direction and norm `decoder_init_norm`, the encoder their transpose where it has that shape
        (else of random columns of that norm), biases zero. For a coder as it is made. Drawn on the CPU, so that every device
        starts from the same weights; a share of a coder from its part of them."""
        random, norm = torch.Generator().manual_seed(seed), self.settings.decoder_init_norm
        own = slice(self.first_feature, self.first_feature + self.d_sae)
        rows = torch.cat(
            [
                part[max(0, own.start - row) : max(0, own.stop - row)]
                for row, part in normal_rows(self.features_of_all, self.d_out, random)
            ]
        )
        self.W_dec.copy_(norm * rows / rows.norm(dim=1, keepdim=True))
        if self.reads == self.writes:
            self.W_enc.copy_(self.W_dec.T)
        else:
            columns = torch.cat([part[:, own] for _, part in normal_rows(self.d_in, self.features_of_all, random)])
            self.W_enc.copy_(norm * columns / columns.norm(dim=0, keepdim=True))

    @torch.no_grad()
    def centre(self, read: Tensor, written: Tensor) -> None:
        """Put the decoder bias at a point of what is written, `[d_out]`, and let features begin by reading the distance from
        one of what is read, `[d_in]`. For a coder as `initialise` leaves it."""
        self.b_dec.copy_(written)
        if self.subtracts:
            return
        shift = read.double().cpu() @ self.W_enc.double().cpu()
        for name in self.encoder_biases:
            getattr(self, name).copy_(-shift)

    @torch.no_grad()
    def confine(self, read: Tensor, written: Tensor) -> None:
        """Keep decoder rows and encoder columns in the span of orthonormal columns, `[d_out, m]` and `[d_in, m]`, as long as
        before: random directions become random ones there. For a coder as `initialise` leaves it."""
        rows = (self.W_dec.double().cpu() @ written) @ written.T
        self._begin_in(rows, (self.W_enc.T.double().cpu() @ read) @ read.T)

    @torch.no_grad()
    def lean(self, read: Tensor, written: Tensor, share: float) -> None:
        """Turn decoder rows and encoder columns towards what tokens write, `[d_sae, d_out]`, and read, `[d_sae, d_in]`: unit
        vectors are mixed with the weight `share`. For a coder as `initialise` leaves it."""

        def mixed(own: Tensor, tokens: Tensor) -> Tensor:
            own, tokens = (torch.nn.functional.normalize(rows.double().cpu(), dim=1) for rows in (own, tokens))
            return (1 - share) * own + share * tokens

        self._begin_in(mixed(self.W_dec, written), mixed(self.W_enc.T, read))

    def _begin_in(self, rows: Tensor, columns: Tensor) -> None:
        """Decoder rows `[d_sae, d_out]` and encoder columns `[d_sae, d_in]` of these directions and of the length that settings
        want; an autoencoder's columns are its rows."""
        norm = self.settings.decoder_init_norm
        self.W_dec.copy_(norm * torch.nn.functional.normalize(rows, dim=1))
        if self.reads == self.writes:
            self.W_enc.copy_(self.W_dec.T)
        else:
            self.W_enc.copy_(norm * torch.nn.functional.normalize(columns, dim=1).T)

    @torch.no_grad()
    def fire_on(self, x: Tensor, share: float) -> None:
        """Set the encoder biases so that each feature is above its onset on that share of these tokens, x `[n, d_in]`."""
        wanted, onset = max(1, round(share * len(x))), self.onset().double().cpu()
        if self.subtracts:
            x = x - self.b_dec.to(x)
        for features in torch.arange(self.d_sae).split(1_024):
            products = x.double().cpu() @ self.W_enc[:, features].double().cpu()
            last = products.kthvalue(len(x) - wanted + 1, dim=0).values
            next_ = products.kthvalue(max(1, len(x) - wanted), dim=0).values
            for name in self.encoder_biases:
                getattr(self, name)[features] = (onset[features] - (last + next_) / 2).to(self.W_enc)

    def onset(self) -> Tensor:
        """What `x W_enc` and the encoder biases come to where a feature begins to fire: `[d_sae]`."""
        return torch.zeros_like(self.W_dec[:, 0])

    def pre_activations(self, x: Tensor) -> Tensor:
        """`x W_enc + b_enc`: `[n, d_in]` -> `[n, d_sae]`."""
        return torch.nn.functional.linear(x, self.W_enc.T, self.read_bias(self.b_enc))

    def read_bias(self, bias: Tensor) -> Tensor:
        """What is added to `x W_enc` for an encoder bias `[d_sae]`: where `b_dec` is subtracted, `bias - b_dec W_enc`."""
        if not self.subtracts:
            return bias
        if self.mesh is None or self.mesh.features == 1:
            return bias - self.b_dec @ self.W_enc
        if self.read_b_dec is None:
            self.read_b_dec = self.b_dec.detach().requires_grad_()
        return bias - self.read_b_dec @ self.W_enc

    def moved_biases(self, tensors: Mapping[str, Tensor], shift: Tensor) -> dict[str, Tensor]:
        """The encoder biases of a coder's tensors, so that it computes the same for `x W_enc` that is smaller by a shift
        `[d_sae]`."""
        return {name: tensors[name] + shift for name in self.encoder_biases}

    @torch.no_grad()
    def subtracting(self) -> Self:
        """This coder, which reads x, as one that computes the same from `x - b_dec`, where its settings want that."""
        if self.settings.subtract_decoder_bias and not self.subtracts:
            tensors = {name: value.double() for name, value in self.state_dict().items()}
            self.load_state_dict({**self.state_dict(), **self.moved_biases(tensors, tensors["b_dec"] @ tensors["W_enc"])})
            self.subtracts = True
        return self

    def row_norms(self, rows: Tensor | None = None) -> Tensor:
        """`||W_dec_i||`, times which a feature's activation is the length of what it writes, `[d_sae]`; or of other rows."""
        rows = self.W_dec if rows is None else rows
        return (rows if self.unit is None else rows * self.unit.to(rows)).norm(dim=1)

    @abstractmethod
    def encode(self, x: Tensor) -> Features:
        """Activations `[..., d_in]` -> features of all tokens, leading dimensions in one."""

    def decode(self, features: Features) -> Tensor:
        """Features of `n` tokens -> what they write, `[n, d_out]`."""
        return self.written(features, self.W_dec, self.b_dec)

    def written(self, features: Features, rows: Tensor, bias: Tensor) -> Tensor:
        """`decode` with rows `[d_sae, d_out]` and a bias of one's own."""
        if self.mesh is None:
            return features.decode(rows, bias)
        return self.mesh.over_features(features.decode(rows, torch.zeros_like(bias))) + bias

    def over_features(self, share: Tensor) -> Tensor:
        """A sum over the features of this coder -> over all features, where others are elsewhere."""
        return share if self.mesh is None else self.mesh.over_features(share)

    def over_tokens(self, mean: Tensor) -> Tensor:
        """A mean over the tokens of this batch -> over all tokens, where others are elsewhere."""
        return mean if self.mesh is None else self.mesh.over_tokens(mean)

    def skipped(self, y: Tensor, x: Tensor, held: bool = False) -> Tensor:
        """What features write, `[n, d_out]`, and the affine path from what is read, `[n, d_in]`, where there is one. held:
        without its gradient."""
        if self.W_skip is None:
            return y
        return y + torch.nn.functional.linear(x, self.W_skip.detach() if held else self.W_skip)

    def write(self, features: Features, x: Tensor) -> Tensor:
        """All that is written for these features of `x`: `[n, d_out]`."""
        return self.skipped(self.decode(features), x)

    def reconstruct(self, x: Tensor) -> tuple[Features, Tensor]:
        """Features and what is written, in units of the activations: `[n, d_in]` -> `[n, d_out]`."""
        features = self.encode(x)
        return features, self.write(features, x)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., d_in]` -> `[..., d_out]`."""
        return self.reconstruct(x.reshape(-1, self.d_in))[1].reshape(*x.shape[:-1], self.d_out)

    @abstractmethod
    def losses(self, x: Tensor, y: Tensor, progress: Progress) -> Losses:
        """The terms of the loss on a batch, x `[n, d_in]`, y `[n, d_out]`, scaled so that the mean squared norm of a column is
        its width."""

    def after_step(self) -> None:
        """Called after each optimizer step."""

    @abstractmethod
    def exported(self) -> Exported:
        """The function of this coder, as SAELens has it."""

    def load_exported(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the tensors of an `exported` coder of this shape; a ValueError in one sentence where they are those of
        another function than this architecture has. To be overridden where `exported` renames or leaves out."""
        differing = set(tensors) ^ set(self.state_dict())
        if differing:
            raise ValueError(f"{', '.join(sorted(differing))} is in one only of it and '{self.settings.architecture}'")
        self.load_state_dict(dict(tensors))

    @torch.no_grad()
    def folded(self, scale_in: Sequence[float], scale_out: Sequence[float]) -> Self:
        """The same function on unscaled activations, for a coder trained on columns that were multiplied by these scales (one
        for each column), with unit decoder rows.

        Scales and decoder norms go into the encoder: a feature's activation is then the length of what it adds to what is
        written, which is what the paper reads (`f_i * ||W_dec_i||`). A decoder bias that is subtracted goes there too. Computed
        in float64. Of several columns with scales of their own the length is the one that training saw, see `unit`: what was
        ranked by it stays so.
        """
        reads, writes = per_dimension(self.reads, scale_in), per_dimension(self.writes, scale_out)
        common = scale_out[0]
        rows = self.W_dec.double().cpu()
        norm = self.row_norms(rows)
        norm = torch.where(norm > 0, norm, torch.ones_like(norm))
        gain = norm / common
        result = type(self)(self.settings, self.reads, self.writes, self.d_sae)
        tensors = {
            name: value.double().cpu() if value.is_floating_point() else value for name, value in self.state_dict().items()
        }
        if self.subtracts:
            tensors |= self.moved_biases(tensors, -(tensors["b_dec"] @ tensors["W_enc"]))
        tensors["W_enc"] = tensors["W_enc"] * reads[:, None] * gain
        tensors["W_dec"] = rows * (common / writes) / norm[:, None]
        tensors["b_dec"] = tensors["b_dec"] / writes
        if self.W_skip is not None:
            tensors["W_skip"] = tensors["W_skip"] * reads / writes[:, None]
        for name in self.scaled_like_features:
            tensors[name] = tensors[name] * gain
        for name in self.scaled_like_outputs:
            tensors[name] = tensors[name] / common
        result.subtracts = False
        result.load_state_dict(tensors)
        unit = (writes if self.unit is None else self.unit * writes) / common
        result.unit = None if torch.allclose(unit, torch.ones_like(unit), rtol=1e-12) else unit
        return result.train(self.training)


def normal_rows(rows: int, width: int, generator: torch.Generator) -> Iterator[tuple[int, Tensor]]:
    """`torch.randn(rows, width)` in parts of some rows, each with the number of its first: the same numbers, since torch draws
    them 16 at a time, and the last 16 once more where they are no multiple of it."""
    step = max(1, _DRAWN_ENTRIES // (16 * width)) * 16
    edges = [*range(0, rows - step, step), rows] if rows > 2 * step else [0, rows]
    for first, stop in pairwise(edges):
        yield first, torch.randn(stop - first, width, generator=generator)


def per_dimension(columns: Sequence[Column], scales: Sequence[float]) -> Tensor:
    """A number for each column -> one for each dimension, float64."""
    return torch.cat(
        [torch.full((column.width,), scale, dtype=torch.float64) for column, scale in zip(columns, scales, strict=True)]
    )


def reconstruction_loss(y: Tensor, y_hat: Tensor) -> Tensor:
    """`E ||y - y_hat||^2` in float32, whatever the products were computed in: y, y_hat `[n, d_out]`."""
    return (y.float() - y_hat.float()).square().sum(dim=1).mean()


def in_float32(device: torch.device) -> torch.autocast:
    """A block in which autocast computes no product in bfloat16."""
    return torch.autocast(device.type, enabled=False)
