"""What is known of a coder's features -> the registry, for gates that ask for it, and pictures."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pyarrow.parquet as pq

from components import storage
from components.interpretation.explanations.table import interpretable_share, read_explanations
from components.interpretation.record import interpretation_url
from components.run.specification import Specification

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GROUP = "interpretation"
"""Of the metrics in MLflow."""

logger = logging.getLogger(__name__)


def explanation_metrics(run: Specification) -> dict[str, float]:
    """Of the explanations beside the trained coder, see `interpretable_share`; empty where none is scored."""
    record = run.training_record()
    return {} if record is None else interpretable_share(read_explanations(run.sae_url, record.weights_sha256).values())


def record_explanations(run: Specification) -> None:
    """Tell the registered version of this run, if there is one, what its explanations came to: gates ask the version. The
    explanations are kept already; that a server cannot be told is a warning."""
    record, metrics = run.training_record(), explanation_metrics(run)
    from mlflow.exceptions import MlflowException

    from components.registry import versions as registry
    from components.tracking import store

    settings = run.config.tracking
    if record is None or not metrics or not store.database_exists(settings, run.config.storage.root):
        return
    try:
        client = store.connect(settings, run.config.storage.root)
        version = registry.find_version(client, run.registered_model, run.run_digest, record.weights_sha256)
        if version is not None:
            for name, value in metrics.items():
                client.set_model_version_tag(version.name, version.version, f"{registry.METRIC_PREFIX}{name}", repr(value))
                client.log_metric(version.run_id, f"{GROUP}/{name}", value)
    except MlflowException as error:
        logger.warning("explain: MLflow was not told of the scores (%s); run the same again", type(error).__name__)


def feature_map(run: Specification) -> Figure | None:
    """The map of the features that fire; None where there is no feature data, or no map in it."""
    from components.evaluation import charts

    record = run.interpretation_record()
    if record is None:
        return None
    with storage.local_copies(interpretation_url(run.sae_url), ("features.parquet",)) as folder:
        table = pq.read_table(folder / "features.parquet")
    if not {"map_x", "map_y"} <= set(table.column_names):
        return None
    x, y, fired = (table[name].to_numpy() for name in ("map_x", "map_y", "fired"))
    return charts.feature_map(x, y, fired / max(record.tokens, 1))
