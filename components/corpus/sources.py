"""The sources of a corpus: what identifies each, and its documents in an order that is the same on every run."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

from components.corpus.documents import Document, Render
from components.corpus.files import files_identity, find_files, read_file
from components.corpus.huggingface import huggingface_commit, huggingface_identity, is_local_dataset, read_huggingface
from components.corpus.settings import CorpusSettings, MixtureSourceSettings, SourceSettings
from components.corpus.standard_library import read_standard_library, standard_library_files
from components.settings import UserError, digest
from components.storage import file_sha256


def corpus_identity(settings: CorpusSettings) -> dict[str, Any]:
    """What decides the documents, as plain JSON: content hashes for files, a commit for a Hub dataset.

    Raises a UserError when the corpus is not there.
    """
    identities = [source_identity(source, field) for field, source in settings.sources]
    if not settings.mixture:
        return identities[0]
    shares = weights_to_shares(settings)
    names = [source.name for _, source in settings.sources]
    return {
        "mixture": [
            {"name": name, "share": share, **identity} for name, share, identity in zip(names, shares, identities, strict=True)
        ]
    }


def weights_to_shares(settings: CorpusSettings) -> list[float]:
    total = sum(source.weight for _, source in settings.sources)
    return [source.weight / total for _, source in settings.sources]


def source_identity(source: SourceSettings, field: str) -> dict[str, Any]:
    """As `corpus_identity`, of one source; `field` is its place in the configuration."""
    if source.source == "standard_library":
        files = [[name, file_sha256(path)] for name, path in standard_library_files()]
        return {"source": source.source, "files": len(files), "content": digest(files)}
    if source.messages_column is None:
        columns = {"text_column": source.text_column}
    else:
        columns = {"messages_column": source.messages_column, "chat_template": source.chat_template or ""}
    if source.source == "files":
        return {"source": source.source, **files_identity(find_files(source.paths, f"{field}.paths")), **columns}
    return {"source": source.source, **huggingface_identity(source, field), **columns}


def read_documents(source: SourceSettings, field: str, seed: int, render: Render | None = None) -> Iterator[Document]:
    """Every document once, in an order that depends on `seed` and the files' names alone.

    Files are read in a hashed order, so that a budget of tokens takes a sample of the corpus and not its first
    letters of the alphabet. A Hugging Face dataset is read in its own order, since it is streamed.
    """
    if source.source == "huggingface":
        yield from read_huggingface(source, field, render)
    elif source.source == "files":
        files = find_files(source.paths, f"{field}.paths")
        for file in sorted(files, key=lambda file: _hashed(seed, file.name)):
            yield from read_file(file, source, field, render)
    else:
        yield from sorted(read_standard_library(), key=lambda document: _hashed(seed, document.name))


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
