"""The sources of a corpus: what identifies each, and its documents in an order that is the same on every run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any

from components.corpus.documents import Document, Render
from components.corpus.files import formats_identity, read_file
from components.corpus.huggingface import huggingface_commit, is_local_dataset, list_local, read_huggingface
from components.corpus.listing import ListedFile, files_identity, find_files, find_images
from components.corpus.settings import CorpusSettings, MixtureSourceSettings, SourceSettings
from components.corpus.standard_library import read_standard_library, standard_library_files
from components.settings import Record, UserError


class ListedSource(Record):
    """A source as it was when a run was resolved."""

    content: dict[str, Any]
    """What decides its documents: content hashes for files, a commit for a Hub dataset."""
    files: tuple[ListedFile, ...] = ()
    """Of a source that is files on this machine or in a bucket; images likewise."""


def list_corpus(settings: CorpusSettings) -> tuple[ListedSource, ...]:
    """Every source, listed; a UserError when the corpus is not there."""
    return tuple(_listed(source, field, settings) for field, source in settings.sources)


def _listed(source: SourceSettings, field: str, settings: CorpusSettings) -> ListedSource:
    """`field` is the source's place in the configuration."""
    if source.source == "standard_library":
        files = tuple(standard_library_files())
        return ListedSource(content={"source": source.source, **files_identity(files)}, files=files)
    if source.source == "images":
        files = find_images(source.paths)
        chosen = {"image_column": settings.image_column, "prompt": settings.prompt}
        return ListedSource(content={"source": source.source, **files_identity(files), **chosen}, files=files)
    if source.messages_column is None:
        columns = {"text_column": source.text_column} | (
            {} if source.split_special_tokens else {"special_tokens": "recognised"}
        )
    else:
        columns = {"messages_column": source.messages_column, "chat_template": source.chat_template or ""}
    if source.source == "files":
        files = tuple(find_files(source.paths, f"{field}.paths"))
        found = files_identity(files) | formats_identity(files)
        return ListedSource(content={"source": source.source, **found, **columns}, files=files)
    selection = {"subset": source.subset, "dataset_split": source.dataset_split}
    if is_local_dataset(source):
        files = list_local(source, field)
        return ListedSource(content={"source": source.source, **files_identity(files), **selection, **columns}, files=files)
    pinned_to = {"dataset": source.dataset, "commit": huggingface_commit(source, field)}
    return ListedSource(content={"source": source.source, **pinned_to, **selection, **columns})


def corpus_content(settings: CorpusSettings, sources: Sequence[ListedSource]) -> dict[str, Any]:
    """What decides the documents of all sources together, as plain JSON."""
    if not settings.mixture:
        return sources[0].content
    shares = weights_to_shares(settings)
    names = [source.name for _, source in settings.sources]
    parts = zip(names, shares, sources, strict=True)
    return {"mixture": [{"name": name, "share": share, **source.content} for name, share, source in parts]}


def weights_to_shares(settings: CorpusSettings) -> list[float]:
    total = sum(source.weight for _, source in settings.sources)
    return [source.weight / total for _, source in settings.sources]


def read_documents(
    source: SourceSettings, field: str, seed: int, render: Render | None = None, listed: ListedSource | None = None
) -> Iterator[Document]:
    """Every document once, in an order that depends on `seed` and the files' names alone.

    Files are read in a hashed order, so that a budget of tokens takes a sample of the corpus and not its first
    letters of the alphabet. A Hugging Face dataset is read in its own order, since it is streamed. listed: what is read, and
    nothing that came later; the source as it is now where it is not given.
    """
    files = (listed or _listed(source, field, CorpusSettings())).files
    if source.source == "huggingface":
        yield from read_huggingface(source, field, render, files)
    elif source.source == "files":
        for file in sorted(files, key=lambda file: _hashed(seed, file.name)):
            yield from read_file(file, source, field, render)
    else:
        yield from sorted(read_standard_library(files), key=lambda document: _hashed(seed, document.name))


def pinned(settings: CorpusSettings) -> CorpusSettings:
    """The same corpus with every Hub revision resolved to a commit, so that no later step can see another one."""
    if settings.mixture:
        parts = [
            part.model_copy(update=_pin(source, field))
            for part, (field, source) in zip(settings.mixture, settings.sources, strict=True)
        ]
        return settings.model_copy(update={"mixture": tuple(parts)})
    return settings.model_copy(update=_pin(settings, "corpus"))


def _pin(source: SourceSettings, field: str) -> dict[str, str]:
    if source.source != "huggingface" or is_local_dataset(source):
        return {}
    return {"revision": huggingface_commit(source, field)}


def require_chat_templates(settings: CorpusSettings, render: Render | None) -> None:
    """Raise a UserError where conversations are to be read and the tokenizer has no chat template that works."""
    for field, source in settings.sources:
        if source.messages_column is None:
            continue
        assert render is not None
        try:
            render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], source.chat_template)
        except ValueError as error:
            where = f"{field}.chat_template" if source.chat_template else f"{field}.messages_column"
            raise UserError(f"{where}: {error}") from error


def describe(source: MixtureSourceSettings) -> list[str]:
    """Where a source was read, for people: it does not decide the documents, and a corpus may move."""
    return [source.dataset] if source.dataset else list(source.paths)


def _hashed(seed: int, name: str) -> bytes:
    return blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
