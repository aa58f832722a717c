"""Documents from Hugging Face datasets: streamed from the Hub at a pinned commit, or from local files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from components.corpus.documents import Document, Render, document_from_row
from components.corpus.files import damage_explained, kind_of, read_rows
from components.corpus.listing import ListedFile, find_files, linked_folder
from components.corpus.settings import SourceSettings
from components.settings import UserError, is_commit

_BUILDERS = {
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".arrow": "arrow",
}


def is_local_dataset(source: SourceSettings) -> bool:
    return os.path.exists(os.path.expanduser(source.dataset))


def list_local(source: SourceSettings, where: str) -> tuple[ListedFile, ...]:
    """All files of a local dataset; a UserError for what `datasets` would pass over."""
    path = Path(source.dataset).expanduser()
    link = linked_folder(path)
    if link is not None:
        raise UserError(
            f"{where}.dataset: '{link}' is a link to a folder, which `datasets` passes over; copy the folder, or name it itself"
        )
    return tuple(find_files((str(path),), f"{where}.dataset"))


def read_huggingface(
    source: SourceSettings, where: str, render: Render | None, files: Sequence[ListedFile]
) -> Iterator[Document]:
    """Rows in the dataset's own order, since it is streamed.

    files: of a local dataset, as they were listed. `datasets` looks into the folder itself, so what it holds is compared with
    them afterwards: a UserError where it is no longer the same.
    """
    local = is_local_dataset(source)
    rows = _local_rows(source, where, files) if local else _hub_rows(source, where)
    title = Path(source.dataset).name if local else source.dataset
    for number, row in enumerate(rows):
        document = document_from_row(row, f"{title}/{source.dataset_split}:{number}", source, where, render)
        if document is not None:
            yield document
    if local and tuple(files) != list_local(source, where):
        raise UserError(f"{where}.dataset: the files of '{source.dataset}' changed after this run began; run again")


def huggingface_commit(source: SourceSettings, where: str) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    if is_commit(source.revision):
        return source.revision
    try:
        return str(HfApi().dataset_info(source.dataset, revision=source.revision).sha)
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise UserError(
            f"{where}.dataset: the Hub has no dataset '{source.dataset}' at revision '{source.revision}', and there is no "
            "such local file or folder"
        ) from error
    except Exception as error:  # every transport has its own exceptions, and all mean that the Hub is out of reach
        raise UserError(
            f"{where}.dataset: cannot reach the Hugging Face Hub for '{source.dataset}' ({type(error).__name__}); use a local "
            "dataset, source 'files' or 'standard_library' where there is no network"
        ) from error


def _hub_rows(source: SourceSettings, where: str) -> Any:
    import datasets

    commit = huggingface_commit(source, where)
    try:
        return datasets.load_dataset(source.dataset, source.subset, split=source.dataset_split, revision=commit, streaming=True)
    except ValueError as error:  # a subset, a split or a format that is not there; the message lists what is
        reason = " ".join(str(error).split())
        raise UserError(
            f"{where}.dataset: '{source.dataset}' has no split '{source.dataset_split}' of subset '{source.subset}': {reason}"
        ) from error


def _local_rows(source: SourceSettings, where: str, files: Sequence[ListedFile]) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        yield from _open_local(source, where, files)
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, OSError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{where}.dataset: '{source.dataset}' cannot be read as split '{source.dataset_split}' of a dataset: {reason}"
        ) from error


def _open_local(source: SourceSettings, where: str, files: Sequence[ListedFile]) -> Iterable[dict[str, Any]]:
    import datasets

    path = Path(source.dataset).expanduser()
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        loaded = datasets.load_from_disk(str(path))
        if not isinstance(loaded, datasets.DatasetDict):
            return loaded  # saved alone: it is the split, whatever its name
        if source.dataset_split not in loaded:
            raise ValueError(f"it has the splits {', '.join(loaded)}")
        return loaded[source.dataset_split]
    if path.is_dir():
        made = datasets.load_dataset_builder(str(path), source.subset)
        found = {str(split): [str(file) for file in chosen] for split, chosen in (made.config.data_files or {}).items()}
        if source.dataset_split not in found:
            raise ValueError(f"it has the splits {', '.join(found)}")
        kind, chosen = str(made.info.builder_name), found[source.dataset_split]
        if kind in ("parquet", "json") and getattr(made.config, "field", None) is None:
            return _rows_of_files(chosen, kind, source, where, files)
        if kind in ("csv", "arrow") and source.subset is None and len(chosen) > 1:
            options = {"sep": made.config.sep} if kind == "csv" else {}
            return chain.from_iterable(_streamed(kind, file, **options) for file in chosen)
        return datasets.load_dataset(str(path), source.subset, split=source.dataset_split, streaming=True)
    suffix = path.suffix.lower()
    builder = _BUILDERS.get(suffix)
    if builder is None:
        raise ValueError(f"a single file ends in one of {', '.join(_BUILDERS)}")
    if source.dataset_split != "train":
        raise ValueError("it has the split train")
    if builder in ("parquet", "json"):
        return _rows_of_files([str(path)], builder, source, where, files)
    return _streamed(builder, str(path), **({"sep": "\t"} if suffix == ".tsv" else {}))


def _rows_of_files(
    paths: Sequence[str], kind: str, source: SourceSettings, where: str, files: Sequence[ListedFile]
) -> Iterator[dict[str, Any]]:
    """Read here and not by `datasets`, which wants every column of every file to be of one type: only one is asked for."""
    listed = {Path(file.path).absolute(): file for file in files}
    for path in paths:
        file = listed.get(Path(path).absolute())
        if file is None:
            raise UserError(
                f"{where}.dataset: '{source.dataset}' is also made of '{path}', which is not in it; name its folder"
            )
        file.require_unchanged(f"{where}.dataset")
        with damage_explained(file, f"{where}.dataset"):
            rows = read_rows(file, kind if kind == "parquet" else kind_of(file.name), source, where)
            if rows is None:
                raise UserError(f"{where}.dataset: '{path}' holds no table with the column that is wanted")
            for _, row in rows:
                yield row


def _streamed(builder: str, path: str, **options: Any) -> Iterable[dict[str, Any]]:
    """One file alone, so that no other one decides the types of its columns."""
    import datasets

    return datasets.load_dataset(builder, data_files=path, split="train", streaming=True, **options)
