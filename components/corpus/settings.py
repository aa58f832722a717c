"""What the corpus is and how it becomes token sequences."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from components.settings import Settings


class CorpusSettings(Settings):
    source: Literal["standard_library", "files", "huggingface", "images"] = "standard_library"
    """Where documents come from: the running interpreter's standard library, text or JSONL files, a Hugging Face dataset,
    image files (one image is one document, its patches are the tokens)."""

    paths: tuple[str, ...] = ()
    """Files, folders or glob patterns (`files` only); `.jsonl` holds one document a line, anything else is one document."""

    dataset: str = ""
    """Name on the Hugging Face Hub, such as `HuggingFaceFW/fineweb` (`huggingface` only)."""

    subset: str | None = None
    """Configuration of the Hugging Face dataset, such as `sample-10BT`."""

    dataset_split: str = "train"
    """Split of the Hugging Face dataset that is read."""

    revision: str = "main"
    """Branch, tag or commit of the Hugging Face dataset; it is resolved to a commit before anything is read."""

    text_column: str = "text"
    """Column of a Hugging Face dataset, or key of a JSONL object, that holds the text."""

    image_column: str = "image"
    """Column of a Parquet file among `paths` that holds encoded images (`images` only)."""

    prompt: str | None = None
    """What a vision-language model reads with each image, such as `<image> Describe` (`images` only); without one, its
    vision tower runs alone."""

    held_out_fraction: float = Field(default=0.05, gt=0.0, lt=1.0)
    """Share of documents kept out of training, decided by a hash of each document's text."""

    context_length: int = Field(default=256, ge=2)
    """Tokens in a sequence, BOS included."""

    packing: Literal["crossing", "within_document"] = "crossing"
    """Whether a sequence may continue with the next document, or is padded at the end of each."""

    prepend_bos: bool = True
    """Whether every sequence starts with the tokenizer's BOS token (its EOS token where it has no BOS)."""

    train_tokens: int = Field(default=1_000_000, ge=1)
    """Tokens, BOS and padding not counted, that are prepared for training; fewer where the corpus ends first."""

    held_out_tokens: int = Field(default=100_000, ge=1)
    """Tokens, BOS and padding not counted, that are prepared for evaluation; fewer where the corpus ends first."""

    @model_validator(mode="after")
    def _source_has_what_it_needs(self) -> CorpusSettings:
        if self.source == "files" and not self.paths:
            raise ValueError("corpus.paths is empty; with source 'files' name at least one file, folder or pattern")
        if self.source == "images" and not self.paths:
            raise ValueError("corpus.paths is empty; with source 'images' name at least one image, folder or pattern")
        if self.source == "huggingface" and not self.dataset:
            raise ValueError("corpus.dataset is empty; with source 'huggingface' name a dataset of the Hub")
        return self
