"""The SAE behind a `models:/` address, as a local folder."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from components.registry.versions import champion_of, stored_file
from components.settings import UserError
from components.tracking.settings import TrackingSettings
from components.tracking.store import connect, database_exists


def registered_sae(settings: TrackingSettings, root: str, uri: str, folder: Path, field: str = "--sae") -> Path:
    """Download `models:/<name>/<version>` or `models:/<name>@<alias>` into `folder`; the folder that holds `cfg.json`.

    field: of the configuration or the command, which a UserError names.
    """
    connect(settings, root)
    try:
        local = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(folder)))
    except (MlflowException, OSError) as error:
        raise UserError(f"{field}: '{uri}' is not in the model registry: {str(error).splitlines()[0]}") from error
    found = sorted(local.rglob("cfg.json"))
    if not found:
        raise UserError(f"{field}: '{uri}' holds no cfg.json; an SAE that `sae register` put there is accepted")
    return found[0].parent


def version_files(client: MlflowClient, version: ModelVersion, names: Sequence[str], folder: Path) -> None:
    """Download single files of a version's SAE into `folder`; a UserError where one cannot be had."""
    for name in names:
        try:
            with TemporaryDirectory(prefix="sae-file-") as scratch:  # MLflow adds folders of its own
                shutil.move(stored_file(client, version, name, Path(scratch)), folder / name)
        except (MlflowException, OSError, UserError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{name} of version {version.version} of {version.name} cannot be read: {reason}") from error


def champion_files(settings: TrackingSettings, root: str, name: str, names: Sequence[str], folder: Path) -> ModelVersion | None:
    """The champion of a registered model, with these of its files in `folder`; None where there is none. A UserError where the
    registry or a file cannot be read."""
    if not database_exists(settings, root):
        return None
    try:
        client = connect(settings, root)
        champion = champion_of(client, name)
    except MlflowException as error:
        raise UserError(f"the champion of {name} cannot be asked for: {str(error).splitlines()[0]}") from error
    if champion is not None:
        version_files(client, champion, names, folder)
    return champion
