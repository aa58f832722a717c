"""A small vision model and a corpus of pictures, for the docs: `python docs/vision.py FOLDER` leaves `model/`, `crops.parquet`
and `images.yaml` there, for `sae run images.yaml` in that folder. Two minutes on one core.

The pictures are crops of the three photographs that scikit-learn and matplotlib ship; the model, a ViT of four blocks, learns
from which part of which photograph a crop is.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import matplotlib.cbook
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

CROPS, SIDE, PATCH, CELLS = 2_000, 64, 8, 4
STEPS, BATCH = 400, 64
GATES = {
    "evaluation_tokens": 10_000,
    "bounds": {"explained_variance": {"at_least": 0.5}, "dead_fraction": {"at_most": 0.25}, "l0": {"at_least": 0.1}},
}


def photographs() -> list[Image.Image]:
    hopper = Image.open(matplotlib.cbook.get_sample_data("grace_hopper.jpg")).convert("RGB")
    return [*map(Image.fromarray, load_sample_images().images), hopper]


def crops(generator: np.random.Generator) -> tuple[list[Image.Image], list[int]]:
    """Squares of 64 to 160 pixels, made 64 wide; the part of the photograph, of `CELLS` x `CELLS`, that has their centre."""
    whole, made, parts = photographs(), [], []
    for _ in range(CROPS):
        number = int(generator.integers(len(whole)))
        photograph, side = whole[number], int(generator.integers(SIDE, 161))
        left, top = (int(generator.integers(length - side)) for length in photograph.size)
        made.append(photograph.crop((left, top, left + side, top + side)).resize((SIDE, SIDE)))
        column, row = (
            CELLS * (start + side // 2) // length for start, length in zip((left, top), photograph.size, strict=True)
        )
        parts.append((number * CELLS + row) * CELLS + column)
    return made, parts


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pictures, parts = crops(np.random.default_rng(0))
    encoded = []
    for number, picture in enumerate(pictures):
        with io.BytesIO() as stream:
            picture.save(stream, format="PNG")
            encoded.append({"bytes": stream.getvalue(), "path": f"{number}.png"})
    pq.write_table(pa.table({"image": encoded, "label": parts}), folder / "crops.parquet", row_group_size=256)

    torch.manual_seed(0)
    processor = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
    config = ViTConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256, image_size=SIDE, patch_size=PATCH,
        num_labels=3 * CELLS * CELLS,
    )  # fmt: skip
    model, labels = ViTForImageClassification(config), torch.tensor(parts)
    pixels = torch.cat(
        [processor(images=pictures[i : i + 250], return_tensors="pt")["pixel_values"] for i in range(0, CROPS, 250)]
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(STEPS):
        chosen = torch.randint(CROPS, (BATCH,))
        found = model(pixel_values=pixels[chosen], labels=labels[chosen])
        optimizer.zero_grad()
        found.loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == STEPS - 1:
            right = (found.logits.argmax(dim=1) == labels[chosen]).double().mean()
            print(f"step {step}: loss {found.loss.item():.2f}, right {right:.0%}", flush=True)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    (folder / "gates.yaml").write_text(yaml.safe_dump(GATES))
    settings = {
        "name": "crops",
        "corpus": {
            "source": "images", "paths": ["crops.parquet"], "held_out_fraction": 0.25,
            "train_tokens": 90_000, "held_out_tokens": 30_000,
        },
        "language_model": {"name": "model"},
        "activations": {"hook_points": ["resid_post.1"]},
        "sae": {"architecture": "batchtopk", "d_sae": 384, "k": 8},
        "training": {"tokens": 1_000_000, "batch_size": 512},
        "evaluation": {"tokens": 20_000},
        "interpretation": {"tokens": 20_000},
        "tracking": {"gates": "gates.yaml"},
    }  # fmt: skip
    (folder / "images.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
