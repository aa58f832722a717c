"""A document: its text, its name, the side of the split on which it stands, and how a row of a table becomes one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b, sha256
from typing import Any, NamedTuple

from components.corpus.manifest import Split
from components.corpus.settings import SourceSettings
from components.settings import UserError


class Rendered(NamedTuple):
    """A conversation as a chat template writes it."""

    text: str
    tokens: Sequence[int] | None = None
    """Where a message spells out a special token, which is text and not that token: only the ids tell them apart."""


Render = Callable[[list[dict[str, Any]], str | None], Rendered]
"""A conversation and a chat template (None: the tokenizer's own) -> text; raises ValueError where that fails."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """One document: `name` is where it came from, `sha256` that of its UTF-8 text."""

    name: str
    text: str
    conversation: str | None = None
    """Roles and contents in a canonical form, where the text was rendered from a conversation."""
    tokens: Sequence[int] | None = None
    """Its token ids, where the text alone does not decide them."""

    @property
    def sha256(self) -> str:
        return sha256(self.text.encode("utf-8")).hexdigest()

    def split(self, held_out_fraction: float) -> Split:
        """`"held_out"` or `"train"`. A conversation's side is decided before a chat template touches it, since another
        model's template makes another text of it."""
        return split_of(self.text if self.conversation is None else self.conversation, held_out_fraction)


def split_of(content: str | bytes, held_out_fraction: float) -> Split:
    """`"held_out"` or `"train"`, from a text, or an image's bytes, alone.

    The decision looks at nothing but the content, so that the same document is on the same side for every model,
    corpus mixture, seed and order, and two copies of one text can never stand on both sides.
    """
    raw = content.encode("utf-8") if isinstance(content, str) else content
    value = int.from_bytes(blake2b(raw, digest_size=8).digest(), "big")
    return "held_out" if value < held_out_fraction * 2.0**64 else "train"


def document_from_row(
    row: Mapping[str, Any], name: str, source: SourceSettings, field: str, render: Render | None
) -> Document | None:
    """The document in a row of a table or a JSONL object; None where its text is missing or blank.

    Raises a UserError, naming a field under `field`, where the column is not there or holds something else.
    """
    setting = "text_column" if source.messages_column is None else "messages_column"
    column = source.text_column if source.messages_column is None else source.messages_column
    if column not in row:
        raise UserError(f"{field}.{setting}: '{column}' is not in {name}, which has {', '.join(sorted(row)) or 'no column'}")
    value = row[column]
    if value is None:
        return None
    if source.messages_column is None:
        if not isinstance(value, str):
            raise UserError(f"{field}.{setting}: '{column}' in {name} is a {type(value).__name__}; it must be a string")
        document = Document(name=name, text=value)
    else:
        messages = _messages(value, f"{field}.{setting}: '{column}' in {name}")
        assert render is not None, "conversations need the tokenizer's chat template"
        try:
            text, tokens = render(messages, source.chat_template)
        except ValueError as error:
            raise UserError(
                f"{field}.{setting}: the chat template does not take the conversation in {name}: {error}"
            ) from error
        document = Document(name=name, text=text, conversation=_canonical(messages), tokens=tokens)
    try:
        document.text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{field}.{setting}: '{column}' in {name} holds a lone surrogate, which is no text") from error
    return document if document.text.strip() else None


def _messages(value: Any, what: str) -> list[dict[str, Any]]:
    accepted = "it must be a list of {role, content}"
    if not isinstance(value, list):
        raise UserError(f"{what} is a {type(value).__name__}; {accepted}")
    if not value:
        raise UserError(f"{what} is empty; {accepted}")
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise UserError(f"{what} holds {json.dumps(message, default=str)[:80]}; {accepted}")
    return [dict(message) for message in value]


def _canonical(messages: list[dict[str, Any]]) -> str:
    pairs = [[message["role"], message["content"]] for message in messages]
    return json.dumps(pairs, sort_keys=True, separators=(",", ":"), default=str)
