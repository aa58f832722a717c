"""Which features persisted, counted again in numpy, one by one; and where a registered version says so."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient
from safetensors.numpy import load_file

from components import steps
from components.evaluation import stability
from components.evaluation.stability import Dictionary, compare, nearest_across
from components.interpretation.browser import STATUSES
from components.interpretation.explanations.table import Explanation, read_explanations, write_explanations
from components.registry.catalogue import compare as compare_versions
from components.registry.gates import Gates
from components.registry.records import Outcome
from components.registry.versions import recorded_stability
from components.run.config import parse_config
from components.run.specification import Specification, resolve
from components.tracking.store import connect


def dictionary(rows: np.ndarray, density: np.ndarray | None = None, weight: np.ndarray | None = None) -> Dictionary:
    ones = np.ones(len(rows))
    return Dictionary(torch.from_numpy(rows).float(), ones if density is None else density, ones if weight is None else weight)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def brute_force(later: Dictionary, earlier: Dictionary) -> dict[tuple[str, int], tuple[str, int]]:
    """Side and feature -> status and nearest, pair by pair in float64."""
    sides = {"version": later, "champion": earlier}
    rows = {side: one.rows.double().numpy() for side, one in sides.items()}
    firing = {side: [i for i in range(len(one.rows)) if one.density[i] > 0] for side, one in sides.items()}

    def nearest(side: str, other: str, i: int) -> int:
        return max(firing[other], key=lambda j: cosine(rows[side][i], rows[other][j]))

    found = {}
    for side, other, near, far in (("version", "champion", "split", "new"), ("champion", "version", "merged", "vanished")):
        for i in firing[side]:
            j = nearest(side, other, i)
            over = cosine(rows[side][i], rows[other][j]) > 0.7
            mutual = nearest(other, side, j) == i
            found[side, i] = ("persisted" if over and mutual else near if over else far, j)
    return found


def related(seed: int, n: int = 60, m: int = 50, d: int = 12) -> tuple[Dictionary, Dictionary]:
    """Rows of the later one that are copies with noise, doubles, and others; some of both silent."""
    random = np.random.default_rng(seed)
    earlier = random.standard_normal((m, d)) * random.uniform(0.5, 2, (m, 1))
    later = np.concatenate([earlier[:25], earlier[:10], random.standard_normal((n - 35, d))])
    later += random.standard_normal(later.shape) * random.choice([0.05, 0.4, 1.0], (n, 1))
    return tuple(
        dictionary(rows, random.uniform(0, 1, len(rows)) * (random.random(len(rows)) < 0.8), random.uniform(0, 3, len(rows)))
        for rows in (later, earlier)
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("entries", [2**25, 90, 1])
def test_every_status_and_share_agrees_with_pair_by_pair(seed: int, entries: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stability, "_ENTRIES_AT_ONCE", entries)
    later, earlier = related(seed)
    expected = brute_force(later, earlier)
    found, table = compare(later, earlier)
    rows = table.to_pylist()
    assert {(row["side"], row["feature"]): (row["status"], row["nearest"]) for row in rows} == expected
    for row in rows:
        own, other = (later, earlier) if row["side"] == "version" else (earlier, later)
        wanted = cosine(own.rows[row["feature"]].double().numpy(), other.rows[row["nearest"]].double().numpy())
        assert row["cosine"] == pytest.approx(wanted, abs=1e-5)
    statuses = [status for status, _ in expected.values()]
    assert {name: found[name] for name in ("split", "new", "merged", "vanished")} == {
        name: statuses.count(name) for name in ("split", "new", "merged", "vanished")
    }
    assert min(found[name] for name in stability.COUNTS) > 0  # each kind is there
    assert 2 * found["persisted"] == statuses.count("persisted")
    for side, one, name in (("version", later, "persisted_share"), ("champion", earlier, "kept_share")):
        own = [i for (which, i) in expected if which == side]
        kept = [i for i in own if expected[side, i][0] == "persisted"]
        assert found[name] == pytest.approx(len(kept) / len(own))
        assert found[f"{name}_by_reconstruction"] == pytest.approx(sum(one.weight[kept]) / sum(one.weight[own]))
    assert (found["firing"], found["champion_firing"]) == ((later.density > 0).sum(), (earlier.density > 0).sum())


def test_a_coder_has_all_its_own_features_whatever_their_order_and_length():
    random = np.random.default_rng(0)
    rows = random.standard_normal((300, 16))
    order = random.permutation(300)
    found, table = compare(dictionary(rows[order] * 3), dictionary(rows))
    assert found["persisted_share"] == found["kept_share"] == found["kept_share_by_reconstruction"] == 1.0
    version = [row for row in table.to_pylist() if row["side"] == "version"]
    assert [row["nearest"] for row in version] == order.tolist()


def test_a_feature_in_two_has_split_and_two_in_one_have_merged():
    plane = np.eye(6)
    near = np.array([0.9, 0.436, 0, 0, 0, 0])
    two, one = dictionary(np.stack([plane[0], near, plane[5]])), dictionary(np.stack([plane[0], plane[4]]))
    apart, _ = compare(two, one)
    assert {name: apart[name] for name in stability.COUNTS} == {
        "persisted": 1, "split": 1, "new": 1, "merged": 0, "vanished": 1,
    }  # fmt: skip
    together, _ = compare(one, two)
    assert {name: together[name] for name in stability.COUNTS} == {
        "persisted": 1, "split": 0, "new": 1, "merged": 1, "vanished": 1,
    }  # fmt: skip


def test_the_threshold_is_beyond_chance_and_not_reached_by_it():
    at = lambda value: dictionary(np.array([[value, (1 - value**2) ** 0.5]]))  # noqa: E731
    first = dictionary(np.array([[1.0, 0.0]]))
    assert compare(at(0.71), first)[0]["persisted"] == 1
    assert compare(at(0.69), first)[0]["persisted"] == 0


def test_where_nothing_fires_nothing_is_shared():
    rows = np.eye(3)
    silent = dictionary(rows, density=np.zeros(3))
    found, table = compare(silent, dictionary(rows))
    assert (found["persisted_share"], found["kept_share"], found["vanished"]) == (None, 0.0, 3)
    assert table["nearest"].null_count == 3
    nothing, empty = compare(silent, silent)
    assert (nothing["kept_share"], empty.num_rows) == (None, 0)


def test_no_more_cosines_than_the_bound_stand_in_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stability, "_ENTRIES_AT_ONCE", 1_000)
    sizes = []
    product = torch.Tensor.__matmul__

    def watched(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        found = product(first, second)
        sizes.append(found.numel())
        return found

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    nearest_across(torch.randn(333, 4), torch.randn(250, 4))
    assert max(sizes) <= 1_000
    assert sum(sizes) == 333 * 250


# In the registry


def registered(tree: dict, **changes: object) -> tuple[Specification, Outcome]:
    run = resolve(parse_config({**tree, **changes}))
    steps.extract(run)
    with steps.tracked(run, {}) as open_run:
        steps.train(run, open_run.add_points)
        steps.evaluate(run)
        return run, steps.register(run, open_run)


def test_a_version_says_what_it_has_of_the_champion(tiny_tree: dict, tmp_path: Path):
    tiny_tree["training"] |= {"tokens": 10_000, "learning_rate": 1e-2}
    first, earlier = registered(tiny_tree)
    later_run, later = registered(tiny_tree, seed=1, corpus={**tiny_tree["corpus"], "train_tokens": 5_000})
    said = [
        Explanation(feature=number, explanation=f"said of {number}", detection=0.9, fuzzing=0.8, explainer="m")
        for number in range(64)
    ]
    write_explanations(first.sae_url, first.training_record().weights_sha256, said)
    steps.interpret(later_run)
    client = connect(first.config.tracking, first.config.storage.root)
    assert isinstance(client, MlflowClient)
    name = first.registered_model
    assert recorded_stability(client.get_model_version(name, "1")) is None

    found = recorded_stability(client.get_model_version(name, "2"))
    assert found["champion"] == "1"
    read = {}
    for key, run in (("later", later_run), ("earlier", first)):
        rows = load_file(Path(run.sae_url, "sae_weights.safetensors"))["W_dec"]
        features = pq.read_table(Path(run.sae_url, "features.parquet"))
        density, mean = features["density"].to_numpy(), features["mean_activation"].to_numpy()
        read[key] = dictionary(rows, density, density * mean)
    expected = brute_force(read["later"], read["earlier"])
    kept = [i for (side, i), (status, _) in expected.items() if side == "champion" and status == "persisted"]
    own = [i for (side, i) in expected if side == "champion"]
    assert found["persisted"] == len(kept)
    assert found["kept_share"] == pytest.approx(len(kept) / len(own))
    weight = read["earlier"].weight
    assert found["kept_share_by_reconstruction"] == pytest.approx(weight[kept].sum() / weight[own].sum(), rel=1e-5)

    metrics = client.get_run(later.mlflow_run).data.metrics
    assert metrics["stability/kept_share"] == pytest.approx(found["kept_share"])
    assert metrics["stability/vanished"] == found["vanished"]
    table = pq.read_table(client.download_artifacts(later.mlflow_run, "stability/stability.parquet", str(tmp_path)))
    assert {(row["side"], row["feature"]): (row["status"], row["nearest"]) for row in table.to_pylist()} == expected
    assert json.loads(Path(client.download_artifacts(later.mlflow_run, "stability/stability.json")).read_text()) == found
    card = client.get_model_version(name, "2").description
    assert f"| persisted | {found['persisted']} ({found['persisted_share']:.1%}) | {found['persisted']} (" in card
    assert "training started from: new weights" in card
    assert "Features against" not in client.get_model_version(name, "1").description
    compared = compare_versions(client, [f"{name}/1", f"{name}/2"], Gates())
    assert compared["stability"] == [None, found]
    assert earlier.alias == "champion"

    # the same in the browser and in `sae features show`
    page = (Path(later_run.sae_url) / "browser" / "index.js").read_text()
    shown = json.loads(page.removeprefix("index(").removesuffix(");"))
    assert shown["compared"]["with"] == f"version 1 of {name}"
    assert shown["compared"]["counts"] == {key: found[key] for key in ("persisted", "split", "new", "merged", "vanished")}
    statuses = [STATUSES[status] for status in base64.b64decode(shown["statuses"])]
    assert statuses == [expected.get(("version", feature), ("", None))[0] for feature in range(shown["count"])]
    gone = {i: status for (side, i), (status, _) in expected.items() if side == "champion" and status in ("vanished", "merged")}
    assert {row[0]: row[1] for row in shown["compared"]["gone"]} == gone
    assert shown["compared"]["browser"] == f"../../{Path(first.sae_url).name}/browser/index.html"
    match = steps.show_feature(later_run, kept_here := next(i for (side, i) in expected if side == "version"))["match"]
    assert (match["status"], match["nearest"]) == expected["version", kept_here]
    own = read_explanations(later_run.sae_url, later_run.training_record().weights_sha256)
    persisted = {i: near for (side, i), (status, near) in expected.items() if side == "version" and status == "persisted"}
    assert {feature: one.explanation for feature, one in own.items()} == {i: f"said of {near}" for i, near in persisted.items()}
    assert {one.carried_from for one in own.values()} == {"version 1"}


def test_asked_again_a_champion_is_not_compared_with_itself(tiny_tree: dict):
    tiny_tree["training"] |= {"tokens": 10_000}
    run, first = registered(tiny_tree)
    assert first.alias == "champion"
    again = registered(tiny_tree)[1]
    assert again.mlflow_run == first.mlflow_run
    client = connect(run.config.tracking, run.config.storage.root)
    assert not [name for name in client.get_run(first.mlflow_run).data.metrics if name.startswith("stability/")]
