"""What decides the tokens is in their digest, and nothing else decides them: not the day, not what a text spells out."""

from __future__ import annotations

import json
import re
import shutil
from datetime import datetime
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import transformers
from transformers.utils import chat_template_utils

from components import steps
from components.corpus.tokens import read_sequences
from components.language_model.loading import find_model, load_encoder, load_tokenizer
from components.language_model.settings import LanguageModelSettings
from components.language_model.source import _TOKENIZER_PATTERNS
from components.run.checks import check
from components.run.config import parse_config
from components.run.specification import resolve
from components.settings import UserError

DATED = (
    "\n{{ bos_token }}{%- if strftime_now is defined %}{% set today = strftime_now('%d %b %Y, %A %H:%M') %}{% endif %}"
    "\nToday is {{ today }}.\n{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
)
TALK = [{"role": "user", "content": "What is a feature?"}, {"role": "assistant", "content": "A direction."}]


def model_in(folder: Path, tiny_model: str, **files: str) -> LanguageModelSettings:
    shutil.copytree(tiny_model, folder)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)
    return LanguageModelSettings(name=str(folder))


def on_day(monkeypatch: pytest.MonkeyPatch, day: datetime) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return day

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


def test_a_chat_template_that_prints_the_date_prints_the_same_on_every_day(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = find_model(model_in(tmp_path / "model", tiny_model, chat_template__jinja=DATED))
    render, tokenizer = load_encoder(source).render, load_tokenizer(source)
    found = set()
    for day in (datetime(2024, 7, 26), datetime(2026, 1, 5, 12)):
        on_day(monkeypatch, day)
        found.add(render(TALK, None).text)
        found.add(render(TALK, DATED).text)
        expected = tokenizer.apply_chat_template(TALK, tokenize=False)
        assert day.strftime("Today is %d %b %Y, %A") in expected
        if day.year == 2024:
            found.add(expected.removeprefix("\n").removeprefix(tokenizer.bos_token))
    assert len({text.removeprefix("\n").removeprefix(tokenizer.bos_token) for text in found}) == 1


def test_the_date_is_part_of_the_tokens_name_where_a_template_prints_it(tiny_model: str, tiny_tree: dict, tmp_path: Path):
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"messages": TALK}) for _ in range(3)))
    corpus = {"paths": [str(tmp_path / "t.jsonl")], "messages_column": "messages"}
    for name, template, dated in (("dated", DATED, True), ("plain", DATED.replace("strftime_now", "nothing"), False)):
        settings = model_in(tmp_path / name, tiny_model, chat_template__jinja=template)
        tree = {**tiny_tree, "corpus": tiny_tree["corpus"] | corpus, "language_model": {"name": settings.name}}
        assert ("chat_date" in resolve(parse_config(tree)).token_identity) is dated


def test_every_file_that_a_tokenizer_of_transformers_is_made_of_is_in_its_digest():
    """By transformers' own lists, in the source that is installed."""
    listed = set()
    for path in Path(transformers.__file__).parent.rglob("*token*.py"):
        for table in re.findall(r"VOCAB_FILES_NAMES\s*=\s*\{(.*?)\}", path.read_text(), re.DOTALL):
            listed.update(re.findall(r'"\w+":\s*"([^"]+)"', table))
    listed |= set(
        re.findall(r'^[A-Z_]+_FILE = "([^"]+)"', Path(transformers.tokenization_utils_base.__file__).read_text(), re.M)
    )
    assert len(listed) > 20
    missed = sorted(name for name in listed if not any(fnmatch(name, pattern) for pattern in _TOKENIZER_PATTERNS))
    assert missed == []


@pytest.mark.parametrize("name", ["added_tokens.json", "qwen.tiktoken", "bpe.codes", "tekken.json", "source.spm"])
def test_another_file_of_the_tokenizer_is_another_digest(name: str, tiny_model: str, tmp_path: Path):
    plain = find_model(LanguageModelSettings(name=tiny_model)).tokenizer_identity
    first = find_model(model_in(tmp_path / "a", tiny_model)).tokenizer_identity
    more = model_in(tmp_path / "b", tiny_model)
    (Path(more.name) / name).write_text("{}")
    assert first == plain != find_model(more).tokenizer_identity


