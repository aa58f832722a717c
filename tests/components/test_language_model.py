"""Hook points mean the same place in every architecture, and splicing changes that place alone."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, MistralConfig, Qwen2Config

from components.language_model.hook_points import HookPoint, capture, module_of, parse_hook_point, spliced_logits
from components.language_model.loading import find_model, load_encoder, load_model
from components.language_model.settings import LanguageModelSettings
from components.settings import UserError

LAYERS = 3
COMMON = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 32}
CONFIGS = {
    "gpt2": GPT2Config(vocab_size=50, n_embd=16, n_layer=LAYERS, n_head=2, n_positions=32),
    "gpt_neox": GPTNeoXConfig(**COMMON, max_position_embeddings=32),
    "llama": LlamaConfig(**COMMON, num_key_value_heads=2),
    "mistral": MistralConfig(**COMMON, num_key_value_heads=2),
    "qwen2": Qwen2Config(**COMMON, num_key_value_heads=2),
}


@pytest.fixture(params=sorted(CONFIGS))
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval().requires_grad_(False)


TOKENS = torch.arange(24).reshape(2, 12)


def test_the_residual_stream_is_what_transformers_calls_hidden_states(model):
    states = model(TOKENS, output_hidden_states=True).hidden_states
    points = [HookPoint("resid_pre", layer) for layer in range(LAYERS)]
    captured = capture(model, points, TOKENS)
    for layer, point in enumerate(points):
        torch.testing.assert_close(captured[point], states[layer], rtol=0, atol=0)
    after = capture(model, [HookPoint("resid_post", 0)], TOKENS)
    torch.testing.assert_close(after[HookPoint("resid_post", 0)], states[1], rtol=0, atol=0)


def test_a_block_adds_its_two_sublayers_to_the_residual_stream(model):
    points = [HookPoint(kind, 1) for kind in ("resid_pre", "resid_post", "attn_out", "mlp_out")]
    captured = capture(model, points, TOKENS)
    total = captured[points[0]] + captured[points[2]] + captured[points[3]]
    torch.testing.assert_close(total, captured[points[1]])


def test_the_mlp_input_is_what_the_mlp_maps_to_its_output(model):
    into, out = HookPoint("mlp_in", 1), HookPoint("mlp_out", 1)
    captured = capture(model, [into, out], TOKENS)
    torch.testing.assert_close(module_of(model, out)(captured[into]), captured[out])


def test_the_forward_pass_stops_after_the_last_hook_point(model):
    reached = []
    module_of(model, HookPoint("resid_post", 2)).register_forward_hook(lambda *_: reached.append(True))
    capture(model, [HookPoint("resid_post", 0), HookPoint("mlp_out", 1)], TOKENS)
    assert not reached


@pytest.mark.parametrize("kind", ["resid_pre", "resid_post", "attn_out", "mlp_out", "mlp_in"])
def test_splicing_the_same_activation_changes_nothing_and_another_changes_the_logits(model, kind: str):
    point = HookPoint(kind, 1)
    clean = model(TOKENS).logits
    torch.testing.assert_close(spliced_logits(model, point, lambda x: x.clone(), TOKENS), clean, rtol=0, atol=0)
    changed = spliced_logits(model, point, lambda x: torch.where(torch.arange(12)[:, None] == 6, 0, x), TOKENS)
    torch.testing.assert_close(changed[:, :6], clean[:, :6])
    assert (changed[:, 6:] - clean[:, 6:]).abs().max() > 1e-4
    torch.testing.assert_close(model(TOKENS).logits, clean, rtol=0, atol=0)  # the hook is gone


@pytest.mark.parametrize("name", ["resid_post.3", "resid_post", "resid.1", "resid_post.-1", "mlp_out.x"])
def test_a_hook_point_that_the_model_does_not_have_is_refused(name: str):
    with pytest.raises(UserError, match=r"training\.hook_point.*" + name.replace(".", r"\.")):
        parse_hook_point(name, LAYERS, "training.hook_point")


def test_a_local_folder_loads_and_its_identity_follows_its_content(tiny_model: str):
    source = find_model(LanguageModelSettings(name=tiny_model))
    assert (source.layers, source.width) == (3, 32)
    model = load_model(source, torch.device("cpu"))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert load_encoder(source).encode(["def f(x):"])[0]
    other = find_model(LanguageModelSettings(name=tiny_model, dtype="bfloat16"))
    assert other.identity != source.identity


def test_an_unknown_builtin_and_an_unreachable_hub_name_are_refused():
    with pytest.raises(UserError, match="builtin/stdlib-llama"):
        find_model(LanguageModelSettings(name="builtin/nothing"))
    with pytest.raises(UserError, match=r"language_model\.name.*no/such-model"):
        find_model(LanguageModelSettings(name="no/such-model"))
