"""A model whose files cannot be what it is made of is refused in one sentence, before a token is made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from components.language_model.loading import find_model, load_model
from components.language_model.settings import LanguageModelSettings
from components.language_model.source import _folder_digest
from components.run.checks import check
from components.run.config import parse_config
from components.run.specification import resolve
from components.settings import UserError

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"


def config(**fields: object) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | fields))

    return spoil


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def cut(length: int) -> Callable[[Path], None]:
    return lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:length]) and None


def index(content: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / INDEX).write_text(content)

    return spoil


SPOILT: dict[str, tuple[Callable[[Path], None], str]] = {
    "pointer of LFS": (text(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"), "git lfs pull"),
    "cut": (cut(20_000), "damaged or cut off"),
    "cut in its header": (cut(100), "damaged or cut off"),
    "empty": (cut(0), "damaged or cut off"),
    "none": (lambda folder: (folder / WEIGHTS).unlink(), "no usable safetensors weights"),
    "other shapes": (config(intermediate_size=128), "is [32, 64], and by its config.json [32, 128]"),
    "other vocabulary": (config(vocab_size=8192), "and by its config.json [8192, 32]"),
    "more layers": (config(num_hidden_layers=5), "lack 18 tensors, such as model.layers.3."),
    "fewer layers": (config(num_hidden_layers=2), "has no place for 9 tensors, such as model.layers.2."),
    "file of the index": (index('{"weight_map": {"a": "gone.safetensors"}}'), "lacks gone.safetensors"),
    "index": (index("["), "index.json of"),
    "list as index": (index("[]"), "index.json of"),
    "text as width": (config(hidden_size="32"), "expected int, got str"),
    "no width": (config(hidden_size=None), "no usable config.json"),
    "no heads": (config(num_attention_heads=0), "no usable config.json"),
    "negative width": (config(hidden_size=-32), "describes no model that can be made"),
    "activation": (config(hidden_act="nope"), "describes no model that can be made: KeyError: 'nope'"),
    "rope": (config(rope_parameters={"rope_type": "nope"}), "describes no model that can be made"),
    "dtype": (config(dtype="nope"), "no usable config.json"),
    "padding": (config(pad_token_id=99_999), "describes no model that can be made"),
    "quantization": (config(quantization_config="x"), "no usable config.json"),
    "deep config": (text(CONFIG, "[" * 100_000), "no usable config.json"),
    "deep tokenizer": (text("tokenizer_config.json", "[" * 100_000), "no usable tokenizer"),
    "list as tokenizer": (text("tokenizer_config.json", "[]"), "no usable tokenizer"),
    "tokenizer": (text("tokenizer.json", "[]"), "no usable tokenizer"),
    "tokens of no kind": (text("tokenizer_config.json", '{"bos_token": 5}'), "no usable tokenizer"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_files_of_a_model_that_cannot_be_used_are_one_sentence_before_any_work(
    case: str, tiny_tree: dict, tiny_model: str, tmp_path: Path
):
    spoil, said = SPOILT[case]
    shutil.copytree(tiny_model, tmp_path / "model")
    spoil(tmp_path / "model")
    _folder_digest.cache_clear()
    with pytest.raises(UserError, match=r"^language_model\.name: ") as refused:
        check(resolve(parse_config({**tiny_tree, "language_model": {"name": str(tmp_path / "model")}})))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "root" / "tokens").exists()


def test_weights_that_fail_as_they_are_loaded_are_one_sentence_too(tiny_model: str, tmp_path: Path):
    """As of a model on the Hub, whose files are not looked at before."""
    for name, spoil in (
        ("shapes", config(intermediate_size=128)),
        ("cut", cut(20_000)),
        ("layers", config(num_hidden_layers=2)),
    ):
        shutil.copytree(tiny_model, tmp_path / name)
        spoil(tmp_path / name)
        source = find_model(LanguageModelSettings(name=str(tmp_path / name)))
        with pytest.raises(UserError, match=r"^language_model\.name: "):
            load_model(source, torch.device("cpu"))


def test_weights_in_several_files_are_accepted(tiny_tree: dict, tiny_model: str, tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    parts = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(sorted(tensors))}
    for part in set(parts.values()):
        save_file({name: tensors[name] for name in tensors if parts[name] == part}, folder / part, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": parts}))
    check(resolve(parse_config({**tiny_tree, "language_model": {"name": str(folder)}})))
    load_model(find_model(LanguageModelSettings(name=str(folder))), torch.device("cpu"))


@pytest.mark.parametrize(
    ("folder", "slug"),
    [
        ("st", "llama-3x32-st"),
        ("my-model", "llama-3x32-my-model"),
        ("checkpoint-1200", "llama-3x32-checkpoint-1200"),
        ("SmolLM2-135M", "SmolLM2-135M"),
        ("models--owner--name-1B/snapshots/0123456789abcdef0123456789abcdef01234567", "name-1B"),
    ],
)
def test_a_folder_that_says_nothing_is_named_by_what_it_holds(tiny_model: str, tmp_path: Path, folder: str, slug: str):
    (tmp_path / folder).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / folder).symlink_to(tiny_model)
    assert find_model(LanguageModelSettings(name=str(tmp_path / folder))).slug == slug
