"""`sae` on images as a user meets it: a vision-language model, from training to the features on pictures and text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from seeing import draw_pictures, save_llava, tree
from typer.testing import CliRunner

from components import steps
from components.run.config import parse_config
from components.run.specification import resolve
from flows.cli import app


def test_features_of_images_are_measured_listed_shown_and_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    for name, make in (("pictures", draw_pictures), ("llava", save_llava)):
        (tmp_path / name).mkdir()
        make(tmp_path / name)
    corpus = {"source": "images", "paths": [str(tmp_path / "pictures")], "prompt": "the model <image> fires where"}
    given = tree(tmp_path, tmp_path / "llava", corpus, ["resid_post.1"])
    given["evaluation"] = {"tokens": 60, "baseline_tokens": 40}
    given["interpretation"] = {"tokens": 60, "examples": 3}
    (tmp_path / "seen.yaml").write_text(yaml.safe_dump(given))
    steps.extract(resolve(parse_config(given)))
    steps.train(resolve(parse_config(given)))

    def said(*words: str, code: int = 0) -> str:
        result = CliRunner().invoke(app, [*words[:-1], str(tmp_path / "seen.yaml"), *words[-1].split()])
        assert result.exit_code == code, result.output
        return result.stdout if code == 0 else result.output

    plan = json.loads(said("plan", "--json"))
    assert plan["evaluation"]["impossible"] is None
    metrics = json.loads(said("evaluate", "--json"))["metrics"]
    assert {"explained_variance", "kl_divergence"} < set(metrics)
    assert not [name for name in metrics if "loss" in name]
    said("features", "make", "")
    rows = json.loads(said("features", "list", "--json --limit 64"))["features"]
    pictured = next(row for row in rows if len(row["patches"][0]) == 3)
    image, row, column = pictured["patches"][0]
    name = pictured["tokens"].split(" · ")[0]
    assert name.endswith((f".png ({row}, {column})", f".jpg ({row}, {column})"))
    assert name in said("features", "list", "--limit 64")
    shown = said("features", "show", str(pictured["feature"]))
    assert f"image {image} ({name.split(' ')[0]}), patch ({row}, {column})" in shown
    assert "of tokens, in" in shown
    both = said("features", "multimodal", "--densest 1")
    assert "of image tokens" in both
    assert "fire on both" in both
    found = said("features", "search", f"--image {tmp_path / 'pictures' / name.split(' ')[0]} --limit 64")
    assert str(pictured["feature"]) in found
    assert "the corpus is 'images'" in said("evaluate", "--format saebench", code=2)
    assert "--texts" in said("features", "multimodal", f"--texts {tmp_path / 'gone.txt'}", code=2)
