"""A model's tokenizer: texts and conversations to token ids, the same on every day and whatever a text spells out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from components.corpus.documents import Render, Rendered
from components.corpus.encoder import Encoder
from components.corpus.settings import CorpusSettings
from components.language_model.source import ModelSource
from components.settings import UserError, first_line

CHAT_DATE = datetime(2024, 7, 26)
"""What a chat template that prints today's date is told: tokens must not depend on the day they were made on."""
_DATE_FUNCTION = "strftime_now"


def load_encoder(source: ModelSource) -> Encoder:
    """The model's tokenizer as the corpus uses it; a UserError where it has neither BOS nor EOS, nor CLS, or is another
    model's."""
    tokenizer = load_tokenizer(source)
    # BERT's words for them are CLS and SEP.
    bos = _first_given(tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.eos_token_id)
    separator = _first_given(tokenizer.eos_token_id, tokenizer.sep_token_id, bos)
    if bos is None or separator is None:
        raise UserError(f"language_model.name: the tokenizer of '{source.settings.name}' has neither a BOS nor an EOS token")
    known = getattr(source.config.get_text_config(), "vocab_size", None)
    _require_fit(tokenizer, known, source)
    _require_known([[bos, separator]], known, tokenizer, source)
    return Encoder(
        encode=_encode_of(tokenizer, source, known, split_special_tokens=True),
        encode_rendered=_encode_of(tokenizer, source, known, split_special_tokens=False),
        bos=bos,
        separator=separator,
        render=_render_of(tokenizer, source.settings.name),
    )


def _require_fit(tokenizer: Any, known: int | None, source: ModelSource) -> None:
    """Raise a UserError for a vocabulary that is larger than the model's embedding, before anything is encoded.

    Tokens that were added to it may go beyond: many models have a padding token that never comes up.
    """
    own = [token for token in tokenizer.get_vocab().values() if token not in tokenizer.added_tokens_decoder]
    if known is not None and own and max(own) >= known:
        raise UserError(
            f"language_model.name: the tokenizer of '{source.settings.name}' has tokens up to {max(own)}, and the model embeds "
            f"{known}; the tokenizer is another model's, or config.json is wrong"
        )


def require_same_tokens(source: ModelSource) -> None:
    """A UserError unless the second model's tokenizer makes the same tokens of every text: rows of two models are compared
    token by token. Chat templates may differ; the first model's is used."""
    assert source.second is not None
    if source.alone.tokenizer_identity == source.second.tokenizer_identity:
        return
    ours, theirs = (load_tokenizer(one) for one in (source.alone, source.second))
    for what, of in _DECIDING.items():
        if of(ours) != of(theirs):
            raise UserError(
                f"language_model.second.name: the tokenizer of '{source.second.settings.name}' differs from that of "
                f"'{source.settings.name}' in its {what}; a model with the same tokenizer is accepted"
            )


def _backend(tokenizer: Any, part: str) -> Any:
    return json.loads(tokenizer.backend_tokenizer.to_str())[part] if tokenizer.is_fast else type(tokenizer).__name__


_DECIDING: dict[str, Callable[[Any], Any]] = {
    "vocabulary": lambda tokenizer: tokenizer.get_vocab(),
    "normalizer": lambda tokenizer: _backend(tokenizer, "normalizer"),
    "pre-tokenizer": lambda tokenizer: _backend(tokenizer, "pre_tokenizer"),
    "merges": lambda tokenizer: _backend(tokenizer, "model"),
    "BOS or EOS": lambda tokenizer: (tokenizer.bos_token_id, tokenizer.eos_token_id),
}
"""What of a tokenizer decides the tokens of a text."""


def chat_date(corpus: CorpusSettings, source: ModelSource) -> str | None:
    """The date that a chat template of the corpus prints, None where none does."""
    templates = {part.chat_template for _, part in corpus.sources if part.messages_column is not None}
    return CHAT_DATE.date().isoformat() if any(prints_date(source, template) for template in templates) else None


