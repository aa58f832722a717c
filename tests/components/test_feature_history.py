"""What a feature was in the versions before: three trainings, each compared with the champion of its time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.numpy import load_file
from typer.testing import CliRunner

from components import steps, storage
from components.evaluation import stability
from components.interpretation.explanations.table import Explanation, write_explanations
from components.run.config import parse_config
from components.run.specification import Specification, resolve
from components.steps.interpretation import feature_data
from flows.cli import app


@pytest.fixture(scope="module")
def versions(tiny_tree_in: Callable[[Path], dict], tmp_path_factory: pytest.TempPathFactory) -> list[Specification]:
    """What are versions 1 and 2, champions in their turn, and what would be version 3, each trained longer; of the first
    every feature is explained."""
    tree = tiny_tree_in(tmp_path_factory.mktemp("versions"))
    Path(tree["tracking"]["gates"]).write_text("evaluation_tokens: 100\nchampion: {must_improve: false}\n")
    tree["interpretation"] = {"tokens": 700, "examples": 2, "drawn": 5, "logits": 4}
    tree["evaluation"] = {"tokens": 900, "reference_tokens": 1_000, "baselines": []}
    runs = []
    for tokens in (14_000, 17_000, 20_000):
        tree["training"]["tokens"] = tokens
        run = resolve(parse_config(tree))
        for step in (steps.extract, steps.train, steps.evaluate, steps.interpret):
            step(run)
        if not runs:
            said = [
                Explanation(feature=feature, explanation=f"meaning {feature}", detection=0.9, fuzzing=None, explainer="m")
                for feature in range(64)
            ]
            write_explanations(run.sae_url, run.training_record().weights_sha256, said)
        runs.append(run)
        if len(runs) < 3:
            with steps.tracked(run, {}) as tracked:
                outcome = steps.register(run, tracked)
            assert outcome.alias == "champion"
    return runs


def nearest(later: Specification, earlier: Specification) -> dict[int, tuple[int, float, bool]]:
    """Of each feature that fires the nearest one there, their cosine, and whether each is the other's nearest."""
    sides = []
    for run in (later, earlier):
        rows = load_file(Path(run.sae_url, "sae_weights.safetensors"))["W_dec"].astype(np.float64)
        density = pq.read_table(Path(run.sae_url, "features.parquet"))["density"].to_numpy()
        sides.append((rows / np.linalg.norm(rows, axis=1, keepdims=True), density > 0))
    (ours, here), (theirs, there) = sides
    cosines = np.where(here[:, None] & there[None], ours @ theirs.T, -2.0)
    best, back = cosines.argmax(axis=1), cosines.argmax(axis=0)
    return {
        feature: (int(best[feature]), float(cosines[feature, best[feature]]), back[best[feature]] == feature)
        for feature in np.flatnonzero(here).tolist()
    }


def test_a_persisted_feature_shows_its_partners_in_both_versions_before(versions: list[Specification]):
    first, second, third = versions
    to_second, to_first = nearest(third, second), nearest(second, first)
    densities = [pq.read_table(Path(run.sae_url, "features.parquet"))["density"].to_pylist() for run in versions]
    data, through = feature_data(third), 0
    for feature in range(third.d_sae):
        rows = data.feature(feature)["history"]
        assert [row["version"] for row in rows] == ["2", "1"][: len(rows)]
        at: int | None = feature
        for row, (links, density) in zip(rows, ((to_second, densities[1]), (to_first, densities[0])), strict=False):
            there, cosine, mutual = links[at]
            if cosine <= stability.SAME_COSINE:
                assert (row["status"], row["feature"], row["cosine"], row["density"]) == ("new", None, None, None)
                at = None
                break
            assert row["status"] == ("persisted" if mutual else "split")
            assert row["feature"] == there
            assert row["cosine"] == pytest.approx(cosine, abs=1e-3)
            assert row["density"] == pytest.approx(density[there], rel=1e-3)
            at = there
        else:
            assert len(rows) == (2 if feature in to_second else 0)
            through += len(rows) == 2
        if at is not None and len(rows) == 2:
            assert rows[1]["explanation"] == f"meaning {at}"
            if rows[1]["status"] == "persisted":  # version 2 took it over
                assert rows[0]["explanation"] == rows[1]["explanation"]
    assert through > 20


def test_the_history_is_on_the_page_and_in_the_terminal(versions: list[Specification], tmp_path: Path):
    third = versions[-1]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(third.config.model_dump(mode="json", exclude_unset=True)))
    data = feature_data(third)
    feature = next(number for number in range(64) if len(data.feature(number)["history"]) == 2)
    rows = data.feature(feature)["history"]

    def shown(*options: str) -> str:
        result = CliRunner().invoke(app, ["features", "show", str(tmp_path / "run.yaml"), str(feature), *options])
        assert result.exit_code == 0, result.output
        return result.stdout

    assert json.loads(shown("--json"))["history"] == rows
    assert "earlier versions" in shown()
    assert f"meaning {rows[1]['feature']}" in shown()
    folder = Path(third.sae_url, "browser")
    index = json.loads(re.fullmatch(r"index\((.*)\);", (folder / "index.js").read_text(), re.S)[1])
    assert list(index["compared"]["versions"]) == ["2", "1"]
    for address in index["compared"]["versions"].values():
        assert (folder / address).is_file()
    text = (folder / "blocks" / f"{feature // index['block']:05d}.js").read_text()
    block = json.loads(re.fullmatch(r"block\(\d+, (.*)\);", text, re.S)[1])
    assert block[feature % index["block"]]["history"] == rows


def test_a_history_ends_where_a_version_is_no_longer_there(versions: list[Specification]):
    _, second, third = versions
    storage.delete(second.sae_url)
    data = feature_data(third)
    found = [data.feature(feature)["history"] for feature in range(third.d_sae)]
    assert {len(rows) for rows in found} <= {0, 1}
    assert any(rows and rows[0]["density"] is not None and rows[0]["explanation"] == "" for rows in found)