def test_the_class_that_config_json_names_counts_where_the_tokenizer_names_none(tiny_model: str, tmp_path: Path):
    found = []
    for kind in ("llama", "gpt2"):
        settings = model_in(tmp_path / kind, tiny_model, tokenizer_config__json='{"bos_token": "<|bos|>"}')
        config = json.loads((tmp_path / kind / "config.json").read_text())
        (tmp_path / kind / "config.json").write_text(json.dumps(config | {"model_type": kind}))
        found.append(find_model(settings).tokenizer_identity)
    assert found[0] != found[1]


def test_code_of_the_tokenizer_counts_where_it_may_run(tiny_model: str, tmp_path: Path):
    settings = model_in(tmp_path / "a", tiny_model)
    trusted = settings.model_copy(update={"trust_remote_code": True})
    before = find_model(trusted).tokenizer_identity
    other = model_in(tmp_path / "b", tiny_model, tokenization_own__py="x = 1").model_copy(update={"trust_remote_code": True})
    assert find_model(other).tokenizer_identity != before


# special tokens that a text spells out


def tokens_of(tree: dict) -> tuple[np.ndarray, np.ndarray]:
    run = resolve(parse_config(tree))
    check(run)
    manifest = steps.prepare_tokens(run)
    blocks = [read_sequences(run.token_url, manifest, split, 0, 10**6) for split in ("train", "held_out")]
    return np.concatenate([b.tokens for b in blocks]), np.concatenate([b.documents for b in blocks])


def test_a_special_token_that_a_document_spells_out_is_text(tiny_tree: dict, tmp_path: Path):
    for number in range(40):
        (tmp_path / "corpus").mkdir(exist_ok=True)
        (tmp_path / "corpus" / f"{number}.txt").write_text(f"text {number}: a model reads <|bos|> first, and <|bos|> again")
    tiny_tree["corpus"] |= {"paths": [str(tmp_path / "corpus")]}
    tokens, documents = tokens_of(tiny_tree)
    assert (tokens[documents >= 0] != 0).all(), "0 is <|bos|>, which no counted token may be"
    tiny_tree["corpus"]["split_special_tokens"] = False
    tokens, documents = tokens_of(tiny_tree)
    assert (tokens[documents >= 0] == 0).sum() >= 60, "where they were written on purpose"


def test_in_a_conversation_the_templates_special_tokens_are_tokens_and_a_messages_are_text(
    tiny_model: str, tiny_tree: dict, tmp_path: Path
):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    settings = model_in(tmp_path / "model", tiny_model, chat_template__jinja=template)
    talks = [[{"role": "user", "content": f"{n}: what is <|bos|>?"}, {"role": "assistant", "content": "x"}] for n in range(40)]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"messages": talk}) for talk in talks))
    tiny_tree["corpus"] |= {"paths": [str(tmp_path / "t.jsonl")], "messages_column": "messages", "context_length": 64}
    tiny_tree["language_model"] = {"name": settings.name}
    tokens, documents = tokens_of(tiny_tree)
    for document in range(40):
        assert (tokens[documents == document] == 0).sum() == 2, "one <|bos|>, which is EOS here, after each message"


def test_a_tokenizer_of_another_model_is_refused_before_anything_is_encoded(tiny_model: str, tiny_tree: dict, tmp_path: Path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(tiny_model)
    config.vocab_size = 1000
    LlamaForCausalLM(config).save_pretrained(tmp_path / "small")
    for path in Path(tiny_model).glob("tokenizer*"):
        shutil.copy(path, tmp_path / "small")
    tiny_tree["language_model"] = {"name": str(tmp_path / "small")}
    with pytest.raises(UserError, match=r"^language_model\.name: the tokenizer of .* has tokens up to 4095.* embeds 1000"):
        check(resolve(parse_config(tiny_tree)))
