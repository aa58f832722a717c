"""Explanations scored on text that they were not made from, in four ways.

Detection: which of the texts does the feature fire in. Fuzzing: the texts in which it fires, each once with its tokens marked
and once with as many others; which are marked rightly (Paulo et al. 2024, arXiv 2410.13928; balanced accuracy, 0.5 for chance).
Intruder: four texts in which it fires and one in which it does not, and no explanation; which does not belong (Paulo & Belrose
2025, arXiv 2507.08473; share found, 0.2 for chance): whether there is something to explain. Specificity: how well the
explanation fits each of the texts, over all strengths, from 0 to 3 (Templeton et al. 2024, "Specificity"; the mean).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from components.interpretation.explanations.asking import Charged, Message
from components.interpretation.explanations.cost import Answers
from components.interpretation.explanations.evidence import Evidence
from components.interpretation.explanations.prompts import (
    Excerpt,
    detect,
    fuzz,
    intruder,
    read_judgements,
    read_numbers,
    specificity,
)

_TRIES = 2
_LEAST_ANSWERED = 0.5


_FRIENDS = 4
_HIGHEST = 3
SCORES = ("detection", "fuzzing", "intruder", "specificity")


@dataclass(frozen=True)
class Question:
    text: str
    truth: bool
    """Whether the feature fires in the text, or where it is marked."""


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


def _trials(evidence: Evidence) -> list[list[Question]]:
    """Each with one text that does not belong, at a place that says nothing."""
    random, trials = np.random.default_rng(evidence.feature), []
    for number, stranger in enumerate(evidence.silent[: len(evidence.firing) // _FRIENDS]):
        friends = evidence.firing[_FRIENDS * number : _FRIENDS * (number + 1)]
        count = min(len(stranger.tokens), int(np.median([sum(one.firing) for one in friends])))
        marks = random.choice(len(stranger.tokens), size=count, replace=False)
        trial = [Question(one.marked(one.firing), True) for one in friends]
        wrong = Question(stranger.marked([place in marks for place in range(len(stranger.tokens))]), False)
        trial.insert(int(random.integers(_FRIENDS + 1)), wrong)
        trials.append(trial)
    return trials


Batches = dict[str, list[tuple[list[Message], list[Question]]]]


def batches(explanation: str, evidence: Evidence, at_once: int, scores: Sequence[str] = SCORES) -> Batches:
    """What is asked for each of the scores."""
    some = questions_of(evidence)
    some["specificity"] = [one for one in some["fuzzing"] if one.truth]
    parts = {name: [of[start : start + at_once] for start in range(0, len(of), at_once)] for name, of in some.items()}
    parts["intruder"] = _trials(evidence)
    asking: dict[str, Callable[[str, Sequence[str]], list[Message]]] = {
        "detection": detect, "fuzzing": fuzz, "intruder": intruder, "specificity": specificity,
    }  # fmt: skip
    return {
        name: [(asking[name](explanation, [one.text for one in part]), part) for part in parts[name]]
        for name in SCORES
        if name in scores
    }


def score(
    answers: Answers, explanation: str, evidence: Evidence, at_once: int, scores: Sequence[str] = SCORES
) -> dict[str, float | None]:
    """Each of SCORES; None for one that is not among `scores`, where the explainer gave no usable answer to half of the
    questions, or where there is nothing to ask."""
    found: dict[str, float | None] = dict.fromkeys(SCORES)
    for name, parts in batches(explanation, evidence, at_once, scores).items():
        if name in ("detection", "fuzzing"):
            judged = [
                (one.truth, said)
                for messages, part in parts
                for one, said in zip(part, _answered(answers, messages, part, read_judgements), strict=True)
            ]
            found[name] = balanced_accuracy(judged)
        elif name == "intruder":
            found[name] = _mean([_found_intruder(answers, *one) for one in parts])
        else:
            found[name] = _mean([said for one in parts for said in _answered(answers, *one, _read_grades)])
    return found


def _found_intruder(answers: Answers, messages: list[Message], trial: list[Question]) -> bool | None:
    def read(answer: str, _: int) -> list[int] | None:
        return read_numbers(answer, 1, range(1, len(trial) + 1))

    (said,) = _answered(answers, messages, trial[:1], read)
    return None if said is None else not trial[said - 1].truth


def _read_grades(answer: str, count: int) -> list[int] | None:
    return read_numbers(answer, count, range(_HIGHEST + 1))


T = TypeVar("T")


def _answered(
    answers: Answers, messages: list[Message], part: list[Question], read: Callable[[str, int], Sequence[T] | None]
) -> Sequence[T | None]:
    for attempt in range(_TRIES):
        try:
            said = read(answers.ask(messages, attempt), len(part))
        except Charged:
            continue
        if said is not None:
            return said
    return [None] * len(part)


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there and len(there) >= _LEAST_ANSWERED * len(values) else None


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
