"""Hook points mean the same place in every architecture, and splicing changes that place alone."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from components.language_model.architectures import model_class
from components.language_model.hook_points import (
    HookPoint,
    capture,
    depth,
    expand_hook_points,
    locate,
    parse_hook_point,
    spliced_logits,
)
from components.language_model.loading import find_model, kept_model, load_encoder, load_model
from components.language_model.settings import LanguageModelSettings
from components.language_model.source import ModelSource, _folder_digest
from components.settings import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = 3
SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 32}
GROUPED = {**SIZES, "num_key_value_heads": 1, "head_dim": 8}
CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", {"vocab_size": 50, "n_embd": 16, "n_layer": LAYERS, "n_head": 2, "n_positions": 32}),
    "gpt_neox": ("GPTNeoXConfig", {**SIZES, "max_position_embeddings": 32}),
    "gpt_neox_serial": ("GPTNeoXConfig", {**SIZES, "max_position_embeddings": 32, "use_parallel_residual": False}),
    "llama": ("LlamaConfig", GROUPED),
    "mistral": ("MistralConfig", GROUPED),
    "mixtral": ("MixtralConfig", {**GROUPED, "num_local_experts": 4}),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", GROUPED),
    "gemma2": ("Gemma2Config", GROUPED),
    "gemma3": ("Gemma3TextConfig", GROUPED),
    "olmo2": ("Olmo2Config", SIZES),
    "glm4": ("Glm4Config", {**GROUPED, "pad_token_id": 0}),
    "phi": ("PhiConfig", SIZES),
    "opt": ("OPTConfig", {**SIZES, "ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 32}),
    "falcon": ("FalconConfig", {**SIZES, "alibi": False}),
    "falcon_new": ("FalconConfig", {**SIZES, "alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "gptj": ("GPTJConfig", {"vocab_size": 50, "n_embd": 16, "n_layer": LAYERS, "n_head": 2, "rotary_dim": 4}),
    "mamba": ("MambaConfig", {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": LAYERS, "state_size": 4}),
}
VISION: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTConfig", {**SIZES, "image_size": 32, "patch_size": 8}),
    "dinov2": ("Dinov2Config", {**SIZES, "image_size": 32, "patch_size": 8, "mlp_ratio": 2, "layerscale_value": 0.5}),
    "clip": ("CLIPVisionConfig", {**SIZES, "image_size": 32, "patch_size": 8}),
    "siglip": ("SiglipVisionConfig", {**SIZES, "image_size": 32, "patch_size": 8}),
    "deit": ("DeiTConfig", {**SIZES, "image_size": 32, "patch_size": 8}),
}
TOKENS = torch.arange(24).reshape(2, 12)
IDS = {"input_ids": TOKENS}


def config_of(entry: tuple[str, dict[str, Any]]) -> Any:
    sizes = {key: value for key, value in entry[1].items() if "Vision" not in entry[0] or key != "vocab_size"}
    return getattr(transformers, entry[0])(**sizes)


def random_model(entry: tuple[str, dict[str, Any]]) -> nn.Module:
    torch.manual_seed(0)
    config = config_of(entry)
    model = model_class(config).from_config(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name.lower() or "ln_" in name:
            parameter.add_(torch.randn_like(parameter) * 0.3)  # a norm that is the identity would hide a wrong place
        elif parameter.ndim > 1:
            parameter.mul_(5)
    return model


@pytest.fixture(scope="module", params=CAUSAL)
def named_model(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    return request.param, random_model(CAUSAL[request.param])


@pytest.fixture
def model(named_model: tuple[str, nn.Module]) -> nn.Module:
    return named_model[1]


class Source:
    """As much of a model source as names need: a skeleton."""

    def __init__(self, config: Any) -> None:
        with torch.device("meta"):
            self.skeleton = model_class(config).from_config(config, dtype=torch.bfloat16, attn_implementation="eager")


def sublayers(model: nn.Module, layer: int = 1) -> list[HookPoint]:
    kinds = ("attn_out", "mlp_out", "mixer_out")
    return [HookPoint(kind, layer) for kind in kinds if has(model, HookPoint(kind, layer))]


def has(model: nn.Module, point: HookPoint) -> bool:
    try:
        locate(model, point)
    except UserError:
        return False
    return True


def test_the_residual_stream_is_what_transformers_calls_hidden_states(named_model):
    name, model = named_model
    states = model(TOKENS, output_hidden_states=True, use_cache=False).hidden_states
    if name == "mamba":  # it lists outputs alone
        states = (model.get_input_embeddings()(TOKENS), *states)
    points = [HookPoint("resid_pre", layer) for layer in range(LAYERS)]
    captured = capture(model, points, IDS)
    for layer, point in enumerate(points):
        torch.testing.assert_close(captured[point], states[layer], rtol=0, atol=0)
    after = capture(model, [HookPoint("resid_post", 0)], IDS)
    torch.testing.assert_close(after[HookPoint("resid_post", 0)], states[1], rtol=0, atol=0)


def test_a_block_adds_its_sublayers_to_the_residual_stream(named_model):
    name, model = named_model
    pre, post, parts = HookPoint("resid_pre", 1), HookPoint("resid_post", 1), sublayers(model)
    assert len(parts) == (1 if name == "mamba" else 2)
    captured = capture(model, [pre, post, *parts], IDS)
    torch.testing.assert_close(sum((captured[part] for part in parts), captured[pre]), captured[post])
    assert all(captured[part].abs().max() > 1e-3 for part in parts)


def test_the_mlp_input_is_what_the_mlp_maps_to_its_output(named_model):
    name, model = named_model
    if name == "mamba":
        return
    into = HookPoint("mlp_in", 1)
    captured = capture(model, [into, HookPoint("mlp_out", 1)], IDS)
    block = locate(model, HookPoint("resid_pre", 1))[0]
    mlp = nn.Sequential(block.fc1, block.activation_fn, block.fc2) if name == "opt" else block.mlp
    out = mlp(captured[into])
    for norm in ("post_feedforward_layernorm", "post_mlp_layernorm"):
        out = getattr(block, norm, lambda x: x)(out)
    torch.testing.assert_close(out, captured[HookPoint("mlp_out", 1)])


def test_the_forward_pass_stops_after_the_last_hook_point(model):
    reached = []
    handle = locate(model, HookPoint("resid_post", 2))[0].register_forward_hook(lambda *_: reached.append(True))
    capture(model, [HookPoint("resid_post", 0), sublayers(model)[-1]], IDS)
    handle.remove()
    assert not reached


def test_splicing_the_same_activation_changes_nothing_and_another_changes_the_logits(model):
    clean = model(TOKENS, use_cache=False).logits
    kinds = [HookPoint(kind, 1) for kind in ("resid_pre", "resid_post", "mlp_in")]
    for point in [*(point for point in kinds if has(model, point)), *sublayers(model)]:
        torch.testing.assert_close(spliced_logits(model, point, lambda x: x.clone(), TOKENS), clean, rtol=0, atol=0)
        changed = spliced_logits(model, point, lambda x: torch.where(torch.arange(12)[:, None] == 6, 0, x), TOKENS)
        torch.testing.assert_close(changed[:, :6], clean[:, :6])
        assert (changed[:, 6:] - clean[:, 6:]).abs().max() > 1e-4, point
    torch.testing.assert_close(model(TOKENS, use_cache=False).logits, clean, rtol=0, atol=0)  # the hooks are gone


def test_widths_are_those_of_the_captured_activations_without_any_weight(named_model, tmp_path):
    model = named_model[1]
    model.save_pretrained(tmp_path)
    source = find_model(LanguageModelSettings(name=str(tmp_path)))
    linear = next(path for path, module in model.named_modules() if ".1." in path and isinstance(module, nn.Linear | Conv1D))
    names = ["resid_pre.*", "resid_post.1", linear, f"{linear}:in"]
    points = [*expand_hook_points(names, source, "field"), *sublayers(model)]
    captured = capture(model, points, IDS)
    assert source.widths(points) == {point: captured[point].shape[-1] for point in points}
    assert all(activation.shape[:2] == (2, 12) for activation in captured.values())
    assert all(parameter.is_meta for parameter in source.skeleton.parameters())
    assert source.family == "causal"


@pytest.fixture(scope="module", params=VISION)
def vision_model(request: pytest.FixtureRequest) -> nn.Module:
    return random_model(VISION[request.param])


def test_a_vision_transformers_residual_stream_and_its_sublayers(vision_model):
    pixels = torch.randn(2, 3, 32, 32)
    states = vision_model(pixels, output_hidden_states=True).hidden_states
    pre, post, into = (HookPoint(kind, 1) for kind in ("resid_pre", "resid_post", "mlp_in"))
    parts = sublayers(vision_model)
    captured = capture(vision_model, [pre, post, into, *parts], {"pixel_values": pixels})
    torch.testing.assert_close(captured[pre], states[1], rtol=0, atol=0)
    torch.testing.assert_close(captured[post], states[2], rtol=0, atol=0)
    torch.testing.assert_close(sum((captured[part] for part in parts), captured[pre]), captured[post])
    assert [part.kind for part in parts] == ["attn_out", "mlp_out"]
    assert captured[into].shape == captured[pre].shape


def test_in_bert_a_norm_follows_each_sum():
    model = random_model(("BertConfig", {**SIZES, "max_position_embeddings": 32}))
    states = model(TOKENS, output_hidden_states=True).hidden_states
    points = [HookPoint(kind, 1) for kind in ("resid_pre", "attn_out", "mlp_in", "mlp_out", "resid_post")]
    pre, attention, middle, mlp, post = capture(model, points, IDS).values()
    block = model.encoder.layer[1]
    torch.testing.assert_close(pre, states[1], rtol=0, atol=0)
    torch.testing.assert_close(block.attention.output.LayerNorm(pre + attention), middle)
    torch.testing.assert_close(block.output.LayerNorm(middle + mlp), post)
    torch.testing.assert_close(post, states[2], rtol=0, atol=0)


LLAMA = Source(config_of(CAUSAL["llama"]))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["resid_post.*"], ["resid_post.0", "resid_post.1", "resid_post.2"]),
        (["resid_post.{2,0}", "mlp_in.1"], ["resid_post.0", "resid_post.2", "mlp_in.1"]),
        (["resid_post.[0-1]", "resid_*.1"], ["resid_post.0", "resid_post.1", "resid_pre.1"]),
        (["model.layers.*.mlp.act_fn"], [f"model.layers.{layer}.mlp.act_fn" for layer in range(3)]),
        (["model.layers.1.mlp.down_proj:in", "mlp_out.1"], ["model.layers.1.mlp.down_proj:in", "mlp_out.1"]),
        (["model.layers.?"], ["model.layers.0", "model.layers.1", "model.layers.2"]),
    ],
)
def test_globs_name_what_the_model_has_in_its_order_and_each_once(names: list[str], expected: list[str]):
    assert [str(point) for point in expand_hook_points(names, LLAMA, "field")] == expected


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("resid_post.3", "layers 0 to 2"),
        ("resid_pots.1", "resid_post.1"),
        ("resid_post", "accepted are resid_pre, resid_post"),
        ("resid_post.-1", "resid_post"),
        ("mixer_out.1", "accepted are"),
        ("model.layers.1.mlp.act", r"model\.layers\.1\.mlp\.act_fn"),
        ("model.layers.1.mlp:out", "is not a hook point of LlamaForCausalLM"),
        ("model.*.act_fn", "is not a hook point"),
        ("resid_post.1:in", "is not a hook point"),
    ],
)
def test_a_hook_point_that_the_model_does_not_have_is_refused(name: str, says: str):
    with pytest.raises(UserError, match=rf"^training\.hook_point: '.*{says}"):
        expand_hook_points([name], LLAMA, "training.hook_point")


def test_a_state_space_model_has_a_mixer_and_no_attention():
    source = Source(config_of(CAUSAL["mamba"]))
    kinds = [point.kind for point in expand_hook_points(["*.0"], source, "field")]
    assert kinds == ["resid_pre", "resid_post", "mixer_out"]
    with pytest.raises(UserError, match=r"attn_out\.0.*accepted are resid_pre, resid_post, mixer_out"):
        expand_hook_points(["attn_out.0"], source, "field")


@pytest.mark.parametrize(
    "entry",
    [
        ("BloomConfig", {"vocab_size": 50, "hidden_size": 16, "n_layer": LAYERS, "n_head": 2}),  # its sublayers add the stream
        ("GraniteConfig", {**GROUPED, "residual_multiplier": 0.5}),  # its block scales what it adds
    ],
)
def test_a_sublayer_whose_output_is_not_what_it_adds_is_refused(entry: tuple[str, dict[str, Any]]):
    source = Source(config_of(entry))
    for kind in ("attn_out", "mlp_out"):
        with pytest.raises(UserError, match=f"{kind}.1.*accepted are resid_pre, resid_post"):
            expand_hook_points([f"{kind}.1"], source, "field")


def test_module_paths_give_what_the_module_gives_and_reads():
    model = random_model(CAUSAL["llama"])
    seen: dict[str, Tensor] = {}
    module = model.model.layers[1].mlp.down_proj
    handle = module.register_forward_hook(lambda _module, into, out: seen.update(into=into[0], out=out))
    model(TOKENS)
    handle.remove()
    into, out = (parse_hook_point(name) for name in ("model.layers.1.mlp.down_proj:in", "model.layers.1.mlp.down_proj"))
    captured = capture(model, [into, out], IDS)
    torch.testing.assert_close(captured[into], seen["into"], rtol=0, atol=0)
    torch.testing.assert_close(captured[out], seen["out"], rtol=0, atol=0)
    assert depth(model, into) == depth(model, HookPoint("mlp_out", 1)) == 2 / LAYERS
    assert depth(model, parse_hook_point("lm_head")) == 1


@pytest.mark.parametrize("name", ["model.rotary_emb", "model.layers.1.self_attn.q_norm", "model.embed_tokens:in"])
def test_a_place_without_rows_of_tokens_is_refused_before_weights_are_loaded(name: str):
    source = ModelSource(LanguageModelSettings(), "nowhere", None)
    source.__dict__.update(config=config_of(CAUSAL["qwen3"]), skeleton=Source(config_of(CAUSAL["qwen3"])).skeleton)
    with pytest.raises(UserError, match=rf"activations\.hook_points: '{name}'.*\[batch, length, d_in\]"):
        source.widths(expand_hook_points([name], source, "field"))


def test_a_local_folder_loads_and_its_identity_follows_its_content(tiny_model: str):
    source = find_model(LanguageModelSettings(name=tiny_model))
    assert (source.layers, source.width) == (3, 32)
    model = load_model(source, torch.device("cpu"))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert load_encoder(source).encode(["def f(x):"])[0]
    for change in ({"dtype": "bfloat16"}, {"attention_implementation": "eager"}, {"quantization": "int8"}):
        assert find_model(LanguageModelSettings(name=tiny_model, **change)).identity != source.identity
    for change in ({"device_map": "auto"}, {"batch_sequences": 7}):
        assert find_model(LanguageModelSettings(name=tiny_model, **change)).identity == source.identity


def test_looking_at_a_skeleton_does_not_change_how_the_model_is_loaded(tiny_model: str):
    cpu, ids = torch.device("cpu"), torch.arange(40)[None]
    used = find_model(LanguageModelSettings(name=tiny_model))
    used.widths(expand_hook_points(["resid_post.*", "model.layers.0.mlp.up_proj"], used, "field"))
    direct = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = load_model(used, cpu)
    assert model.config._attn_implementation == direct.config._attn_implementation
    torch.testing.assert_close(model(ids).logits, direct(ids).logits, rtol=0, atol=0)


def test_a_models_own_code_runs_when_it_is_trusted_and_is_part_of_its_identity(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "mine"
    random_model(CAUSAL["llama"]).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}
    config |= {"model_type": "mine", "architectures": ["MineForCausalLM"], "auto_map": own}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
        "class MineForCausalLM(LlamaForCausalLM):\n    config_class = MineConfig\n"
    )
    source = find_model(LanguageModelSettings(name=str(folder), trust_remote_code=True))
    assert type(load_model(source, torch.device("cpu"))).__name__ == "MineForCausalLM"
    assert [str(point) for point in expand_hook_points(["attn_out.*"], source, "field")] == [f"attn_out.{n}" for n in range(3)]
    untouched = source.identity
    _folder_digest.cache_clear()
    with (folder / "mine.py").open("a") as file:
        file.write("# another version\n")
    assert find_model(source.settings).identity != untouched


def test_how_a_model_is_run_changes_its_activations_by_rounding_alone(tiny_model: str):
    cpu, point, ids = torch.device("cpu"), HookPoint("resid_post", 1), {"input_ids": torch.arange(40)[None]}
    settings = LanguageModelSettings(name=tiny_model)
    plain = capture(load_model(find_model(settings), cpu), [point], ids)[point]
    for change in ({"attention_implementation": "eager"}, {"device_map": "auto"}):
        model = load_model(find_model(settings.model_copy(update=change)), cpu)
        torch.testing.assert_close(capture(model, [point], ids)[point], plain)
    halves = load_model(find_model(settings.model_copy(update={"dtype": "bfloat16"})), cpu)
    assert capture(halves, [point], ids)[point].dtype == torch.bfloat16


def test_an_unknown_builtin_and_an_unreachable_hub_name_are_refused():
    with pytest.raises(UserError, match="builtin/stdlib-llama"):
        find_model(LanguageModelSettings(name="builtin/nothing"))
    with pytest.raises(UserError, match=r"language_model\.name.*no/such-model"):
        find_model(LanguageModelSettings(name="no/such-model"))


def test_what_this_machine_cannot_run_is_refused_before_weights_are_loaded(tiny_model: str, tmp_path):
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match=r"language_model\.quantization: 'int8' needs a CUDA GPU"):
        load_model(find_model(LanguageModelSettings(name=tiny_model, quantization="int8")), cpu)
    for name in ("flash_attention_2", "nonsense"):
        with pytest.raises(UserError, match=rf"language_model\.attention_implementation: '{name}'"):
            load_model(find_model(LanguageModelSettings(name=tiny_model, attention_implementation=name)), cpu)
    (tmp_path / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}')
    (tmp_path / "mine.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UserError, match=r"trust_remote_code: true"):
        find_model(LanguageModelSettings(name=str(tmp_path))).config  # noqa: B018


def test_weights_that_lack_a_tensor_are_refused(tmp_path):
    random_model(CAUSAL["llama"]).save_pretrained(tmp_path)
    config = transformers.LlamaConfig.from_pretrained(tmp_path)
    config.update({"num_hidden_layers": LAYERS + 1})
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"language_model\.name: the weights of .* lack 9 tensors"):
        load_model(find_model(LanguageModelSettings(name=str(tmp_path))), torch.device("cpu"))


def test_threads_share_the_tensors_of_a_kept_model_and_not_its_hooks(tiny_model: str):
    source, cpu = find_model(LanguageModelSettings(name=tiny_model)), torch.device("cpu")
    mine = kept_model(source, cpu)
    assert kept_model(source, cpu) is mine
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(kept_model, source, cpu).result()
    assert [tensor.data_ptr() for tensor in other.parameters()] == [tensor.data_ptr() for tensor in mine.parameters()]
    handles = [module.register_forward_hook(lambda *_: pytest.fail("another thread's")) for module in other.modules()]
    ids = torch.arange(8)[None]
    found = mine(input_ids=ids).logits
    for handle in handles:
        handle.remove()
    assert torch.equal(found, other(input_ids=ids).logits)
