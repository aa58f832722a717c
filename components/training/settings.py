"""How an SAE is trained. All lengths are in tokens, so that they hold for any batch size."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from components.bounds import LONGEST_SECONDS
from components.settings import Settings
from components.storage.addresses import LocalPath

_DecayRate = Annotated[float, Field(ge=0, lt=1)]


class RankSettings(Settings):
    """The processes that train one coder together, one for each GPU; more than one are started as torchrun does it. They give
    the weights of one process up to rounding."""

    data_parallel: int = Field(default=1, ge=1, le=65_536)
    """Shares of each batch: `training.batch_size` stays that of the whole batch."""

    feature_parallel: int = Field(default=1, ge=1, le=65_536)
    """Shares of the features: each process holds its part of encoder, decoder and optimizer."""

    @property
    def size(self) -> int:
        return self.data_parallel * self.feature_parallel


class TrainingSettings(Settings):
    form_first = ("tokens", "batch_size", "learning_rate", "dead_after_tokens", "start_from")

    hook_point: str | None = None
    """Column of the dataset to train on; the first of `activations.hook_points` where it is not given."""

    target: str | None = None
    """Another column, which the coder writes: a transcoder, such as from `mlp_in.6` to `mlp_out.6`."""

    crosscoder: tuple[str, ...] = ()
    """Several columns, all of which the coder reads and writes, side by side and each with a scale of its own (Lindsey et al.
    2024), such as `resid_post.6` and `second.resid_post.6` of two models; they take the place of `hook_point`."""

    start_from: LocalPath | None = Field(default=None, min_length=1)
    """The coder that training continues from, with an optimizer and a schedule of its own: `champion` (of the registered
    model), `models:/NAME/VERSION` or `models:/NAME@ALIAS`, or a folder in SAELens' format, local or `s3://`; of the same
    hook point, language model, shape and architecture. Where it is not given, training starts from new weights, and
    `retrain` from the champion where no more than the corpus or the length of the training has changed since; `scratch` means
    new weights there too."""

    tokens: int = Field(default=2_000_000, ge=1)
    """Tokens to train on; a dataset with fewer is read more than once."""

    batch_size: int = Field(default=1024, ge=1)
    """Tokens in a step."""

    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Micro-batches of equal size that a batch is taken in, one after the other: their gradients are averaged before the
    optimizer's step, and features are in memory of one of them at a time. Losses that are means over tokens are those of the
    whole batch up to rounding; what a coder ranks or relates within a batch (BatchTopK's choice, the unit of AuxK, an L0 that
    is aimed at) is that of each micro-batch. Of several processes with `data_parallel` each has its share of every one."""

    learning_rate: float = Field(default=1e-3, gt=0)
    """Adam's step size, constant until the decay (the paper: 5e-5 at its scale)."""

    learning_rate_warmup: float = Field(default=0.0, ge=0, le=1)
    """Share of training over which the learning rate rises linearly from zero."""

    learning_rate_decay: float = Field(default=0.2, ge=0, le=1)
    """Share of training, at its end, over which the learning rate falls linearly to zero."""

    adam_betas: tuple[_DecayRate, _DecayRate] = (0.9, 0.999)
    """Adam's decay rates of the first and second moment."""

    clip_gradient_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm."""

    autocast: Literal["none", "bfloat16"] = "none"
    """Number format of the matrix products; weights, optimizer and loss stay in float32."""

    dead_after_tokens: int = Field(default=10_000_000, ge=1)
    """A feature that has not fired for so many tokens counts as dead: in the training curves, and where dead features learn
    (AuxK)."""

    dead_after_share: float | None = Field(default=None, gt=0, le=1)
    """The same as a share of the training, in place of `dead_after_tokens`: by it trainings of any length are comparable."""

    checkpoint_tokens: int = Field(default=500_000, ge=1)
    """Tokens between two checkpoints; it does not change the result."""

    checkpoint_minutes: float | None = Field(default=None, gt=0, le=LONGEST_SECONDS / 60)
    """Longest time between two checkpoints; one is put when it is over, beside those by tokens."""

    checkpoints_kept: int = Field(default=1, ge=1)
    """The newest so many stay until training has finished; older ones are removed as newer ones are complete."""

    stop_seconds: float = Field(default=20.0, gt=0, le=86_400)
    """How long a training that is asked to stop (SIGTERM) may take for its last checkpoint; then the one before it counts.
    Prefect kills a cancelled run after 30 s, Kubernetes a pod after its grace period."""

    log_tokens: int = Field(default=20_000, ge=1)
    """Tokens between two points of the training curves; it does not change the result."""

    @model_validator(mode="after")
    def _micro_batches_are_equal(self) -> Self:
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"training.gradient_accumulation_steps: a batch of {self.batch_size} tokens (training.batch_size) has no "
                f"{self.gradient_accumulation_steps} equal parts; accepted is what divides it"
            )
        return self

    @property
    def micro_batch(self) -> int:
        """Tokens whose features are in memory at once, of all processes."""
        return self.batch_size // self.gradient_accumulation_steps

    @property
    def dead_after(self) -> int:
        """Tokens."""
        share = self.dead_after_share
        return self.dead_after_tokens if share is None else max(1, round(share * self.steps * self.batch_size))

    @property
    def steps(self) -> int:
        """Whole steps: at least `tokens` are read."""
        return -(-self.tokens // self.batch_size)