def prints_date(source: ModelSource, template: str | None) -> bool:
    """Whether a chat template (None: the tokenizer's own) asks for today's date."""
    if template is None:
        try:
            template = load_tokenizer(source).get_chat_template()
        except ValueError:  # it has none, which is said where conversations are checked
            return False
    return _DATE_FUNCTION in template


def load_tokenizer(source: ModelSource) -> Any:
    """The model's tokenizer; a UserError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            source.location, revision=source.commit, trust_remote_code=source.settings.trust_remote_code
        )
    except Exception as error:  # a damaged file fails in whatever way the library happens to fail on it
        raise UserError(
            f"language_model.name: '{source.settings.name}' has no usable tokenizer: {first_line(error)}"
        ) from error


def _encode_of(
    tokenizer: Any, source: ModelSource, known: int | None, split_special_tokens: bool
) -> Callable[[list[str]], list[list[int]]]:
    """Texts -> token ids, no special tokens added: over all cores, without the offsets that nothing here reads.

    split_special_tokens: one that a text spells out is text, as in every text that speaks of language models.
    """

    def encode(texts: list[str]) -> list[list[int]]:
        if tokenizer.is_fast:
            backend = tokenizer.backend_tokenizer
            backend.no_truncation()
            backend.no_padding()
            backend.encode_special_tokens = split_special_tokens
            ids = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        else:
            options = {"add_special_tokens": False, "verbose": False, "split_special_tokens": split_special_tokens}
            ids = tokenizer(texts, **options)["input_ids"]
        _require_known(ids, known, tokenizer, source)
        return ids

    return encode


def _require_known(ids: Sequence[Sequence[int]], known: int | None, tokenizer: Any, source: ModelSource) -> None:
    largest = max((max(found) for found in ids if len(found)), default=-1)
    if known is not None and largest >= known:
        raise UserError(
            f"language_model.name: token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}) of the tokenizer of "
            f"'{source.settings.name}' is beyond the {known} that the model embeds"
        )


def _render_of(tokenizer: Any, name: str) -> Render:
    special = [token for token in tokenizer.all_special_tokens if token]

    def render(messages: list[dict[str, Any]], template: str | None) -> Rendered:
        if template is None and not tokenizer.chat_template:
            raise ValueError(f"the tokenizer of '{name}' has no chat template; give one as chat_template")
        try:
            chosen = _undated(tokenizer.get_chat_template(template))
            text = str(tokenizer.apply_chat_template(messages, chat_template=chosen, tokenize=False))
            spelled = any(token in str(list(message.values())) for token in special for message in messages)
            ids = _sanitized(tokenizer, messages, chosen) if spelled else None
        except Exception as error:  # whatever a template does to a conversation
            raise ValueError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error
        # Where BOS stands is up to the corpus settings; the template's own would make it two.
        return Rendered(text.removeprefix(tokenizer.bos_token) if tokenizer.bos_token else text, ids)

    return render


def _sanitized(tokenizer: Any, messages: list[dict[str, Any]], template: str) -> list[int]:
    """Token ids in which the template's special tokens are tokens, and those that a message spells out are text."""
    ids = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=True, return_dict=False, sanitize_control_tokens=True
    )
    return list(ids[1:] if len(ids) and ids[0] == tokenizer.bos_token_id else ids)


def _undated(template: str) -> str:
    """The template with another function of the name that gives today's date, which gives that of `CHAT_DATE`."""
    if _DATE_FUNCTION not in template:
        return template
    steps = "".join(f"|replace('%{code}', {CHAT_DATE.strftime('%' + code)!r})" for code in "aAbBcdfHIjmMpSuUwWxXyYZ")
    # The empty expression keeps the line breaks with which the template itself may begin.
    return f"{{% macro {_DATE_FUNCTION}(format) %}}{{{{ format{steps} }}}}{{% endmacro %}}{{{{ '' }}}}{template}"


def _first_given(*tokens: int | None) -> int | None:
    return next((token for token in tokens if token is not None), None)
