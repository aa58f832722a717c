"""Two processes that train one coder together come to what one process comes to, and go on from each other's checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import LAYOUTS, SAES, extracted, found_by_two, planned, require_equal, weights

from components.run.checks import check
from components.sae import coder
from components.sae.architectures import architectures
from components.sae.coder import Coder, Column
from components.sae.mesh import Mesh, _kept
from components.settings import UserError
from components.training.beginning import begin
from components.training.job import Training
from components.training.parallel.ranks import joined
from components.training.parallel.shares import take_share
from components.training.settings import RankSettings

NAMES = ("batchtopk", "relu")  # the others: tests/integration/test_parallel.py


@pytest.fixture(scope="module")
def jobs(tiny_tree_in: Callable[[Path], dict], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Training]:
    tree = tiny_tree_in(tmp_path_factory.mktemp("parallel"))
    runs = {name: planned(tree, SAES[name]) for name in NAMES}
    in_parts = planned(tree, {**SAES["batchtopk"], "subtract_decoder_bias": True}, parts=4)
    return extracted(runs | {"batchtopk-in-parts": in_parts})


@pytest.fixture(scope="module")
def found(jobs: dict[str, Training], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return found_by_two(jobs, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [*NAMES, "batchtopk-in-parts"])
def test_two_processes_come_to_the_losses_and_weights_of_one(
    jobs: dict[str, Training], found: dict[str, Any], name: str, layout: str
):
    curves = require_equal(jobs[name], found[f"{name}-{layout}"], layout)
    assert any(point["auxk_loss"] > 0 for point in curves), "dead features are to be revived together, too"


def test_each_process_holds_half_of_parameters_optimizer_and_counters(found: dict[str, Any]):
    whole, share = found["whole"], found["share"]
    assert {name for name in whole if share[name] == whole[name]} == {
        name for name in whole if name.endswith(".b_dec") or name == "weight.weakest" or name.startswith("adam.step.")
    }
    assert all(share[name] in (whole[name] // 2, whole[name]) for name in whole)
    assert sum(share.values()) < 0.51 * sum(whole.values())


def test_continued_by_as_many_it_ends_with_the_same_bits(found: dict[str, Any]):
    assert found["files"] == ["step-0000000020.0-of-2.safetensors", "step-0000000020.1-of-2.safetensors"]
    for again, undisturbed in (("again", "batchtopk-features"), ("in-parts-again", "batchtopk-in-parts-data")):
        assert found[again]["weights_sha256"] == found[undisturbed]["weights_sha256"]
        assert found[again]["curves"] == found[undisturbed]["curves"]


def test_one_process_goes_on_from_the_checkpoint_of_two_and_two_from_that_of_one(
    jobs: dict[str, Training], found: dict[str, Any]
):
    for key, tensor in weights(jobs["batchtopk"], "features").items():
        torch.testing.assert_close(weights(jobs["batchtopk"], "by-one")[key], tensor, rtol=1e-4, atol=1e-5)
    for ours, other in zip(found["by-one"]["curves"], found["batchtopk-features"]["curves"], strict=True):
        assert ours == pytest.approx(other, rel=1e-5, abs=1e-6)


def test_of_equally_strong_features_no_more_are_chosen_than_there_is_place_for():
    """Repeated tokens are equal to the last bit, wherever they are."""
    shares = torch.tensor([[3.0, 2.0, 2.0, 1.0], [2.0, 2.0, 0.0, 3.0], [2.0, 3.0, 2.0, 2.0]])
    every = shares.flatten()
    for count in range(1, len(every) + 1):
        least = every.topk(count).values[-1]
        kept = torch.cat([_kept(share, every, least, count, 4 * rank) for rank, share in enumerate(shares)])
        assert kept.sum() == count
        assert every[kept].min() >= every[~kept].max() if count < len(every) else kept.all()


@pytest.mark.parametrize("name", ["batchtopk", "relu", "jumprelu"])
@pytest.mark.parametrize("width", [12, 13])
def test_shares_begin_with_the_weights_of_the_whole_without_drawing_it_at_once(
    name: str, width: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(coder, "_DRAWN_ENTRIES", 256)
    kind = architectures()[name]
    settings, reads, writes = kind.Settings(d_sae=154), (Column("a", 60),), (Column("b", width),)
    for written in (writes, reads):
        whole = kind(settings, reads, written, 154)
        whole.initialise(3)
        for rank in range(7):
            share, taken = (kind(settings, reads, written, 22) for _ in range(2))
            share.mesh = taken.mesh = Mesh(1, 7, 0, rank, None, None)  # type: ignore[arg-type]
            share.initialise(3)
            take_share(taken, whole)
            for key, value in taken.state_dict().items():
                assert torch.equal(share.state_dict()[key], value), key


def test_shares_begin_from_data_as_the_whole_does():
    kind, column = architectures()["batchtopk"], (Column("a", 12),)
    settings = kind.Settings(d_sae=96, decoder_token_share=0.5, decoder_bias_init="mean", first_density=0.1)
    rows = torch.randn(500, 12, generator=torch.Generator().manual_seed(0))

    def begun(share: Coder) -> Coder:
        share.initialise(3)
        begin(share, 3, lambda: (rows, rows), (rows.mean(dim=0), rows.mean(dim=0)))
        return share

    whole = begun(kind(settings, column, column, 96))
    for rank in range(4):
        share, taken = (kind(settings, column, column, 24) for _ in range(2))
        share.mesh = taken.mesh = Mesh(1, 4, 0, rank, None, None)  # type: ignore[arg-type]
        take_share(taken, whole)
        for key, value in taken.state_dict().items():
            torch.testing.assert_close(begun(share).state_dict()[key], value, rtol=1e-6, atol=1e-6)


def test_more_processes_than_gpus_are_a_sentence(monkeypatch: pytest.MonkeyPatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "16")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with (
        pytest.raises(UserError, match=r"execution\.training: 16 processes on this machine want a GPU each, and it has 8"),
        joined(RankSettings(data_parallel=16), torch.device("cuda")),
    ):
        pass


@pytest.mark.parametrize(
    ("ranks", "sae", "said"),
    [
        ({"feature_parallel": 3}, {}, r"execution\.training\.feature_parallel: 128 features have no equal shares for 3"),
        ({"data_parallel": 3}, {}, r"execution\.training\.data_parallel: a batch of 128 tokens .* for 3 processes"),
        ({"data_parallel": 2}, {"resample_at": [0.5]}, r"sae\.resample_at: accepted with one process"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_before_anything_begins(tiny_tree: dict, ranks: dict, sae: dict, said: str):
    run = planned(tiny_tree, {"architecture": "relu", **sae}, execution={"training": ranks})
    with pytest.raises(UserError, match=said):
        check(run)
