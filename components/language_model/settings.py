"""Which language model, and how it is run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from components.settings import Settings


class LanguageModelSettings(Settings):
    name: str = "builtin/stdlib-llama"
    """A Hugging Face Hub name, a local folder in transformers' format, or `builtin/stdlib-llama`, which ships here."""

    revision: str = "main"
    """Branch, tag or commit on the Hub; it is resolved to a commit before anything runs. Unused for folders."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the model's weights and of its forward pass."""

    batch_sequences: int = Field(default=32, ge=1)
    """Sequences in one forward pass; it decides speed and memory, not results (beyond the last bit of rounding)."""
