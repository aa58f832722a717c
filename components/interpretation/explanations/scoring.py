"""Explanations scored by detection and by fuzzing (Paulo et al. 2024, arXiv 2410.13928): balanced accuracy, 0.5 for chance.

Detection: which of the texts does the feature fire in. Fuzzing: the texts in which it fires, each once with its tokens marked
and once with as many others; which are marked rightly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from components.interpretation.explanations.asking import Charged, Message
from components.interpretation.explanations.cost import Answers
from components.interpretation.explanations.evidence import Evidence
from components.interpretation.explanations.prompts import Excerpt, detect, fuzz, read_judgements

_TRIES = 2
_LEAST_ANSWERED = 0.5


@dataclass(frozen=True)
class Question:
    text: str
    truth: bool


def questions_of(evidence: Evidence) -> dict[str, list[Question]]:
    """By way of scoring, in an order that says nothing of the truth but is the same every time."""
    random = np.random.default_rng(evidence.feature)
    told = [Question(one.plain, True) for one in evidence.firing] + [Question(one.plain, False) for one in evidence.silent]
    marked = [Question(one.marked(one.firing), True) for one in evidence.firing]
    for one in evidence.firing:
        wrong = _elsewhere(one, random)
        if wrong is not None:
            marked.append(Question(one.marked(wrong), False))
    return {
        name: [some[place] for place in random.permutation(len(some))]
        for name, some in (("detection", told), ("fuzzing", marked))
    }


def _elsewhere(excerpt: Excerpt, random: np.random.Generator) -> list[bool] | None:
    """As many tokens on which it does not fire; None where it fires on all."""
    firing = np.array(excerpt.firing)
    free = np.flatnonzero(~firing)
    if len(free) == 0:
        return None
    chosen = random.choice(free, size=min(len(free), int(firing.sum())), replace=False)
    return [place in chosen for place in range(len(firing))]


def batches(explanation: str, evidence: Evidence, at_once: int) -> dict[str, list[tuple[list[Message], list[Question]]]]:
    asking: dict[str, Callable[[str, Sequence[str]], list[Message]]] = {"detection": detect, "fuzzing": fuzz}
    found = {}
    for name, some in questions_of(evidence).items():
        parts = [some[start : start + at_once] for start in range(0, len(some), at_once)]
        found[name] = [(asking[name](explanation, [one.text for one in part]), part) for part in parts]
    return found


def score(answers: Answers, explanation: str, evidence: Evidence, at_once: int) -> dict[str, float | None]:
    """`detection` and `fuzzing`; None where an explainer gave no usable answer to half of the questions, or both kinds are not
    there."""
    found = {}
    for name, parts in batches(explanation, evidence, at_once).items():
        judged = [
            (one.truth, said)
            for messages, part in parts
            for one, said in zip(part, _judged(answers, messages, part), strict=True)
        ]
        found[name] = balanced_accuracy(judged)
    return found


def _judged(answers: Answers, messages: list[Message], part: list[Question]) -> Sequence[bool | None]:
    for attempt in range(_TRIES):
        try:
            said = read_judgements(answers.ask(messages, attempt), len(part))
        except Charged:
            continue
        if said is not None:
            return said
    return [None] * len(part)


def balanced_accuracy(judged: Sequence[tuple[bool, bool | None]]) -> float | None:
    """The mean of the shares that are right among what is true and among what is not; of (truth, said)."""
    answered = [(truth, said) for truth, said in judged if said is not None]
    if not judged or len(answered) < _LEAST_ANSWERED * len(judged):
        return None
    shares = []
    for kind in (True, False):
        right = [said == truth for truth, said in answered if truth is kind]
        if not right:
            return None
        shares.append(sum(right) / len(right))
    return sum(shares) / 2
