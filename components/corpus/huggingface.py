"""Documents from Hugging Face datasets: streamed from the Hub at a pinned commit, or from local files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from components.corpus.documents import Document, Render, document_from_row
from components.corpus.files import ListedFile, find_files
from components.corpus.settings import SourceSettings
from components.settings import UserError, is_commit

_BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".arrow": "arrow"}


def is_local_dataset(source: SourceSettings) -> bool:
    return Path(source.dataset).expanduser().exists()


def read_huggingface(
    source: SourceSettings, where: str, render: Render | None, files: Sequence[ListedFile]
) -> Iterator[Document]:
    """Rows in the dataset's own order, since it is streamed.

    files: of a local dataset, as they were listed. `datasets` looks into the folder itself, so what it holds is compared with
    them afterwards: a UserError where it is no longer the same.
    """
    rows = _local_rows(source, where) if is_local_dataset(source) else _hub_rows(source, where)
    title = Path(source.dataset).name if is_local_dataset(source) else source.dataset
    for number, row in enumerate(rows):
        document = document_from_row(row, f"{title}/{source.dataset_split}:{number}", source, where, render)
        if document is not None:
            yield document
    if is_local_dataset(source) and list(files) != find_files((source.dataset,), f"{where}.dataset"):
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


def _local_rows(source: SourceSettings, where: str) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        yield from _open_local(source)
    except (ValueError, OSError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{where}.dataset: '{source.dataset}' cannot be read as split '{source.dataset_split}' of a dataset: {reason}"
        ) from error


def _open_local(source: SourceSettings) -> Any:
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
        return datasets.load_dataset(str(path), source.subset, split=source.dataset_split, streaming=True)
    builder = _BUILDERS.get(path.suffix)
    if builder is None:
        raise ValueError(f"a single file ends in one of {', '.join(_BUILDERS)}")
    options = {"sep": "\t"} if path.suffix == ".tsv" else {}
    return datasets.load_dataset(builder, data_files=str(path), split=source.dataset_split, streaming=True, **options)
