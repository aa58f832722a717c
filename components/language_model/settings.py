"""Which language model, and how it is run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from components.settings import Settings
from components.storage.addresses import LocalPath


class SecondModelSettings(Settings):
    """A model that is run beside the first."""

    name: LocalPath
    """As that of the first: a Hugging Face Hub name, a local folder or `.gguf` file, `fetched/...` or `builtin/...`."""

    revision: str = "main"
    """Branch, tag or commit on the Hub; it is resolved to a commit before anything runs. Unused for folders."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the model's weights and of its forward pass."""

    attention_implementation: str | None = None
    """`eager`, `sdpa`, `flash_attention_2` or another of transformers'; where not given, the model's own default."""

    quantization: Literal["int8"] | None = None
    """`int8` holds the weights of linear layers in 8 bits (LLM.int8); needs a CUDA GPU and the package bitsandbytes."""

    device_map: Literal["auto"] | None = None
    """`auto` spreads a model that is larger than one GPU over all there are (then the CPU's memory); else one `device`."""

    trust_remote_code: bool = False
    """Whether code that comes with the model may run on this machine; read it before you turn this on."""


class LanguageModelSettings(SecondModelSettings):
    """The language model whose activations are read."""

    name: LocalPath = "builtin/stdlib-llama"
    """A Hugging Face Hub name, a local folder in transformers' format, a local `.gguf` file (dequantised to float32, once),
    what `sae fetch` fetched (`fetched/smollm2-135m-instruct`), or `builtin/stdlib-llama`, which ships here."""

    batch_sequences: int = Field(default=32, ge=1)
    """Sequences in one forward pass; it decides speed and memory, not results (beyond the last bit of rounding)."""

    second: SecondModelSettings | None = None
    """Another model with the same tokenizer, run on the same tokens: `second.resid_post.6` is a hook point of it, beside
    `resid_post.6` of the first. A crosscoder of both says what differs between them."""
