"""A language model that runs here, as an explainer."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from components.interpretation.explanations.asking import Answer, Message
from components.language_model.loading import load_model, load_tokenizer
from components.language_model.settings import LanguageModelSettings
from components.language_model.source import find_model


class LocalExplainer:
    """An `Explainer`: a transformers model of that Hub name or folder, which writes its most likely continuation."""

    def __init__(self, model: str, device: torch.device) -> None:
        source = find_model(LanguageModelSettings(name=model))
        self.name = model if source.commit is None else f"{model}@{source.commit}"
        self._tokenizer, self._model = load_tokenizer(source), load_model(source, device)
        self._device, self._turn = device, threading.Lock()

    def close(self) -> None:
        pass

    @torch.no_grad()
    def ask(self, messages: Sequence[Message], answer_tokens: int) -> Answer:
        if self._tokenizer.chat_template:
            ids = self._tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)
        else:
            ids = self._tokenizer.encode("\n\n".join(message["content"] for message in messages) + "\n\n")
        room = getattr(self._model.config, "max_position_embeddings", None)
        if room is not None:
            answer_tokens = min(answer_tokens, room // 2)
            ids = ids[-(room - answer_tokens) :]
        with self._turn:
            given = torch.tensor([ids], device=self._device)
            written = self._model.generate(  # type: ignore[operator]
                given, attention_mask=torch.ones_like(given), max_new_tokens=answer_tokens, do_sample=False,
                pad_token_id=self._tokenizer.eos_token_id,
            )  # fmt: skip
        new = written[0, len(ids) :]
        return Answer(self._tokenizer.decode(new, skip_special_tokens=True), len(ids), len(new))
