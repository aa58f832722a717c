"""The files of a registered model and their checksums: who holds the version's tag can tell whether a store, or anybody who can
write to it, has changed one, code included. Nothing that comes from a store is run here."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import mlflow
from mlflow import MlflowClient

from components.storage import file_sha256

LIST_NAME = "MODEL_FILES.json"
"""In the model's folder: path of every other file -> SHA-256."""
FILES_TAG = "sae.files_sha256"
"""Of the logged model and of the version: SHA-256 of `MODEL_FILES.json`."""
_ADDED_BY_MLFLOW = {"registered_model_meta"}  # to what it downloads


def list_files(folder: Path) -> str:
    """Write `MODEL_FILES.json` into a model's folder; its SHA-256."""
    (folder / LIST_NAME).write_text(json.dumps(_checksums(folder), indent=1, sort_keys=True) + "\n")
    return file_sha256(folder / LIST_NAME)


def stored_difference(client: MlflowClient, uri: str, files_sha256: str) -> str | None:
    """What is wrong with the files that the store holds of a model, None where all are those that were sent.

    Downloads them once, and holds nothing of them in memory. uri: `models:/...`.
    """
    with tempfile.TemporaryDirectory(prefix="sae-verify-") as scratch:
        uris = {"tracking_uri": client.tracking_uri, "registry_uri": client._registry_uri}
        folder = Path(mlflow.artifacts.download_artifacts(uri, dst_path=scratch, **uris))
        return difference(folder, files_sha256)


def difference(folder: Path, files_sha256: str) -> str | None:
    """The same of a folder on this machine: the first file that is missing, changed or not one of the model's."""
    listed = folder / LIST_NAME
    if not listed.is_file() or file_sha256(listed) != files_sha256:
        return f"{LIST_NAME} is {'changed' if listed.is_file() else 'missing'}"
    wanted, found = json.loads(listed.read_text()), _checksums(folder)
    for path in sorted({*wanted, *found}):
        if wanted.get(path) != found.get(path):
            return f"{path} is {'missing' if path not in found else 'changed' if path in wanted else 'not one of its files'}"
    return None


def _checksums(folder: Path) -> dict[str, str]:
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: file_sha256(path) for name, path in files.items() if name not in {LIST_NAME, *_ADDED_BY_MLFLOW}}
