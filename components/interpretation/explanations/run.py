"""Features explained and scored, several at a time, until they are done, the money is spent or nobody answers."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field

from components.interpretation.explanations.asking import Charged, Unavailable
from components.interpretation.explanations.cost import Answers, CapReached, Prices, most_tokens
from components.interpretation.explanations.evidence import Evidence
from components.interpretation.explanations.prompts import explain, read_explanation
from components.interpretation.explanations.scoring import batches, score
from components.interpretation.explanations.settings import ExplainerSettings
from components.interpretation.explanations.table import Explanation
from components.progress import progress

logger = logging.getLogger(__name__)
_TRIES = 2
_BYTES_PER_TOKEN = 3.5
_USUAL_EXPLANATION = "x" * 150


@dataclass
class Explained:
    found: list[Explanation] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)
    """Features without an explanation, and why."""
    stopped: str | None = None
    """Why not all were looked at."""


def estimated_cost(
    some: Sequence[Evidence], settings: ExplainerSettings, prices: Prices, answers: Answers
) -> tuple[float, float]:
    """Dollars, of what is not there yet: about, and at most if every question needs one answer."""
    about = worst = 0.0
    for evidence in some:
        first = explain(evidence.shown, evidence.largest)
        present = answers.known(first)
        said = None if present is None else read_explanation(present)
        asked = [] if present is not None else [first]
        scoring = batches(said or _USUAL_EXPLANATION, evidence, settings.scored_at_once, settings.scores).values()
        asked += [messages for parts in scoring for messages, _ in parts if said is None or answers.known(messages) is None]
        for messages in asked:
            about += prices.of(round(most_tokens(messages) / _BYTES_PER_TOKEN), settings.answer_tokens // 4)
            worst += prices.worst(messages, settings.answer_tokens)
    return about, worst


def explain_features(answers: Answers, some: Sequence[Evidence], settings: ExplainerSettings) -> Explained:
    result, stop = Explained(), threading.Event()

    def work(evidence: Evidence) -> Explanation | str | None:
        return None if stop.is_set() else _explained(answers, evidence, settings)

    pool = ThreadPoolExecutor(settings.concurrency, thread_name_prefix="explain")
    try:
        with progress(logger, "explain", len(some), "features") as advance:
            asked = {pool.submit(work, evidence): evidence.feature for evidence in some}
            for future in as_completed(asked):
                try:
                    found = future.result()
                except (CapReached, Unavailable) as error:
                    stop.set()
                    result.stopped = str(error) or "the cost cap is reached"
                    continue
                if isinstance(found, Explanation):
                    result.found.append(found)
                elif found is not None:
                    result.failed[asked[future]] = found
                advance(1, "")
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
    return result


def _explained(answers: Answers, evidence: Evidence, settings: ExplainerSettings) -> Explanation | str:
    """The explanation with its scores, or why there is none."""
    reason = "no example"
    messages = explain(evidence.shown, evidence.largest)
    for attempt in range(_TRIES if evidence.shown else 0):
        try:
            said = read_explanation(answers.ask(messages, attempt))
        except Charged as error:
            reason = str(error)
            continue
        if said is not None:
            scores = score(answers, said, evidence, settings.scored_at_once, settings.scores)
            return Explanation(
                feature=evidence.feature, explanation=said, explainer=answers.name, detection=scores["detection"],
                fuzzing=scores["fuzzing"], intruder=scores["intruder"], specificity=scores["specificity"],
            )  # fmt: skip
        reason = "an answer that is no explanation"
    return reason
