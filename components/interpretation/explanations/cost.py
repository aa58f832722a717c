"""What is asked costs money: a cap that is never exceeded, and answers on disk, so that nothing is paid for twice."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from components import storage
from components.interpretation.explanations.asking import Answer, Charged, Explainer, Message, Unavailable

_TOKENS_BESIDE = 64
"""More than chat templates put around a message, per message."""
_FAILURES = 5
"""In a row, after which nothing more is asked: each may have been charged for."""
_MILLION = 1_000_000


class CapReached(Exception):
    """The next request could cost more than is left."""


@dataclass(frozen=True)
class Prices:
    """Dollars per million tokens."""

    read: float
    written: float

    def of(self, read: int, written: int) -> float:
        return (read * self.read + written * self.written) / _MILLION

    def worst(self, messages: Sequence[Message], answer_tokens: int) -> float:
        """Of a request before it is sent: no tokenizer makes more tokens than there are bytes."""
        return self.of(most_tokens(messages), answer_tokens)


def most_tokens(messages: Sequence[Message]) -> int:
    return sum(len(message["content"].encode("utf-8", errors="replace")) + _TOKENS_BESIDE for message in messages)


class Budget:
    """Dollars that are left. A request reserves the most that it can cost and gives back what it did not."""

    def __init__(self, cap: float) -> None:
        self.cap, self.spent = cap, 0.0
        self._under_way: list[float] = []
        self._changed = threading.Condition()

    def reserve(self, worst: float) -> None:
        """Waits where only requests under way stand in the way; raises `CapReached` where it would be too much anyway."""
        with self._changed:
            while self.spent + sum(self._under_way) + worst > self.cap:
                if not self._under_way or self.spent + worst > self.cap:
                    raise CapReached
                self._changed.wait()
            self._under_way.append(worst)

    def settle(self, worst: float, cost: float) -> None:
        with self._changed:
            self._under_way.remove(worst)
            self.spent += cost
            self._changed.notify_all()


class Answers:
    """Asks an explainer, within a budget; what it has answered before is read from `url`."""

    def __init__(self, explainer: Explainer, url: str, prices: Prices, budget: Budget, answer_tokens: int) -> None:
        self.name = explainer.name
        self._explainer, self._url, self._prices, self._budget = explainer, url, prices, budget
        self._answer_tokens = answer_tokens
        self._failed = 0
        self.asked = 0

    def known(self, messages: Sequence[Message], attempt: int = 0) -> str | None:
        """The text of an answer that is there already."""
        try:
            return str(json.loads(storage.read_bytes(self._place(messages, attempt)))["text"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def ask(self, messages: Sequence[Message], attempt: int = 0) -> str:
        """The text of the answer. attempt: another number asks anew. Raises `Charged` where there is none."""
        present = self.known(messages, attempt)
        if present is not None:
            return present
        worst = self._prices.worst(messages, self._answer_tokens)
        self._budget.reserve(worst)
        cost = 0.0
        try:
            answer = self._explainer.ask(messages, self._answer_tokens)
            cost = self._cost(answer, worst)
            self.asked, self._failed = self.asked + 1, 0
            # Written before anybody looks at it: whoever is killed now has it.
            storage.put_json({"text": answer.text, "cost": cost, "by": self.name}, self._place(messages, attempt))
        except Charged as error:
            cost = worst
            self._failed += 1
            if self._failed >= _FAILURES:
                raise Unavailable(f"{self.name} gave no usable answer {self._failed} times in a row: {error}") from None
            raise
        finally:
            self._budget.settle(worst, cost)
        return answer.text

    def _cost(self, answer: Answer, worst: float) -> float:
        if answer.input_tokens is None or answer.output_tokens is None:
            return worst
        return self._prices.of(answer.input_tokens, answer.output_tokens)

    def _place(self, messages: Sequence[Message], attempt: int) -> str:
        named = [self.name, list(messages), self._answer_tokens, attempt]
        return storage.join(self._url, f"{sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:32]}.json")
