"""Encoders, vision transformers and vision-language models: from files to a dataset of what the model itself computes."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from seeing import IMAGE, SIZES, WORDS, draw_pictures, save_llava, save_vit, tree, words_tokenizer
from transformers import (
    AutoProcessor,
    BertConfig,
    BertForMaskedLM,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    LlavaForConditionalGeneration,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from components import steps
from components.corpus.tokens import PADDING, SPECIAL, Sequences, read_sequences
from components.language_model.hook_points import HookPoint, capture, expand_hook_points
from components.language_model.loading import find_model, forward_inputs, load_model
from components.language_model.settings import LanguageModelSettings
from components.run.checks import check
from components.run.config import parse_config
from components.run.estimate import estimate
from components.run.specification import Specification, resolve
from components.settings import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    tokenizer = words_tokenizer(["[UNK]", "[PAD]", "[CLS]", "[SEP]"], pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    tokenizer.save_pretrained(folder)
    config = BertConfig(**SIZES, vocab_size=len(tokenizer), max_position_embeddings=24, initializer_range=0.3)
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


def stored(plan: Specification, split: str = "train") -> tuple[dict[tuple[int, int], torch.Tensor], pa.Table]:
    """(document, position) -> stored activation at the first hook point, and the table."""
    manifest = steps.extract(plan)
    table = pa.concat_tables(pq.read_table(f"{plan.dataset_url}/{shard.name}") for shard in manifest.shards)
    column = table[str(plan.point)].combine_chunks()
    values = torch.frombuffer(bytearray(column.buffers()[1]), dtype=torch.float32).reshape(len(column), -1)
    keys = zip(table["document"].to_pylist(), table["position"].to_pylist(), strict=True)
    rows = dict(zip(keys, values, strict=True))
    assert len(rows) == len(table) == manifest.tokens == plan.token_manifest().splits[split].tokens
    return rows, table


def documents_of(plan: Specification) -> list[dict[str, Any]]:
    return pq.read_table(f"{plan.token_url}/documents.parquet").to_pylist()


def test_a_folder_of_images_becomes_a_dataset_of_patches_without_the_cls_token(vit: Path, pictures: Path, tmp_path: Path):
    plan = resolve(
        parse_config(tree(tmp_path, vit, {"source": "images", "paths": [str(pictures)]}, ["resid_post.1", "mlp_in.*"]))
    )
    check(plan, evaluated=False)
    rows, table = stored(plan)
    model = ViTForImageClassification.from_pretrained(vit).eval()
    processor = ViTImageProcessorPil.from_pretrained(vit)
    listed = documents_of(plan)
    assert len(listed) == 14
    train = [document for document in listed if document["split"] == "train"]
    assert 0 < len(train) < 14
    assert len(rows) == 16 * len(train)
    for document in train:
        image = Image.open(document["name"].removeprefix("file://"))
        assert image.size == (document["width"], document["height"])
        with torch.no_grad():
            pixels = processor(images=[image.convert("RGB")], return_tensors="pt")["pixel_values"]
            states = model(pixels, output_hidden_states=True).hidden_states[2][0]
        for patch in range(16):
            torch.testing.assert_close(rows[document["document"], patch], states[1 + patch], rtol=1e-4, atol=1e-5)
    assert set(table["token"].to_pylist()) == {-1}
    assert plan.widths["mlp_in.2"] == 16


def test_held_out_images_are_others_and_a_budget_counts_patches(vit: Path, pictures: Path, tmp_path: Path):
    corpus = {"source": "images", "paths": [f"{pictures}/*.png", f"{pictures}/*.jpg"], "train_tokens": 40}
    seen = {}
    for split in ("train", "held_out"):
        config = tree(tmp_path, vit, corpus, ["resid_post.1"])
        config["activations"]["split"] = split
        rows, _ = stored(resolve(parse_config(config)), split)
        seen[split] = {document for document, _ in rows}
        assert split != "train" or len(rows) == 40  # two images and a half
    assert len(seen["train"]) == 3
    assert not seen["train"] & seen["held_out"]


def test_images_in_parquet_are_the_same_corpus(vit: Path, pictures: Path, tmp_path: Path):
    contents = [path.read_bytes() for path in sorted(pictures.glob("[01]*.*"))]
    both = pa.table({"picture": [{"bytes": content, "path": None} for content in contents], "label": range(len(contents))})
    pq.write_table(both, tmp_path / "pictures.parquet")
    corpus = {"source": "images", "paths": [f"{tmp_path}/*.parquet"], "image_column": "picture"}
    plan = resolve(parse_config(tree(tmp_path, vit, corpus, ["resid_post.1"])))
    manifest = steps.prepare_tokens(plan)
    kept = {
        image
        for split, entry in manifest.splits.items()
        for image in read_sequences(plan.token_url, manifest, split, 0, entry.sequences).images
    }
    assert kept == set(contents)
    block = read_sequences(plan.token_url, manifest, "train", 0, 3)
    assert block.documents.shape == (3, 17)
    assert (block.documents[:, 0] == SPECIAL).all()
    assert block[1:3].images == block.images[1:3]
    with pytest.raises(UserError, match=r"corpus\.image_column: 'image' is not a column of .*picture, label"):
        corpus.pop("image_column")
        steps.prepare_tokens(resolve(parse_config(tree(tmp_path, vit, corpus, ["resid_post.1"]))))


def test_a_vision_language_model_sees_the_image_in_its_prompt(llava: Path, pictures: Path, tmp_path: Path):
    prompt = "the model <image> fires where"
    corpus = {"source": "images", "paths": [str(pictures)], "prompt": prompt}
    plan = resolve(parse_config(tree(tmp_path, llava, corpus, ["resid_post.1", "attn_out.0"])))
    check(plan, evaluated=False)
    rows, table = stored(plan)
    model = LlavaForConditionalGeneration.from_pretrained(llava).eval()
    processor = AutoProcessor.from_pretrained(llava, backend="pil")
    train = [document for document in documents_of(plan) if document["split"] == "train"]
    for document in train:
        image = Image.open(document["name"].removeprefix("file://")).convert("RGB")
        inputs = processor(text=[prompt], images=[image], return_tensors="pt")
        with torch.no_grad():
            states = model(**inputs, output_hidden_states=True).hidden_states[2][0]
        tokens = inputs["input_ids"][0].tolist()
        first = tokens.index(model.config.image_token_id)
        assert [place for number, place in sorted(rows) if number == document["document"]] == list(range(first, len(tokens)))
        for place in range(first, len(tokens)):
            torch.testing.assert_close(rows[document["document"], place], states[place], rtol=1e-4, atol=1e-5)
    assert tokens.count(model.config.image_token_id) == 16
    assert set(table["token"].to_pylist()) == set(tokens[first:])
    assert plan.d_in == 20


def test_without_a_prompt_the_vision_tower_runs_alone(llava: Path, pictures: Path, tmp_path: Path):
    names = ["vision.resid_post.1", "model.vision_tower.encoder.layers.0.mlp.fc1"]
    plan = resolve(parse_config(tree(tmp_path, llava, {"source": "images", "paths": [str(pictures)]}, names)))
    check(plan, evaluated=False)
    rows, _ = stored(plan)
    assert list(plan.widths.values()) == [16, 24]
    model = LlavaForConditionalGeneration.from_pretrained(llava).eval()
    processor = AutoProcessor.from_pretrained(llava, backend="pil").image_processor
    document = next(document for document in documents_of(plan) if document["split"] == "train")
    image = Image.open(document["name"].removeprefix("file://")).convert("RGB")
    with torch.no_grad():
        pixels = processor(images=[image], return_tensors="pt")["pixel_values"]
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[2][0]
    for patch in range(16):
        torch.testing.assert_close(rows[document["document"], patch], states[1 + patch], rtol=1e-4, atol=1e-5)


def test_a_vision_language_model_reads_plain_text_too(llava: Path):
    source = find_model(LanguageModelSettings(name=str(llava)))
    block = np.arange(12).reshape(2, 6)
    sequences = Sequences(tokens=block, documents=block * 0, positions=block)
    model = load_model(source, CPU)
    point = HookPoint("resid_post", 2)
    captured = capture(model, [point], forward_inputs(source, sequences, CPU))[point]
    with torch.no_grad():
        states = model(torch.tensor(block), output_hidden_states=True).hidden_states
    torch.testing.assert_close(model.model.language_model.norm(captured), states[3])


def test_the_image_half_of_clip_is_loaded_from_the_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.manual_seed(0)
    text = {**SIZES, "vocab_size": 20, "max_position_embeddings": 8}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config={**SIZES, **IMAGE}, projection_dim=8)).eval()
    clip.save_pretrained(tmp_path)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    source = find_model(LanguageModelSettings(name=str(tmp_path)))
    assert (source.family, source.width) == ("vision", 16)
    pixels, point = torch.randn(2, 3, 32, 32), HookPoint("resid_post", 1)
    model = load_model(source, CPU)
    assert capsys.readouterr().err.count("UNEXPECTED") == 0  # the other half of the pair is nothing to warn of
    captured = capture(model, [point], {"pixel_values": pixels})[point]
    with torch.no_grad():
        states = clip.vision_model(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(captured, states[2], rtol=0, atol=0)
    assert len(source.image_layout(None)) == 17


def text_corpus(tmp_path: Path) -> dict[str, Any]:
    generator = np.random.default_rng(3)
    lines = [json.dumps({"text": " ".join(generator.choice(WORDS, generator.integers(3, 20)))}) for _ in range(40)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    return {
        "source": "files", "paths": [str(tmp_path / "texts.jsonl")], "context_length": 12, "packing": "within_document"
    }  # fmt: skip


def test_padding_changes_nothing_that_an_encoder_computes(bert: Path, tmp_path: Path):
    plan = resolve(parse_config(tree(tmp_path, bert, text_corpus(tmp_path), ["resid_post.1", "mlp_out.2"])))
    check(plan, evaluated=False)
    rows, table = stored(plan)
    model = BertForMaskedLM.from_pretrained(bert).eval()
    manifest = plan.token_manifest()
    block = read_sequences(plan.token_url, manifest, "train", 0, 1000)
    assert (block.documents == PADDING).any()
    for tokens, documents, positions in zip(block.tokens, block.documents, block.positions, strict=True):
        real = documents != PADDING
        with torch.no_grad():
            states = model(torch.tensor(tokens[real])[None].long(), output_hidden_states=True).hidden_states[2][0]
        for place in np.flatnonzero(documents >= 0):
            torch.testing.assert_close(rows[documents[place], positions[place]], states[place], rtol=1e-4, atol=1e-5)
    assert not {2, 3} & set(table["token"].to_pylist())  # CLS and SEP


def test_an_sae_trains_where_none_can_be_evaluated(bert: Path, tmp_path: Path):
    plan = resolve(parse_config(tree(tmp_path, bert, text_corpus(tmp_path), ["resid_post.0", "attn_out.1"])))
    check(plan, evaluated=False)
    assert estimate(plan)["activations"]["bytes_per_token"] == 16 + 2 * 16 * 4
    steps.extract(plan)
    assert steps.train(plan).d_in == 16
    with pytest.raises(UserError, match=r"language_model\.name: .* without next-token logits.*`sae extract` and `sae train`"):
        check(plan)


@pytest.mark.parametrize(
    ("model", "change", "points", "says"),
    [
        (
            "vit",
            {"source": "standard_library", "paths": []},
            ["resid_post.1"],
            r"corpus\.source: .* reads images; accepted is 'images'",
        ),
        ("vit", {"prompt": "see"}, ["resid_post.1"], r"corpus\.prompt: .* reads no text"),
        ("vit", {"paths": ["/nowhere/*.png"]}, ["resid_post.1"], r"corpus\.paths: '/nowhere/\*\.png' names no image"),
        ("vit", {}, ["pooler.dense"], r"activations\.hook_points: 'pooler.dense' has the shape \[2, 16\]"),
        ("bert", {}, ["resid_post.1"], r"corpus\.source: 'images' needs a model that sees"),
        ("llava", {}, ["resid_post.1"], r"'resid_post\.1' is in the text decoder .* give corpus\.prompt"),
        ("llava", {"prompt": "<image> the"}, ["vision.resid_post.1"], r"is in the vision tower .* leave corpus\.prompt out"),
        ("llava", {"prompt": "the"}, ["resid_post.1"], r"corpus\.prompt: .*<image>"),
        ("llava", {"prompt": "<image>"}, ["resid_post.1", "vision.resid_post.1"], "make two datasets"),
    ],
)
def test_a_model_and_a_corpus_that_do_not_fit_are_refused(
    model: str,
    change: dict[str, Any],
    points: list[str],
    says: str,
    request: pytest.FixtureRequest,
    pictures: Path,
    tmp_path: Path,
):
    corpus = {"source": "images", "paths": [str(pictures)], **change}
    with pytest.raises(UserError, match=says):
        check(resolve(parse_config(tree(tmp_path, request.getfixturevalue(model), corpus, points))), evaluated=False)


def test_the_processor_decides_the_dataset(vit: Path, pictures: Path, tmp_path: Path):
    corpus = {"source": "images", "paths": [str(pictures)]}
    digests = set()
    for number, mean in enumerate((0.5, 0.4)):
        folder = tmp_path / str(number)
        folder.mkdir()
        for file in vit.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[mean] * 3).save_pretrained(folder)
        plan = resolve(parse_config(tree(tmp_path, folder, corpus, ["resid_post.1"])))
        digests.add((plan.token_digest, plan.dataset_digest, json.dumps(plan.source.identity)))
    assert len({token for token, _, _ in digests}) == len({dataset for _, dataset, _ in digests}) == 2
    assert len({identity for _, _, identity in digests}) == 1


def test_a_processor_of_varying_sizes_is_refused(vit: Path, pictures: Path, tmp_path: Path):
    for file in vit.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    CLIPImageProcessorPil(size={"shortest_edge": 32}, do_center_crop=False).save_pretrained(tmp_path)
    source = find_model(LanguageModelSettings(name=str(tmp_path)))
    with pytest.raises(UserError, match=r"language_model\.name: .* different sizes into different numbers of patches"):
        source.image_layout(None)


def test_images_of_every_mode_become_three_channels(vit: Path):
    source = find_model(LanguageModelSettings(name=str(vit)))
    contents = []
    for mode in ("L", "RGBA", "P", "I;16"):
        stream = io.BytesIO()
        Image.new(mode, (30, 20)).save(stream, format="PNG")
        contents.append(stream.getvalue())
    block = np.full((4, 17), -1)
    sequences = Sequences(tokens=block, documents=block * 0, positions=block, images=tuple(contents))
    assert forward_inputs(source, sequences, CPU)["pixel_values"].shape == (4, 3, 32, 32)
    assert expand_hook_points(["resid_pre.0"], source, "field") == [HookPoint("resid_pre", 0)]
