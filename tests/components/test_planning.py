"""The plan of a run that does not fit here: against closed forms on paper, what is on the disk, and refusals."""

from __future__ import annotations

import math

import pytest

from components import steps, storage
from components.activations.dataset.shuffle import LARGEST_UPLOAD
from components.planning.memory import CONTEXT, DENSE_COPIES, rank_memory
from components.planning.place import Place, parse_model, parse_place
from components.planning.plan import USABLE, plan
from components.planning.requests import requests, shuffle_of
from components.planning.shape import Shape, shape_of, shape_on_paper
from components.run.config import parse_config
from components.run.specification import resolve
from components.settings import UserError

LLAMA_70B = ["parameters=70.6e9", "layers=80", "width=8192", "dtype=bfloat16"]


def on_paper(**changes: dict) -> Shape:
    """The paper's largest SAE at the middle of a 70B model, on 10^10 tokens."""
    tree = {
        "corpus": {"source": "files", "paths": ["x.jsonl"], "train_tokens": 10**10, "context_length": 1024},
        "language_model": {"name": "a-70b"},
        "activations": {"hook_points": ["resid_post.39"], "rows_per_shard": 1_048_576},
        "sae": {"architecture": "relu", "d_sae": 34_000_000},
        "training": {"tokens": 10**10, "batch_size": 4096, "autocast": "bfloat16"},
    }
    for section, fields in changes.items():
        tree[section] = {**tree[section], **fields}
    return shape_on_paper(parse_config(tree), parse_model(LLAMA_70B))


def test_34_million_features_are_sharded_as_on_paper():
    found = plan(on_paper(), Place(gpu="h100"))
    features, width, batch = 34_000_000, 8192, 4096
    # W_enc, W_dec, b_enc; weights, gradients, two moments; b_dec is on every rank
    state = features * (2 * width + 1) * 16
    activations = features * batch * 4 * DENSE_COPIES["relu"]
    everywhere = width * 16 + batch * width * 6 * 4 + CONTEXT
    assert found.ranks_needed == math.ceil((state + activations) / (USABLE * 80e9 - everywhere))
    assert found.memory.peak == pytest.approx((state + activations) / found.ranks + everywhere, rel=1e-4)
    assert found.memory.parameters * found.ranks == pytest.approx(2 * 34e6 * 8192 * 4, rel=1e-3)


def test_ten_thousand_million_tokens_of_a_70b_model_are_as_on_paper():
    prices = ["gpu_hour=2", "gb_month=0.02", "put_1000=0.005", "get_1000=0.0004", "extraction_workers=16", "utilisation=0.4"]
    found = plan(on_paper(), parse_place(prices))
    assert found.dataset_bytes == 10**10 * (2 * 8192 + 16)
    assert found.gpus_per_worker == 3  # 141 GB of weights and a tenth, of 74 GB each
    seconds = 2 * 70.6e9 * 0.5 * 1e10 / (989e12 * 0.4)
    assert found.extraction.gpu_hours == pytest.approx(seconds / 3600)
    assert found.extraction.hours == pytest.approx(seconds / 3600 / 48)
    seconds = 10 * 8192 * 34e6 * 1e10 / (989e12 * 0.4)
    assert found.training.gpu_hours == pytest.approx(seconds / 3600, rel=1e-3)
    assert found.stored_cost is not None
    assert found.stored_cost["storage"] == pytest.approx(0.02 * 164_000)
    assert found.stored_cost["training"] == pytest.approx(2 * seconds / 3600, rel=1e-3)
    assert found.online_cost is not None
    assert found.online_cost["storage"] < found.stored_cost["storage"] / 20
    assert any("assumed, 40% of 989 TFLOP/s" in line for line in found.said)


def test_a_throughput_that_was_measured_takes_the_place_of_the_data_sheet():
    given = parse_place(["training_tokens_per_second=20000", "extraction_tokens_per_second=500", "extraction_workers=10"])
    found = plan(on_paper(), given)
    assert found.training.hours == pytest.approx(1e10 / 20_000 / 3600)
    assert found.extraction.hours == pytest.approx(1e10 / 5_000 / 3600)
    assert found.online_workers == 40
    assert any("as you measured" in line for line in found.said)


@pytest.mark.parametrize(
    ("changes", "place", "parts"),
    [
        ({}, ["ranks=64"], ["ranks: a rank of 64", "at least 1", "ranks", "sae.d_sae", "34,000,000"]),
        ({"training": {"batch_size": 4_000_000}}, [], ["training.batch_size: 4,000,000", "make it smaller"]),
        ({}, ["disk_tb=100"], ["disk_tb", "164 TB", "corpus.train_tokens"]),
        ({"activations": {"rows_per_group": 500_000}}, [], ["activations.rows_per_group: 500,000", "Parquet page"]),
        ({"activations": {"hook_points": ["model.layers.3.mlp"]}}, [], ["model.layers.3.mlp", "resid_post", "0 to 79"]),
        ({"activations": {"hook_points": ["resid_post.80"]}}, [], ["resid_post.80", "0 to 79"]),
        ({}, ["gpu=b7"], ["gpu: 'b7'", "h100"]),
        ({}, ["gpus=7"], ["--on", "gpus=7", "ranks"]),
        ({}, ["ranks=-1"], ["--on", "ranks", "-1"]),
    ],
)
def test_what_cannot_be_is_refused_naming_what_to_change(changes: dict, place: list[str], parts: list[str]):
    with pytest.raises(UserError) as error:
        plan(on_paper(**changes), parse_place(place))
    for part in parts:
        assert part in str(error.value)


def test_what_a_refusal_advises_fits():
    shape = on_paper()
    needed = plan(shape, Place()).ranks_needed
    assert plan(shape, Place(ranks=needed)).memory.peak <= USABLE * 80e9
    with pytest.raises(UserError, match=f"at least {needed} ranks"):
        plan(shape, Place(ranks=needed - 1))


def test_a_share_of_the_features_is_a_share_of_the_memory():
    shape = on_paper()
    one, two = rank_memory(shape, True), rank_memory(shape, True, 2)
    assert two.parameters == pytest.approx(one.parameters / 2, rel=1e-6)
    assert two.step == pytest.approx(one.step / 2, rel=1e-3)


def test_no_file_is_planned_that_an_upload_does_not_hold():
    for tokens in (10**9, 10**10, 10**11):
        shape = on_paper(corpus={"train_tokens": tokens})
        assert shuffle_of(shape).largest <= LARGEST_UPLOAD
        assert requests(shape).puts > shape.stored // shape.activations.rows_per_shard


def test_the_bytes_on_disk_are_those_of_the_plan(tiny_tree: dict):
    tiny_tree["activations"] = {"hook_points": ["resid_post.0", "mlp_out.1"], "dtype": "float32"}
    run = resolve(parse_config(tiny_tree))
    steps.extract(run)
    shape = shape_of(run)
    found = [path for path in storage.local_path(run.dataset_url).iterdir() if path.suffix == ".parquet"]
    assert shape.exact
    assert sum(path.stat().st_size for path in found) == pytest.approx(shape.bytes, rel=0.02)
    assert len(found) == plan(shape, Place()).shards
