"""Small models that see, with random weights, and pictures: for the tests of everything that is made of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
IMAGE = {"image_size": 32, "patch_size": 8}
WORDS = "the sparse feature of a model fires where tokens in residual stream point along its decoder row".split()


def draw_pictures(folder: Path) -> Path:
    """Fourteen images of different sizes and formats, a copy of one, a broken one and a file that is none."""
    generator = np.random.default_rng(0)
    for number in range(14):
        size = tuple(generator.integers(20, 70, 2)) + ((3,) if number % 3 else ())
        image = Image.fromarray(generator.integers(0, 255, size, dtype=np.uint8))
        image.save(folder / f"{number:02d}{('.png', '.jpg')[number % 2]}")
    (folder / "copy.png").write_bytes((folder / "00.png").read_bytes())
    (folder / "broken.jpg").write_bytes((folder / "01.jpg").read_bytes()[:200])
    (folder / "notes.txt").write_text("not an image")
    return folder


def words_tokenizer(special: list[str], **roles: str) -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=special[0], **roles)


def tree(tmp_path: Path, model: Path, corpus: dict[str, Any], points: list[str]) -> dict[str, Any]:
    return {
        "name": "tiny",
        "device": "cpu",
        "storage": {"root": str(tmp_path / "root")},
        "corpus": {"held_out_fraction": 0.3, "train_tokens": 10_000, "held_out_tokens": 10_000, **corpus},
        "language_model": {"name": str(model), "batch_sequences": 4},
        "activations": {"hook_points": points, "dtype": "float32", "rows_per_shard": 64, "sequences_per_chunk": 5},
        "sae": {"d_sae": 32},
        "training": {"tokens": 500, "batch_size": 50, "checkpoint_tokens": 500, "log_tokens": 100},
    }


def save_vit(folder: Path) -> Path:
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(**SIZES, **IMAGE)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def save_llava(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = words_tokenizer(["<unk>", "<s>", "</s>"], bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**SIZES, **IMAGE),
        text_config=LlamaConfig(**{**SIZES, "hidden_size": 20}, vocab_size=len(tokenizer), num_key_value_heads=2),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder
