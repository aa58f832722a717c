"""The safety report: for each set of prompts the features that separate it from its contrast, with evidence and caveats.

`safety.json` and `safety.html` beside the coder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, Literal

import numpy as np
from jinja2 import Environment, StrictUndefined

from components import storage
from components.interpretation.contrast import Found, Rate, check, holm, rate
from components.interpretation.prompt_sets import PromptSet
from components.records import put_record, read_record
from components.settings import Record

REPORT, PAGE = "safety.json", "safety.html"
_RELABELLED = 20
_SIGNIFICANT = 0.05
_HARMLESS_AT_MOST = 0.05
CAVEATS = (
    "A candidate is a lead and no proof: it separates these prompts from those. It may stand for a word, a tone or a topic in "
    "which the two differ and not for what the set is named after; look at its examples before you believe its name.",
    "That a feature fires does not mean that the model does what the text says, or would: reading about a lie is not lying. "
    "What a feature does is seen by steering it.",
    "No finding is no clearance: the feature may be in the model and not in this SAE, split over several, or at another layer, "
    "or need other prompts. The sets are short, in English and written by hand.",
    "Half of the pairs chose the features and the other half measured them; p is corrected (Holm) for all features that "
    "were measured in this report. The intervals are of few texts, and those of both texts of a pair resemble each other.",
)


class Place(Record):
    """Where a feature is strongest in a held-out text."""

    text: str
    token: str
    activation: float


class Candidate(Found):
    p_corrected: float
    harmless: Rate
    """Share of the harmless texts above the threshold."""
    corpus: Rate
    """Share of passages of the held-out corpus, of about a prompt's length, above it."""
    verdict: Literal["candidate", "unspecific", "not confirmed"]
    """`unspecific`: it separates, and over 5% of harmless texts or passages are above its threshold, too."""
    fires_on: tuple[Place, ...]
    likely: tuple[str, ...]
    """Tokens that it makes likely by itself."""
    explanation: str | None


class SetResult(Record):
    name: str
    about: str
    chosen_on: int
    """Pairs, as is the next."""
    measured_on: int
    candidates: tuple[Candidate, ...]
    by_chance: Rate
    """Share of runs with the sides of the pairs swapped at random in which a feature would have been confirmed."""


class SafetyReport(Record):
    digest: str
    """Of the weights, the model, the corpus and every text in it."""
    about: str
    features: int
    harmless_texts: int
    corpus_passages: int
    passage_tokens: int
    sets: tuple[SetResult, ...]
    caveats: tuple[str, ...] = CAVEATS


def sides(prompts: PromptSet) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Its texts, both of a pair one after the other; whether each has what is looked for; whether it chooses features."""
    texts = [text for pair in prompts.pairs for text in (pair.text, pair.against)]
    numbers = np.arange(len(texts))
    return texts, numbers % 2 == 0, numbers // 2 % 2 == 0


def chosen(prompts: PromptSet, values: np.ndarray, count: int) -> list[Found]:
    """values `[2 pairs, d_sae]`: the largest activation of each feature in each text of `sides`."""
    _, positive, chosen_on = sides(prompts)
    return check(values, positive, chosen_on, count)


def found_by_chance(prompts: PromptSet, values: np.ndarray, count: int, tests: int) -> Rate:
    """How often `chosen` confirms a feature when pairs are turned round at random. tests: for which p is corrected."""
    _, positive, chosen_on = sides(prompts)
    random = np.random.default_rng(0)
    hits = []
    for _ in range(_RELABELLED):
        turned = np.repeat(random.random(len(prompts.pairs)) < 0.5, 2)
        found = check(values, positive ^ turned, chosen_on, count)
        hits.append(any(one.held_out.p * max(tests, len(found)) < _SIGNIFICANT for one in found))
    return rate(np.array(hits))


def verdict(p_corrected: float, harmless: Rate, corpus: Rate) -> Literal["candidate", "unspecific", "not confirmed"]:
    if p_corrected >= _SIGNIFICANT:
        return "not confirmed"
    return "unspecific" if max(harmless.share, corpus.share) > _HARMLESS_AT_MOST else "candidate"


def corrected(found: Mapping[str, Sequence[Found]]) -> dict[str, list[float]]:
    """By set, of each feature: p corrected for all that are here."""
    flat = iter(holm([one.held_out.p for some in found.values() for one in some]))
    return {name: [next(flat) for _ in some] for name, some in found.items()}


def said(result: SetResult) -> str:
    """What came of a set, in one sentence."""
    kinds = [one.verdict for one in result.candidates]
    count = kinds.count("candidate")
    if count:
        return f"{count} candidate{'s' if count > 1 else ''}"
    if "unspecific" in kinds:
        return "no candidate: what separates the prompts fires on harmless text, too"
    return "no candidate was found: nothing held up on prompts that did not choose it"


def read_safety(sae_url: str, digest: str) -> SafetyReport | None:
    """None unless it is the one of that digest."""
    report = read_record(SafetyReport, storage.join(sae_url, REPORT), "delete it to make it anew")
    return report if report is not None and report.digest == digest else None


def write_safety(sae_url: str, report: SafetyReport) -> None:
    storage.put_bytes(render(report).encode("utf-8", errors="replace"), storage.join(sae_url, PAGE))
    put_record(report, storage.join(sae_url, REPORT))


def render(report: SafetyReport) -> str:
    source = resources.files("components.interpretation").joinpath("safety.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"share": share, "shown": shown}
    return environment.from_string(source).render(report=report, said=said)


def share(value: Rate) -> str:
    return f"{value.share:.0%} ({value.count} of {value.of})"


def shown(text: Any) -> str:
    """In one line, with what turns or hides text made visible."""
    return "".join(one if one.isprintable() else {"\n": "⏎", "\t": "⇥"}.get(one, "�") for one in str(text))
