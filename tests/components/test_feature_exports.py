"""Feature data in other projects' formats, read back as those projects read it."""

from __future__ import annotations

import gzip
import json
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from components import steps
from components.evaluation.held_out import HeldOut
from components.interpretation.explanations.table import Explanation, write_explanations
from components.interpretation.exports import neuronpedia, neuronpedia_tree
from components.run.config import parse_config
from components.run.specification import Specification, resolve
from components.settings import UserError
from components.steps.interpretation import feature_data, held_out_pass


@pytest.fixture(scope="module")
def plan(tiny_tree_in: Callable[[Path], dict], tmp_path_factory: pytest.TempPathFactory) -> Specification:
    tree = tiny_tree_in(tmp_path_factory.mktemp("exported"))
    tree["interpretation"] = {"tokens": 900, "examples": 3, "drawn": 10, "logits": 30}
    tree["evaluation"] = {"tokens": 900, "reference_tokens": 1_000, "baselines": []}
    run = resolve(parse_config(tree))
    for step in (steps.extract, steps.train, steps.evaluate, steps.interpret):
        step(run)
    said = Explanation(feature=3, explanation="é" * 600, detection=0.9, fuzzing=None, explainer="m at http://127.0.0.1")
    write_explanations(run.sae_url, run.training_record().weights_sha256, [said])
    return run


