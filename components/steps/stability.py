"""Coder -> which of its features the champion has, too."""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from components.evaluation import stability
from components.settings import UserError

logger = logging.getLogger(__name__)


def stability_tags(open_run: Any, name: str, folder: Path) -> dict[str, str]:
    """A version's tag with `compare_with_champion`, on its way into the registered model of that name."""
    from components.registry.versions import STABILITY_TAG

    found = compare_with_champion(open_run, name, folder)
    return {} if found is None else {STABILITY_TAG: json.dumps(found)}


def compare_with_champion(open_run: Any, name: str, folder: Path) -> dict[str, Any] | None:
    """Counts and shares of the features that persisted (see `stability.compare`), and `champion`, the version that they are
    compared with; in the MLflow run as metrics `stability/...` and the artifacts `stability/stability.json` and `.parquet`.

    folder: with the files of the coder. None where there is no champion, or none whose features can be compared. A report: it
    fails no registration.
    """
    from components.registry import versions as registry
    from components.registry.download import version_files

    champion = registry.champion_of(open_run.client, name)
    if champion is None:
        return None
    with tempfile.TemporaryDirectory(prefix="sae-champion-") as scratch:
        try:
            version_files(open_run.client, champion, stability.FILES, Path(scratch))
        except UserError as error:
            logger.warning("register: features are not compared with the champion's: %s", error)
            return None
        earlier = stability.Dictionary.read(Path(scratch))
    later = stability.Dictionary.read(folder)
    if later.rows.shape[1] != earlier.rows.shape[1]:
        widths = f"{later.rows.shape[1]} dimensions and {earlier.rows.shape[1]}"
        logger.info("register: features are not compared with the champion's: they write %s", widths)
        return None
    found, table = stability.compare(later, earlier)
    found = {"champion": str(champion.version), **found}
    open_run.log_evaluation({name: value for name, value in found.items() if name != "champion"}, group="stability")
    with tempfile.TemporaryDirectory(prefix="sae-stability-") as scratch:
        pq.write_table(table, Path(scratch) / "stability.parquet", compression="zstd")
        (Path(scratch) / "stability.json").write_text(json.dumps(found, indent=2) + "\n")
        open_run.log_artifact_folder(Path(scratch), "stability")
    return found
