"""What the corpus is and how it becomes token sequences."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from components.settings import Settings
from components.storage.addresses import Address, LocalPath


class SourceSettings(Settings):
    source: Literal["standard_library", "files", "huggingface", "images"] = "standard_library"
    """Where documents come from: the running interpreter's standard library, files, a Hugging Face dataset, image files (one
    image is one document, its patches are the tokens)."""

    paths: tuple[Address, ...] = ()
    """Files, folders or glob patterns, local or `s3://` (`files` only). `.jsonl` and `.ndjson` (also `.gz`, `.bz2`, `.xz`,
    `.zst`) hold one document a line, `.parquet` one a row, `.json` one a line or entry where it is a table with the column;
    anything else is one document. Links are followed, hidden files and folders passed over."""

    dataset: LocalPath = ""
    """Name on the Hugging Face Hub, such as `HuggingFaceFW/fineweb`, or a local file or folder that `datasets` reads:
    Parquet, JSON, CSV, Arrow, or what its `save_to_disk` wrote (`huggingface` only)."""

    subset: str | None = None
    """Configuration of the Hugging Face dataset, such as `sample-10BT`."""

    dataset_split: str = "train"
    """Split of the Hugging Face dataset that is read."""

    revision: str = "main"
    """Branch, tag or commit on the Hub; it is resolved to a commit before anything is read. Unused for local datasets."""

    text_column: str = "text"
    """Column of a table, or key of a JSONL object, that holds the text."""

    messages_column: str | None = None
    """Column that holds conversations, read instead of `text_column`: lists of `{role, content}`, which become text by
    the tokenizer's chat template (without its BOS, which is up to `bos`)."""

    chat_template: str | None = None
    """Jinja text of a chat template to use instead of the tokenizer's own (with `messages_column`)."""

    split_special_tokens: bool = True
    """Whether a special token that a text spells out, such as `<|endoftext|>`, is text and not that token; false is for texts
    in which they stand on purpose. In conversations those of the template are tokens, and those of a message text."""

    def misfit(self) -> str | None:
        """What does not fit together, as a sentence that starts with the field's name; None where all is well."""
        if self.source == "files" and not self.paths:
            return "paths is empty; with source 'files' name at least one file, folder or pattern"
        if self.source == "images" and not self.paths:
            return "paths is empty; with source 'images' name at least one image, folder or pattern"
        if self.source == "huggingface" and not self.dataset:
            return "dataset is empty; with source 'huggingface' name a dataset of the Hub, or a local file or folder"
        if self.source not in ("files", "images") and self.paths:
            return f"paths has no effect with source '{self.source}'; it belongs to 'files' and 'images'"
        if self.source != "huggingface" and self.dataset:
            return f"dataset has no effect with source '{self.source}'; it belongs to source 'huggingface'"
        if self.messages_column is not None and self.source in ("standard_library", "images"):
            return f"messages_column has no effect with source '{self.source}', which holds no conversations"
        if self.chat_template is not None and self.messages_column is None:
            return "chat_template has no effect without messages_column, which names the column of conversations"
        if not self.split_special_tokens and (self.messages_column is not None or self.source == "images"):
            return "split_special_tokens has no effect on conversations and images; leave it out"
        return None


class MixtureSourceSettings(SourceSettings):
    weight: float = Field(gt=0.0)
    """Share of the corpus's tokens that this source gives, relative to the weights of the others."""

    name: str = ""
    """Name of the source in the manifest and in `documents.parquet`; its kind, numbered where needed, if empty."""


class LabelledSettings(Settings):
    """Text with labels, for probes (`evaluation.probing`)."""

    source: Literal["standard_library", "code_or_prose", "languages", "files"] = "standard_library"
    """Which package of the running interpreter's standard library a passage comes from, whether one is code or docstring, in
    which of six languages ten short texts are that ship here, or the rows of files."""

    name: str = Field(default="", pattern=r"^[a-zA-Z0-9_.-]*$", max_length=64)
    """Name of the task among the results; the source's where it is empty."""

    paths: tuple[str, ...] = ()
    """Parquet or JSONL files, folders or glob patterns, local or `s3://` (`files` only); a row is a document."""

    text_column: str = "text"
    """Column or key that holds the text (`files` only)."""

    label_column: str = "label"
    """Column or key that holds the label: strings, whole numbers, true or false (`files` only)."""

    @property
    def title(self) -> str:
        return self.name or self.source

    @model_validator(mode="after")
    def _paths_belong_to_files(self) -> LabelledSettings:
        if self.source == "files" and not self.paths:
            raise ValueError("evaluation.probing.tasks: paths is empty; with source 'files' name at least one file or pattern")
        if self.source != "files" and self.paths:
            raise ValueError(f"evaluation.probing.tasks: paths has no effect with source '{self.source}'; use source 'files'")
        return self