def test_neuronpedia_gets_batches_within_the_limits_of_its_route(
    plan: Specification, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(neuronpedia, "FEATURES", 10)
    found = steps.export_features(plan, "neuronpedia", tmp_path / "out", None)
    bodies = [json.loads(path.read_text()) for path in sorted((tmp_path / "out").iterdir())]
    indexes = [feature["index"] for body in bodies for feature in body["features"]]
    data = feature_data(plan)
    assert indexes == [feature for feature in range(data.d_sae) if data.feature(feature)["examples"]]
    assert found["features"] == len(indexes)
    assert (found["modelId"], found["source"]) == (bodies[0]["modelId"], "1-res-tiny")
    for body in bodies:
        assert set(body) == {"modelId", "source", "features"}
        assert body["modelId"] == body["modelId"].lower()
        assert 1 <= len(body["features"]) <= 10
        for feature in body["features"]:
            assert 0 <= feature["density"] <= 1
            assert len(feature["topLogits"]) == len(feature["bottomLogits"]) == 20
            assert set(feature["topLogits"][0]) == {"token", "value"}
            assert len(feature["activations"]) >= 1
            for example in feature["activations"]:
                assert 1 <= len(example["tokens"]) == len(example["values"]) <= 1024
                if "quantileMin" in example:
                    assert example["quantileMin"] <= max(example["values"])
                    assert 0 < example["quantileFraction"] <= 1
    (said,) = [one for body in bodies for feature in body["features"] for one in feature["explanations"]]
    assert (len(said["text"]), said["modelName"]) == (512, "m")
    with pytest.raises(UserError, match="is there already"):
        steps.export_features(plan, "neuronpedia", tmp_path / "out", None)
    with pytest.raises(UserError, match="there are neuronpedia, neuronpedia-tree, feature-json, delphi"):
        steps.export_features(plan, "csv", tmp_path / "other", None)


def test_neuronpedias_tree_has_a_line_for_each_feature_activation_and_explanation(
    plan: Specification, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(neuronpedia_tree, "FEATURES", 25)
    found = steps.export_features(plan, "neuronpedia-tree", tmp_path / "out", "My Set")
    data = feature_data(plan)
    assert (found["features"], found["source"]) == (data.d_sae, "1-my-set")
    folder = tmp_path / "out" / found["modelId"] / "1-my-set"

    def lines(kind: str) -> list[dict[str, Any]]:
        paths = sorted((folder / kind).iterdir(), key=lambda path: int(path.name.split("-")[1].split(".")[0]))
        assert [path.name for path in paths] == [f"batch-{number}.jsonl.gz" for number in range(3)]
        return [json.loads(line) for path in paths for line in gzip.decompress(path.read_bytes()).decode().splitlines()]

    heads = {name: json.loads((folder / f"{name}.jsonl").read_text()) for name in ("release", "model", "sourceset", "source")}
    assert heads["model"]["id"] == heads["source"]["modelId"] == heads["sourceset"]["modelId"] == found["modelId"]
    assert heads["source"]["setName"] == heads["sourceset"]["name"] == "my-set"
    assert heads["sourceset"]["releaseName"] == heads["release"]["name"]
    assert heads["source"]["num_tokens_in_prompt"] == 32
    features, activations, (said,) = lines("features"), lines("activations"), lines("explanations")
    assert [line["index"] for line in features] == [str(number) for number in range(data.d_sae)]
    assert {line["layer"] for line in (*features, *activations, said)} == {"1-my-set"}
    assert {line["hookName"] for line in features} == {"blocks.1.hook_resid_post"}
    ids = [line["id"] for line in activations]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch("c[0-9a-z]{24}", one) for one in ids)
    for line in features:
        known = data.feature(int(line["index"]), neuronpedia.WINDOW)
        assert (line["maxActApprox"], line["frac_nonzero"]) == (known["row"]["max"], known["row"]["density"])
        assert len(line["pos_str"]) == len(line["pos_values"]) == len(line["neg_str"]) == 20
        assert len(line["freq_hist_data_bar_heights"]) == len(line["freq_hist_data_bar_values"])
        own = [one for one in activations if one["index"] == line["index"]]
        assert [one["values"] for one in own] == [one["activations"] for one in known["examples"]]
        for one, example in zip(own, known["examples"], strict=True):
            assert one["values"][one["maxValueTokenIndex"]] == one["maxValue"] == max(one["values"])
            assert one["values"][one["qualifyingTokenIndex"]] == example["activation"]
            assert (one["binContains"] == -1) == (example["kind"] == "strongest")
            assert one["binContains"] == -1 or one["binMin"] <= example["activation"] <= one["binMax"]
    assert (said["index"], len(said["description"])) == ("3", 512)
    steps.export_features(plan, "neuronpedia-tree", tmp_path / "again", "My Set")
    for path in (tmp_path / "out").rglob("*.*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(tmp_path / "out")).read_bytes()


def as_circuit_tracer(folder: Path, number: int) -> dict[str, Any]:
    """The feature of that Cantor number: layer and feature, then a range of the layer's file."""
    diagonal = int(((8 * number + 1) ** 0.5 - 1) / 2)
    feature = number - diagonal * (diagonal + 1) // 2
    layer = diagonal - feature
    index = json.loads(gzip.decompress((folder / "index.json.gz").read_bytes()))[layer]
    start, stop = index["offsets"][feature : feature + 2]
    content = (folder / index["filename"]).read_bytes()[start : stop + 1]  # its range has one byte of the next, too
    (length,) = struct.unpack("<i", content[:4])
    return json.loads(zlib.decompress(content[4 : 4 + length]))


def test_the_feature_json_comes_back_as_it_went(plan: Specification, tmp_path: Path):
    found = steps.export_features(plan, "feature-json", tmp_path, None)
    data = feature_data(plan)
    assert (found["features"], found["layer"]) == (data.d_sae, 1)
    for feature in range(data.d_sae):
        record = as_circuit_tracer(tmp_path / "features", (1 + feature) * (2 + feature) // 2 + feature)
        known = data.feature(feature, 48)
        assert (record["index"], record["act_max"]) == (feature, known["row"]["max"])
        assert record["activation_frequency"] == known["row"]["density"]
        assert record["top_logits"] == [token for token, _ in known["likely"]]
        assert sum(record["histogram"]) == sum(known["histogram"]["counts"])
        assert record["quantile_values"] == sorted(record["quantile_values"])
        examples = [one for group in record["examples_quantiles"] for one in group["examples"]]
        assert [one["tokens"] for one in examples] == [one["tokens"] for one in known["examples"]]
        for one, original in zip(examples, known["examples"], strict=True):
            assert one["tokens_acts_list"] == original["activations"]
            assert one["tokens_acts_list"][one["train_token_ind"]] == original["activation"]
        names = [group["quantile_name"] for group in record["examples_quantiles"]]
        assert names == (
            ["Top activations", *(f"Subsample interval {place}" for place in range(len(names) - 1))] if names else []
        )


def test_delphi_gets_every_activation(plan: Specification, tmp_path: Path):
    found = steps.export_features(plan, "delphi", tmp_path, None)
    folder = tmp_path / "latents" / "layers.1"
    config = json.loads((folder / "config.json").read_text())
    assert (found["hookpoint"], config["ctx_len"], config["cache_ctx_len"]) == ("layers.1", 32, 32)
    held_out = held_out_pass(plan, HeldOut(url=plan.token_url, manifest=plan.token_manifest()))
    batches = list(held_out.batches())
    expected = np.concatenate([batch.activations().numpy() for batch in batches])
    tokens = np.concatenate([batch.block.tokens for batch in batches])
    matrix = np.zeros_like(expected)
    covered: list[int] = []
    for path in folder.glob("*.safetensors"):
        first, last = map(int, path.stem.split("_"))  # both are inside
        covered += range(first, last + 1)
        part = load_file(path)
        assert part["locations"].dtype in (np.uint16, np.uint32)
        assert part["activations"].dtype == np.float16
        assert np.array_equal(part["tokens"], tokens)
        place = part["locations"].astype(np.int64)
        assert (place[:, 2] <= last - first).all()
        matrix[place[:, 0], place[:, 1], first + place[:, 2]] = part["activations"]
    assert sorted(covered) == list(range(plan.d_sae))
    assert config["n_splits"] == 5
    assert found["activations"] == (expected > 1e-5).sum()
    np.testing.assert_allclose(matrix, np.where(expected > 1e-5, expected, 0), rtol=1e-3, atol=1e-6)
