"""What is stored of a language model's activations, and how."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from components.settings import Settings

GENERATIONS_MIXED = 8


class ExcludeSettings(Settings):
    norms_above: float | None = Field(default=None, gt=1)
    """Tokens whose activation norm is over so many times the median (10 is usual); of several hook points that are stored, at
    any of them (an evaluation looks at its own one)."""

    positions: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Places in the sequence as the model sees it; 0 is the first one, where most models have their attention sink."""

    token_ids: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Tokens, whatever they stand beside."""


class ActivationSettings(Settings):
    hook_points: tuple[str, ...] = Field(default=("resid_post.1",), min_length=1)
    """Where activations are read, such as `resid_post.2`; several are stored side by side, aligned row by row."""

    split: Literal["train", "held_out"] = "train"
    """Which documents are stored; training reads `train`."""

    mode: Literal["stored", "online"] = "stored"
    """`stored`: all activations are there before training begins, and stay. `online`: they are made in generations, each while
    the one before it is trained on, and deleted after use; see `generation_tokens` and `disk_bytes`."""

    generation_tokens: int | None = Field(default=None, ge=1)
    """Of `online`: the most tokens in a generation; some million are usual."""

    generations_mixed: int | None = Field(default=None, ge=1, le=64)
    """Of `online`: so many generations are read side by side, so that a batch is of the text of all of them: with one alone,
    what is learned last leans towards the last one's text. 8 where it is not given."""

    disk_bytes: int | None = Field(default=None, ge=1)
    """Of `online`: what the generations may take under the storage root at any moment, what is being shuffled included; it does
    not change the result."""

    exclude: ExcludeSettings = ExcludeSettings()
    """Tokens that do not count: they are neither stored nor trained on, and keep their own activation in an evaluation."""

    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Number format on disk."""

    compression: Literal["none", "lz4", "zstd"] = "none"
    """Of the shards. Activations hardly shrink (zstd: 7% at a sixth of the speed), so it is off."""

    rows_per_shard: int = Field(default=131_072, ge=1)
    """Tokens in a shard, on average; one shard is what a worker holds in memory while it shuffles."""

    rows_per_group: int = Field(default=8_192, ge=1, le=1 << 20)
    """Tokens in a Parquet row group: the unit of a read."""

    sequences_per_chunk: int = Field(default=256, ge=1)
    """Sequences that pass through the language model between two commits; what a killed extraction repeats at most."""

    shuffle_workers: int = Field(default=2, ge=1)
    """Shards shuffled at the same time in one process, each in its own memory; it does not change the result."""

    @model_validator(mode="before")
    @classmethod
    def _generations_are_mixed(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("mode") == "online" and given.get("generations_mixed") is None:
            return {**given, "generations_mixed": GENERATIONS_MIXED}
        return given

    @model_validator(mode="after")
    def _generations_are_of_online(self) -> Self:
        for name in ("generation_tokens", "generations_mixed", "disk_bytes"):
            value = getattr(self, name)
            if self.mode == "stored" and value is not None:
                raise ValueError(
                    f"activations.{name}: {value} has no meaning with activations.mode 'stored'; set it to 'online'"
                )
            if self.mode == "online" and value is None:
                raise ValueError(f"activations.{name}: activations.mode 'online' needs it; give a number")
        return self
