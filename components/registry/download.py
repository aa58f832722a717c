"""The SAE behind a `models:/` address, as a local folder."""

from __future__ import annotations

from pathlib import Path

import mlflow
from mlflow.exceptions import MlflowException

from components.settings import UserError
from components.tracking.settings import TrackingSettings
from components.tracking.store import connect


def registered_sae(settings: TrackingSettings, root: str, uri: str, folder: Path) -> Path:
    """Download `models:/<name>/<version>` or `models:/<name>@<alias>` into `folder`; the folder that holds `cfg.json`."""
    connect(settings, root)
    try:
        local = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(folder)))
    except (MlflowException, OSError) as error:
        raise UserError(f"--sae: '{uri}' is not in the model registry: {str(error).splitlines()[0]}") from error
    found = sorted(local.rglob("cfg.json"))
    if not found:
        raise UserError(f"--sae: '{uri}' holds no cfg.json; an SAE that `sae register` put there is accepted")
    return found[0].parent
