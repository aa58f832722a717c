"""One interface to whatever answers: messages in, text and what it took out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypedDict


class Message(TypedDict):
    role: str
    content: str


@dataclass(frozen=True)
class Answer:
    text: str
    input_tokens: int | None = None
    """That were charged for; None where the answer does not say."""
    output_tokens: int | None = None


class Explainer(Protocol):
    name: str
    """What answers, as it is recorded."""

    def ask(self, messages: Sequence[Message], answer_tokens: int) -> Answer: ...

    def close(self) -> None: ...


class Charged(Exception):
    """No usable answer came, and the request may have been charged for."""


class Unavailable(Exception):
    """Nothing more can be asked: the endpoint is away or refuses."""
