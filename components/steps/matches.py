"""Coder -> which of its features the champion has, for the browser and for explanations that carry over."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from components import storage
from components.evaluation import stability
from components.interpretation.explanations.table import carried, read_explanations, write_explanations
from components.interpretation.matches import MatchesRecord, matched_features, read_matches, write_matches
from components.run.specification import Specification
from components.settings import UserError
from components.training.job import read_training_record

logger = logging.getLogger(__name__)
_DIGEST_TAG = "sae.digest"


def match_with_champion(run: Specification, weights_sha256: str) -> MatchesRecord | None:
    """Beside the feature data: the coder's features compared with those of today's champion. None where there is none, or none
    that can be compared; where the coder is the champion itself, what was found before. It fails no run."""
    from components.registry.download import champion_files

    with tempfile.TemporaryDirectory(prefix="sae-champion-") as scratch:
        try:
            tracking, root = run.config.tracking, run.config.storage.root
            champion = champion_files(tracking, root, run.registered_model, stability.FILES, Path(scratch))
        except UserError as error:
            logger.warning("interpret: features are not compared with the champion's: %s", error)
            return None
        if champion is None or champion.tags.get(_DIGEST_TAG) == run.sae_digest:
            return read_matches(run.sae_url, weights_sha256)
        earlier = stability.Dictionary.read(Path(scratch))
    with storage.local_copies(run.sae_url, stability.FILES) as folder:
        later = stability.Dictionary.read(folder)
    if later.rows.shape[1] != earlier.rows.shape[1]:
        return None
    counts, table = stability.compare(later, earlier)
    record = MatchesRecord(
        weights_sha256=weights_sha256,
        registered_model=run.registered_model,
        version=str(champion.version),
        sae_digest=champion.tags.get(_DIGEST_TAG),
        folder=_folder(run, champion.tags.get(_DIGEST_TAG)),
        counts=counts,
    )
    write_matches(run.sae_url, record, table)
    return record


def carry_over(run: Specification, weights_sha256: str, matches: MatchesRecord | None) -> None:
    """What was said of the champion's features, to those of this coder that they persist in; where its folder is still under
    the same root."""
    if matches is None or matches.folder is None:
        return
    earlier_url = storage.join(run.config.storage.root, "saes", matches.folder)
    record = read_training_record(earlier_url)
    earlier = {} if record is None else read_explanations(earlier_url, record.weights_sha256)
    if earlier:
        own = read_explanations(run.sae_url, weights_sha256)
        found = carried(own, earlier, matched_features(run.sae_url), f"version {matches.version}")
        write_explanations(run.sae_url, weights_sha256, found.values())


def _folder(run: Specification, sae_digest: str | None) -> str | None:
    """Of that coder, beside this one's."""
    names = () if sae_digest is None else storage.list_folders(storage.join(run.config.storage.root, "saes"))
    return next((name for name in names if name.endswith(f"-{sae_digest}")), None)
