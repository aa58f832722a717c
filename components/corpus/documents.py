"""Documents: where the text comes from, in an order that is the same on every run."""

from __future__ import annotations

import json
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

import fsspec

from components.corpus.settings import CorpusSettings
from components.settings import UserError, digest, is_commit
from components.storage import file_sha256, is_local, resolve

# Tests are repetitive fixtures, site-packages is whatever the user installed, and the codec tables of `encodings` are
# hundreds of near-identical maps of numbers: a held-out table would be memorised from its twin in the training text.
STDLIB_EXCLUDED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings"}
)
# Written by the build of the interpreter: full of local paths and flags, different on every machine.
STDLIB_EXCLUDED_PREFIXES = ("_sysconfigdata", "_sysconfig_vars")


@dataclass(frozen=True, kw_only=True)
class Document:
    """One document: `name` is where it came from, `sha256` that of its UTF-8 text."""

    name: str
    text: str

    @property
    def sha256(self) -> str:
        return sha256(self.text.encode("utf-8")).hexdigest()


def split_of(text: str, held_out_fraction: float) -> str:
    """`"held_out"` or `"train"`, from the text alone.

    The decision looks at nothing but the text, so that the same document is on the same side for every model,
    corpus mixture, seed and order, and two copies of one text can never stand on both sides.
    """
    value = int.from_bytes(blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")
    return "held_out" if value < held_out_fraction * 2.0**64 else "train"


def standard_library_files() -> list[tuple[str, Path]]:
    """(name, path) of the source files of the running interpreter's standard library, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if STDLIB_EXCLUDED_FOLDERS.isdisjoint(relative.parts) and not path.name.startswith(STDLIB_EXCLUDED_PREFIXES):
            found.append((f"python{sys.version_info.major}.{sys.version_info.minor}/{relative.as_posix()}", path))
    return sorted(found)


def read_standard_library() -> Iterator[Document]:
    """The standard library's modules as documents; undecodable and empty files are left out."""
    for name, path in standard_library_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few modules declare another encoding on purpose
            continue
        if text.strip():
            yield Document(name=name, text=text)


def _text_files(paths: tuple[str, ...]) -> list[str]:
    """The files that paths, folders and patterns name, as URLs, sorted; a UserError for one that names nothing."""
    found: set[str] = set()
    for path in paths:
        filesystem, bare = resolve(path)
        if filesystem.isdir(bare):
            matches = filesystem.find(bare)
        else:
            matches = [name for name in filesystem.glob(bare) if filesystem.isfile(name)]
        if not matches:
            raise UserError(f"corpus.paths: '{path}' names no file; give an existing file, folder or glob pattern")
        found.update(filesystem.unstrip_protocol(match) for match in matches)
    return sorted(found)


def _is_jsonl(url: str) -> bool:
    return any(url.endswith(".jsonl" + compression) for compression in ("", ".gz", ".bz2", ".xz", ".zst"))


def _read_files(settings: CorpusSettings, urls: list[str]) -> Iterator[Document]:
    for url in urls:
        try:
            with fsspec.open(url, "rt", encoding="utf-8", compression="infer") as stream:
                if not _is_jsonl(url):
                    text = stream.read()
                    if text.strip():
                        yield Document(name=url, text=text)
                    continue
                for number, line in enumerate(stream, start=1):
                    if line.strip():
                        yield Document(name=f"{url}:{number}", text=_jsonl_text(line, settings.text_column, f"{url}:{number}"))
        except UnicodeDecodeError as error:
            raise UserError(f"corpus.paths: '{url}' is not UTF-8 text ({error.reason} at byte {error.start})") from error


def _jsonl_text(line: str, column: str, where: str) -> str:
    try:
        text = json.loads(line)[column]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"corpus.text_column: {where} is not a JSON object with the key '{column}'") from error
    if not isinstance(text, str):
        raise UserError(f"corpus.text_column: '{column}' in {where} is a {type(text).__name__}; it must be a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"corpus.text_column: '{column}' in {where} holds a lone surrogate, which is no text") from error
    return text


def _read_huggingface(settings: CorpusSettings, commit: str) -> Iterator[Document]:
    import datasets

    rows = datasets.load_dataset(
        settings.dataset, settings.subset, split=settings.dataset_split, revision=commit, streaming=True
    )
    for number, row in enumerate(rows):
        if settings.text_column not in row:
            raise UserError(
                f"corpus.text_column: '{settings.text_column}' is not a column of {settings.dataset}; "
                f"it has {', '.join(sorted(row))}"
            )
        text = row[settings.text_column]
        if text and text.strip():
            yield Document(name=f"{settings.dataset}/{settings.dataset_split}:{number}", text=text)


def corpus_identity(settings: CorpusSettings) -> dict[str, Any]:
    """What decides the documents, as plain JSON: content hashes for files, a commit for a Hub dataset.

    Raises a UserError when the corpus is not there.
    """
    if settings.source == "standard_library":
        files = [[name, file_sha256(path)] for name, path in standard_library_files()]
        return {"source": settings.source, "files": len(files), "content": digest(files)}
    if settings.source == "files":
        urls = _text_files(settings.paths)
        files = [[url, _file_fingerprint(url)] for url in urls]
        return {
            "source": settings.source,
            "files": len(files),
            "content": digest(files),
            "text_column": settings.text_column,
        }
    return {
        "source": settings.source,
        "dataset": settings.dataset,
        "subset": settings.subset,
        "dataset_split": settings.dataset_split,
        "commit": _huggingface_commit(settings),
        "text_column": settings.text_column,
    }


def _file_fingerprint(url: str) -> str:
    """The content's hash on this machine; the store's own key (ETag) elsewhere, which spares a download."""
    filesystem, path = resolve(url)
    return file_sha256(Path(path)) if is_local(url) else str(filesystem.ukey(path))


def pinned(settings: CorpusSettings) -> CorpusSettings:
    """The same corpus with its Hub revision resolved to a commit, so that no later step can see another one."""
    if settings.source != "huggingface":
        return settings
    return settings.model_copy(update={"revision": _huggingface_commit(settings)})


def _huggingface_commit(settings: CorpusSettings) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    if is_commit(settings.revision):
        return settings.revision
    try:
        return HfApi().dataset_info(settings.dataset, revision=settings.revision).sha
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise UserError(
            f"corpus.dataset: the Hub has no dataset '{settings.dataset}' at revision '{settings.revision}'"
        ) from error
    except Exception as error:  # every transport has its own exceptions, and all mean that the Hub is out of reach
        raise UserError(
            f"corpus.dataset: cannot reach the Hugging Face Hub for '{settings.dataset}' ({type(error).__name__}); "
            "use source 'files' or 'standard_library' where there is no network"
        ) from error


def read_documents(settings: CorpusSettings, seed: int) -> Iterator[Document]:
    """Every document once, in an order that depends on `seed` and the files' names alone.

    Files are read in a hashed order, so that a budget of tokens takes a sample of the corpus and not its first
    letters of the alphabet. A Hub dataset is read in its own order, since it is streamed.
    """
    if settings.source == "huggingface":
        yield from _read_huggingface(settings, _huggingface_commit(settings))
    elif settings.source == "files":
        urls = _text_files(settings.paths)
        yield from _read_files(settings, sorted(urls, key=lambda url: _hashed(seed, url)))
    else:
        documents = read_standard_library()
        yield from sorted(documents, key=lambda document: _hashed(seed, document.name))


def _hashed(seed: int, name: str) -> bytes:
    return blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
