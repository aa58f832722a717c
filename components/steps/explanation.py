"""Coder with feature data -> what its features stand for, in words, with scores."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import pyarrow.parquet as pq
import torch

from components import storage
from components.interpretation.described import Words
from components.interpretation.examples import lots
from components.interpretation.explanations.asking import Explainer
from components.interpretation.explanations.cost import Answers, Budget, Prices
from components.interpretation.explanations.evidence import gather
from components.interpretation.explanations.run import estimated_cost, explain_features
from components.interpretation.explanations.settings import ExplainerSettings
from components.interpretation.explanations.table import read_explanations, write_explanations
from components.interpretation.record import interpretation_url
from components.run.checks import require_text
from components.run.specification import Specification
from components.settings import UserError
from components.steps.interpretable import record_explanations
from components.steps.interpretation import decode_of, held_out_pass, refresh_browser
from components.steps.reference import held_out_of

_FEATURES_AT_ONCE = 500

logger = logging.getLogger(__name__)


def explain(
    run: Specification, count: int, chosen: Sequence[int], max_cost: float | None, estimate_only: bool
) -> dict[str, Any]:
    """Explain the `chosen` features, or until `count` drawn at random of those that fire have an explanation of their own; what
    was asked before costs nothing. Writes table and browser, also where it is stopped."""
    require_text(run, "explanations are of")
    settings = run.config.interpretation.explainer
    trained, manifest, present = run.training_record(), run.token_manifest(), run.interpretation_record()
    if trained is None or manifest is None or present is None:
        raise UserError(f"sae: there is no feature data beside {run.sae_url} yet; run `sae features make`")
    prices = _prices(settings)
    held_out = held_out_pass(run, held_out_of(run, manifest))
    for feature in chosen:
        if not 0 <= feature < held_out.d_sae:
            raise UserError(f"--feature: {feature} is not accepted: there are 0 to {held_out.d_sae - 1}")
    budget = Budget(settings.max_cost if max_cost is None else max_cost)
    table = read_explanations(run.sae_url, trained.weights_sha256)
    wanted = chosen or _drawn(run)[:count]
    missing = [one for one in wanted if one not in table or table[one].carried_from is not None]
    if not missing:
        record_explanations(run)
        return _outcome(run, 0, len(table), {}, None, budget, 0, (0.0, 0.0))
    explainer = _explainer(settings, run.device)
    try:
        kept = storage.join(interpretation_url(run.sae_url), "answers")
        answers = Answers(explainer, kept, prices, budget, settings.answer_tokens)
        words, evidence = Words(decode_of(run)), []
        for start in range(0, len(missing), _FEATURES_AT_ONCE):
            part = missing[start : start + _FEATURES_AT_ONCE]
            evidence += gather(held_out, part, settings.shown, settings.scored, words)
        expected = estimated_cost(evidence, settings, prices, answers)
        logger.info("explain: %d features, about $%.4f, at most $%.4f; cap $%.4f", len(evidence), *expected, budget.cap)
        if estimate_only:
            return _outcome(run, 0, len(table), {}, None, budget, 0, expected)
        done = explain_features(answers, evidence, settings)
    finally:
        explainer.close()
    table |= {one.feature: one for one in done.found}
    if done.found:
        write_explanations(run.sae_url, trained.weights_sha256, table.values())
        refresh_browser(run)
        record_explanations(run)
    return _outcome(run, len(done.found), len(table), done.failed, done.stopped, budget, answers.asked, expected)


def search_explanations(run: Specification, words: str, limit: int) -> list[dict[str, Any]]:
    """Explained features whose explanation holds all words (any case), those of the best scores first."""
    trained = run.training_record()
    table = {} if trained is None else read_explanations(run.sae_url, trained.weights_sha256)
    if not table:
        raise UserError(f"sae: there are no explanations beside {run.sae_url} yet; run `sae features explain`")
    wanted = words.lower().split()
    found = [one for one in table.values() if all(word in one.explanation.lower() for word in wanted)]
    found.sort(key=lambda one: (-(one.detection or 0.0) - (one.fuzzing or 0.0), one.feature))
    return [one.model_dump(mode="json") for one in found[:limit]]


def _outcome(
    run: Specification,
    explained: int,
    total: int,
    failed: dict[int, str],
    stopped: str | None,
    budget: Budget,
    asked: int,
    expected: tuple[float, float],
) -> dict[str, Any]:
    return {
        "explained": explained,
        "total": total,
        "failed": {str(feature): reason for feature, reason in sorted(failed.items())},
        "stopped": stopped,
        "requests": asked,
        "estimate": round(expected[0], 6),
        "estimate_at_most": round(expected[1], 6),
        "cap": budget.cap,
        "spent": round(budget.spent, 6),
        "explanations": storage.join(interpretation_url(run.sae_url), "explanations.parquet"),
    }


def _drawn(run: Specification) -> list[int]:
    """Those that fire, in an order that is random and the same every time."""
    with storage.local_copies(interpretation_url(run.sae_url), ("features.parquet",)) as folder:
        fired = pq.read_table(folder / "features.parquet", columns=["fired"])["fired"].to_numpy()
    nothing = torch.zeros(len(fired), dtype=torch.int64)
    order = lots(nothing - 1, nothing, torch.arange(len(fired))).argsort().tolist()
    return [feature for feature in order if fired[feature] > 0]


def _prices(settings: ExplainerSettings) -> Prices:
    if settings.model is None:
        raise UserError(
            "interpretation.explainer.model: not given; name a model and, unless it is to run here, "
            "interpretation.explainer.endpoint"
        )
    if settings.endpoint is None:
        return Prices(0.0, 0.0)
    if settings.input_price is None or settings.output_price is None:
        raise UserError(
            "interpretation.explainer.input_price and output_price: not given; dollars per million tokens are, 0 for a server "
            "of your own"
        )
    return Prices(settings.input_price, settings.output_price)


def _explainer(settings: ExplainerSettings, device: torch.device) -> Explainer:
    assert settings.model is not None
    if settings.endpoint is None:
        from components.interpretation.explanations.local import LocalExplainer

        return LocalExplainer(settings.model, device)
    from components.interpretation.explanations.endpoint import Endpoint

    key = os.environ.get(settings.key_variable) or None
    return Endpoint(settings.endpoint, settings.model, key, settings.timeout_seconds, settings.attempts)