class NearDuplicateSettings(Settings):
    threshold: float = Field(default=0.8, gt=0.0, le=1.0)
    """Jaccard similarity of two documents' sets of shingles, estimated by MinHash, from which on the later is dropped."""

    shingle_words: int = Field(default=5, ge=1)
    """Consecutive words in a shingle; a character of Chinese or Japanese counts as a word."""

    permutations: int = Field(default=128, ge=16, le=4096)
    """Hash functions of MinHash; the estimate's standard error is at most `sqrt(J (1 - J) / permutations)`."""


class CorpusSettings(SourceSettings):
    form_first = (
        "source", "paths", "dataset", "subset", "text_column", "train_tokens", "held_out_tokens", "context_length", "mixture",
    )  # fmt: skip

    mixture: tuple[MixtureSourceSettings, ...] = ()
    """Several weighted sources in place of one: each has a `weight` and the fields of a source. Where one ends before its
    share is reached, the others go on in the proportion of their weights, and the manifest says so."""

    image_column: str = "image"
    """Column of a Parquet file among `paths` that holds encoded images (`images` only)."""

    prompt: str | None = None
    """What a vision-language model reads with each image, such as `<image> Describe` (`images` only); without one, its
    vision tower runs alone."""

    held_out_fraction: float = Field(default=0.05, gt=0.0, lt=1.0)
    """Share of documents kept out of training, decided by a hash of each document's text; of a conversation, by its roles
    and contents, so that it is on the same side under every chat template."""

    near_duplicates: NearDuplicateSettings | None = None
    """Drop documents that are nearly equal to an earlier one, within a split and across. Equal ones are always dropped."""

    context_length: int = Field(default=256, ge=2)
    """Tokens in a sequence, BOS included."""

    packing: Literal["crossing", "within_document"] = "crossing"
    """Whether a sequence may continue with the next document, or is padded at the end of each."""

    bos: Literal["sequence", "document", "none"] = "sequence"
    """Where the tokenizer's BOS token stands (its EOS token where it has no BOS): at the start of every sequence, before
    every document, or nowhere. Where BOS and EOS are one token, `document` puts one between two documents, not two."""

    train_tokens: int = Field(default=1_000_000, ge=1)
    """Tokens, BOS and padding not counted, that are prepared for training; fewer where the corpus ends first."""

    held_out_tokens: int = Field(default=100_000, ge=1)
    """Tokens, BOS and padding not counted, that are prepared for evaluation; fewer where the corpus ends first."""

    @property
    def sources(self) -> tuple[tuple[str, MixtureSourceSettings], ...]:
        """(field, source) of each source; one that is no mixture has weight 1. Every source has a name."""
        if not self.mixture:
            alone = self.model_dump(include=set(SourceSettings.model_fields))
            return (("corpus", MixtureSourceSettings(**alone, weight=1.0, name=self.source)),)
        kinds = [source.source for source in self.mixture]
        numbered = [
            kind if kinds.count(kind) == 1 else f"{kind}-{kinds[: index + 1].count(kind)}" for index, kind in enumerate(kinds)
        ]
        return tuple(
            (f"corpus.mixture.{index}", source.model_copy(update={"name": source.name or numbered[index]}))
            for index, source in enumerate(self.mixture)
        )

    @property
    def title(self) -> str:
        """The corpus in a few words, for people."""
        total = sum(source.weight for _, source in self.sources)
        shares = [f"{100 * source.weight / total:.3g}% " if self.mixture else "" for _, source in self.sources]
        return " + ".join(
            share + (source.dataset or source.name) for share, (_, source) in zip(shares, self.sources, strict=True)
        )

    @model_validator(mode="after")
    def _sources_have_what_they_need(self) -> CorpusSettings:
        if self.mixture:
            fields = SourceSettings.model_fields
            for name in fields:
                if getattr(self, name) != fields[name].default:
                    raise ValueError(
                        f"corpus.{name} has no effect beside corpus.mixture; give it to the sources in the mixture"
                    )
            if any(source.source == "images" for source in self.mixture):
                raise ValueError("corpus.mixture: images are not mixed with other sources; use source 'images' alone")
            names = [source.name for _, source in self.sources]
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"corpus.mixture: two sources have the name '{name}'; names must differ")
        for field, source in self.sources:
            misfit = source.misfit()
            if misfit is not None:
                raise ValueError(f"{field}.{misfit}")
        return self
