"""Features turned up or down: at the places that were asked for, with a cache and without, and as a model of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_contrast import Planted
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from components.interpretation import steered_model
from components.interpretation.steering import Edit, clamped, continued, edited, steered
from components.language_model.hook_points import capture, parse_hook_point
from components.settings import UserError
from components.steps.steering import where_of

CPU = torch.device("cpu")
POINT = parse_hook_point("resid_post.0")
IDS = [3, 17, 90, 33, 48, 77]


def small(kind: str, config: type, **changes: int) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    if config is GPT2Config:
        sizes = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    made = {"llama": LlamaForCausalLM, "gpt2": GPT2LMHeadModel, "qwen2": Qwen2ForCausalLM}[kind]
    return made(config(**sizes, initializer_range=0.3, bos_token_id=0, eos_token_id=95)).eval()


@pytest.fixture(scope="module")
def llama() -> torch.nn.Module:
    return small("llama", LlamaConfig).requires_grad_(False)


@pytest.fixture(scope="module")
def coder() -> Planted:
    return Planted(torch.eye(32)[:3])


def activation(model: torch.nn.Module) -> torch.Tensor:
    return capture(model, [POINT], {"input_ids": torch.tensor([IDS])})[POINT][0]


def test_each_kind_of_edit_changes_the_feature_as_it_says_and_nothing_else(coder: Planted):
    x = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0)) * 3
    now = coder.reconstruct(x[0])[0].dense()
    assert (now[:, 5] > 0).any()
    for kind, value, wanted in (
        ("clamp", 4.0, 4.0 - now[:, 5]),
        ("clamp", 0.0, -now[:, 5]),
        ("scale", 3.0, 2 * now[:, 5]),
        ("scale", 0.0, -now[:, 5]),
        ("add", 4.0, torch.full((9,), 4.0)),
    ):
        changed = edited(coder, [Edit(5, value, kind)])(x, x)[0] - x[0]
        torch.testing.assert_close(changed, wanted[:, None] * coder.W_dec[5], atol=1e-5, rtol=1e-5)
    two = edited(coder, [Edit(5, 1.0), Edit(6, 2.0, "scale")])(x, x)[0] - x[0]
    alone = [edited(coder, [edit])(x, x)[0] - x[0] for edit in (Edit(5, 1.0), Edit(6, 2.0, "scale"))]
    torch.testing.assert_close(two, alone[0] + alone[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("positions", "expected"), [("all", range(6)), ("prompt", range(4)), ("new", (4, 5)), ("0,3", (0, 3))])
def test_only_the_chosen_positions_are_changed(llama, coder: Planted, positions: str, expected):
    before = activation(llama)
    with steered(llama, POINT, coder, [Edit(5, 2.5, "add")], where_of(positions, 4)):
        changed = activation(llama) - before
    wanted = torch.zeros(6, 32)
    wanted[list(expected)] = 2.5 * coder.W_dec[5]
    torch.testing.assert_close(changed, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(activation(llama), before)  # closed, it is as it was


@pytest.mark.parametrize("positions", ["all", "prompt", "new", "2,7"])
def test_generating_with_a_cache_gives_what_running_it_all_anew_gives(llama, coder: Planted, positions: str):
    edit, where = [Edit(5, 40.0)], where_of(positions, len(IDS))
    slow = continued(llama, POINT, edited(coder, edit, where), IDS, 8, CPU)
    with steered(llama, POINT, coder, edit, where):
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
        fast = llama.generate(torch.tensor([IDS, IDS]), attention_mask=torch.ones(2, 6, dtype=torch.long), **options)
    assert fast[:, len(IDS) :].tolist() == [slow, slow]
    assert slow != continued(llama, POINT, lambda *_: None, IDS, 8, CPU) or positions == "2,7"
    with pytest.raises(UserError, match="--positions: '1,x' is not accepted"):
        where_of("1,x", 4)


@pytest.mark.parametrize(("kind", "config"), [("llama", LlamaConfig), ("gpt2", GPT2Config)])
@pytest.mark.parametrize("place", ["resid_post.0", "resid_pre.1", "mlp_out.1"])
def test_the_saved_model_does_what_the_hook_does(kind: str, config: type, place: str, tmp_path: Path, coder: Planted):
    model, point = small(kind, config).requires_grad_(False), parse_hook_point(place)
    tokens, edit = torch.tensor([IDS]), Edit(5, 3.0, "add")
    made = steered_model.with_bias(model, point, 3.0 * coder.W_dec[5])
    made.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    before = model(tokens).logits
    with steered(model, point, coder, [edit]):
        wanted = model(tokens).logits
    torch.testing.assert_close(loaded(tokens).logits, wanted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(before, wanted, atol=1e-2)
    torch.testing.assert_close(model(tokens).logits, before)  # the copy was changed alone


def test_a_model_that_cannot_hold_the_edit_says_so(llama, coder: Planted):
    for model, place, said in (
        (small("qwen2", Qwen2Config), "resid_post.0", "has no bias that could hold the edit"),
        (llama, "attn_out.0", "nothing before 'attn_out.0' adds to it"),
        (llama, "resid_pre.0", "nothing before 'resid_pre.0' adds to it"),
    ):
        with pytest.raises(UserError, match=said):
            steered_model.with_bias(model, parse_hook_point(place), coder.W_dec[5])


def test_clamping_is_an_edit(coder: Planted):
    x = torch.randn(2, 4, 32)
    torch.testing.assert_close(clamped(coder, 6, 2.0)(x, x), edited(coder, [Edit(6, 2.0, "clamp")])(x, x))
