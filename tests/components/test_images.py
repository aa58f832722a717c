"""SAEs on images, measured and looked at: against the full matrix of activations computed here with transformers alone."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from seeing import draw_pictures, save_llava, save_vit, tree
from transformers import AutoProcessor, LlavaForConditionalGeneration, ViTForImageClassification, ViTImageProcessorPil, ViTModel

from components import steps
from components.corpus.tokens import read_sequences
from components.evaluation import kept
from components.evaluation.record import EvaluationRecord
from components.evaluation.results import finish
from components.run.checks import check
from components.run.config import parse_config
from components.run.specification import Specification, resolve
from components.settings import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
PROMPT = "the model <image> fires where"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, and both models."""
    made = tmp_path_factory.mktemp("seen")
    for name, make in (("pictures", draw_pictures), ("vit", save_vit), ("llava", save_llava)):
        (made / name).mkdir()
        make(made / name)
    return made


def configured(folder: Path, root: Path, model: str, point: str, **changes: Any) -> dict[str, Any]:
    corpus = {"source": "images", "paths": [str(folder / "pictures")], "held_out_fraction": 0.5}
    prompt = {"prompt": PROMPT} if model == "llava" and not point.startswith("vision.") else {}
    found = tree(root, folder / model, corpus | prompt, [point])
    found["training"] |= {"tokens": 2_000}
    found["evaluation"] = {"tokens": 90, "baseline_tokens": 70, "batch_sequences": 6}
    found["interpretation"] = {"tokens": 90, "examples": 3, "drawn": 8, "quantiles": 3}
    return found | changes


def trained(config: dict[str, Any]) -> Specification:
    run = resolve(parse_config(config))
    check(run)
    steps.extract(run)
    steps.train(run)
    return run


def interpreted(config: dict[str, Any]) -> Specification:
    run = trained(config)
    steps.evaluate(run)
    steps.interpret(run)
    return run


@pytest.fixture(scope="module")
def of_vit(folder: Path) -> Specification:
    return interpreted(configured(folder, folder, "vit", "resid_post.1"))


def vit_states(run: Specification) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Activations `[n, 16, d_in]` of the held-out images' patches, their ids `[n, 16]`, and which of them are measured."""
    manifest = run.token_manifest()
    block = read_sequences(run.token_url, manifest, "held_out", 0, manifest.splits["held_out"].sequences)
    location = run.config.language_model.name
    processor, model = ViTImageProcessorPil.from_pretrained(location), ViTModel.from_pretrained(location).eval()
    pictures = [Image.open(io.BytesIO(content)).convert("RGB") for content in block.images]
    with torch.no_grad():
        states = model(processor(images=pictures, return_tensors="pt")["pixel_values"], output_hidden_states=True).hidden_states
    counted = np.arange(len(block) * 16).reshape(-1, 16) < 90
    return states[2][:, 1:], block.documents[:, 1:], counted


def features_of(run: Specification, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        features, written = steps.evaluation.own_sae(run.sae_url, CPU).reconstruct(x.flatten(0, 1))
    return features.dense().reshape(*x.shape[:2], -1), written.reshape(x.shape)


def test_what_is_measured_on_held_out_patches_is_that_of_the_whole_matrix(of_vit: Specification):
    record = of_vit.evaluation_record()
    x, documents, counted = vit_states(of_vit)
    features, written = features_of(of_vit, x)
    rows, rebuilt, fires = x[counted].double(), written[counted].double(), (features > 0)[counted].double()
    error = (rows - rebuilt).square().sum()
    metrics = record.metrics
    variance = (rows - rows.mean(dim=0)).square().sum()
    assert metrics["explained_variance"] == pytest.approx(float(1 - error / variance), rel=1e-5)
    assert metrics["mse"] == pytest.approx(float(error / rows.numel()), rel=1e-5)
    assert metrics["l0"] == pytest.approx(float(fires.sum(dim=1).mean()))
    assert metrics["dead_fraction"] == pytest.approx(float((fires.sum(dim=0) == 0).double().mean()))
    cosine = torch.nn.functional.cosine_similarity(rows, rebuilt, dim=1).mean()
    assert metrics["cosine_similarity"] == pytest.approx(float(cosine), rel=1e-5)
    assert (metrics["evaluation_tokens"], metrics["evaluation_documents"]) == (90, len(np.unique(documents[counted])))
    low, high = metrics["explained_variance_low"], metrics["explained_variance_high"]
    assert low < high  # resampled by image
    density = pq.read_table(Path(of_vit.sae_url) / "features.parquet")["density"].to_numpy()
    assert density == pytest.approx(fires.mean(dim=0).numpy())
    assert not [name for name in metrics if "loss" in name]  # absent, and not null
    by_name = {row["name"]: row for row in record.baselines}
    assert set(by_name["sae"]) == {
        "name", "mse", "normalized_mse", "explained_variance", "l0", "cosine_similarity", "norm_ratio", "tokens",
        "kl_divergence",
    }  # fmt: skip
    assert by_name["zero"]["mse"] == pytest.approx(float(rows[:70].square().mean()), rel=1e-5)
    assert by_name["identity"]["explained_variance"] == 1.0
    page = (Path(of_vit.sae_url) / "report.html").read_text()
    assert "held-out patches of <b>6</b> images" in page
    assert "cross-entropy" not in page


def test_a_classifier_is_measured_by_how_its_classes_change(of_vit: Specification):
    x, _, counted = vit_states(of_vit)
    _, written = features_of(of_vit, x)
    manifest, location = of_vit.token_manifest(), of_vit.config.language_model.name
    block = read_sequences(of_vit.token_url, manifest, "held_out", 0, manifest.splits["held_out"].sequences)
    processor, model = (
        ViTImageProcessorPil.from_pretrained(location),
        ViTForImageClassification.from_pretrained(location).eval(),
    )
    expected = []
    for number in np.flatnonzero(counted.any(axis=1)):
        with Image.open(io.BytesIO(block.images[number])) as picture:
            pixels = processor(images=[picture.convert("RGB")], return_tensors="pt")["pixel_values"]

        def spliced(_module, _arguments, output, number=number):
            states = (output[0] if isinstance(output, tuple) else output).clone()
            states[0, 1:][torch.from_numpy(counted[number])] = written[number][torch.from_numpy(counted[number])]
            return (states, *output[1:]) if isinstance(output, tuple) else states

        with torch.no_grad():
            clean = model(pixels).logits[0].double().log_softmax(-1)
            handle = next(layer for name, layer in model.named_modules() if name.endswith("layers.1")).register_forward_hook(
                spliced
            )
            other = model(pixels).logits[0].double().log_softmax(-1)
            handle.remove()
        expected.append(float((clean.exp() * (clean - other)).sum()))
    found = of_vit.evaluation_record()
    assert len(expected) == 6
    assert found.metrics["kl_divergence"] == pytest.approx(np.mean(expected), rel=1e-3)
    assert found.metrics["kl_divergence"] > 1e-7


@pytest.mark.parametrize("point", ["vision.resid_post.1"])
def test_a_tower_without_a_head_has_no_divergence(point: str, folder: Path, tmp_path: Path):
    run = trained(configured(folder, tmp_path, "llava", point))
    metrics = steps.evaluate(run).metrics
    assert metrics["explained_variance"] is not None
    assert not [name for name in metrics if "loss" in name or "kl" in name]
    assert steps.interpret(run).living > 0
    with pytest.raises(UserError, match="reads images alone"):
        steps.multilingual(run, None, 5)


def test_a_transcoder_on_images_is_measured_where_it_writes(folder: Path, tmp_path: Path):
    config = configured(folder, tmp_path, "vit", "mlp_in.1")
    config["activations"]["hook_points"] = ["mlp_in.1", "mlp_out.1"]
    config["training"] |= {"hook_point": "mlp_in.1", "target": "mlp_out.1"}
    run = trained(config)
    metrics = steps.evaluate(run).metrics
    manifest, location = run.token_manifest(), run.config.language_model.name
    block = read_sequences(run.token_url, manifest, "held_out", 0, manifest.splits["held_out"].sequences)
    processor, model = ViTImageProcessorPil.from_pretrained(location), ViTModel.from_pretrained(location).eval()
    mlp = next(module for name, module in model.named_modules() if name.endswith("layers.1.mlp"))
    seen: list[torch.Tensor] = []
    mlp.register_forward_hook(lambda _module, arguments, output: seen.extend((arguments[0], output)))
    pictures = [Image.open(io.BytesIO(content)).convert("RGB") for content in block.images]
    with torch.no_grad():
        model(processor(images=pictures, return_tensors="pt")["pixel_values"])
    read, there = (part[:, 1:].reshape(-1, 16)[:90] for part in seen)
    with torch.no_grad():
        _, written = steps.evaluation.own_sae(run.sae_url, CPU).reconstruct(read)
    error, variance = (there - written).double().square().sum(), (there - there.mean(dim=0)).double().square().sum()
    assert metrics["explained_variance"] == pytest.approx(float(1 - error / variance), rel=1e-4)
    assert metrics["kl_divergence"] > 0
    assert steps.interpret(run).living > 0


def test_spans_of_images_add_up_to_the_whole(of_vit: Specification, monkeypatch: pytest.MonkeyPatch):
    whole = of_vit.evaluation_record()
    monkeypatch.setattr(kept, "TOKENS", 20)
    monkeypatch.setattr("components.steps.evaluation.with_optional", lambda _run, found, *_: found)
    job = steps.evaluation_job(of_vit)
    reference = steps.evaluation_reference(job, CPU)
    spans = steps.evaluation.measurements.sae_spans(job.settings, job.text, kept.parts(90, 1))
    assert len(spans) > 2
    measured = [steps.measure_span(job, reference.mean, reference.exclusion, CPU, span) for span in spans]
    found = finish(job.settings, steps.evaluation.evaluation.merged(measured), None, None, job.text.predicts)
    for name, value in whole.metrics.items():
        assert found.metrics[name] == pytest.approx(value, rel=1e-6), name


@pytest.mark.parametrize("tokens_of_a_span", [100_000, 20])
def test_examples_are_those_of_the_whole_matrix_whatever_the_spans(
    tokens_of_a_span: int, of_vit: Specification, monkeypatch: pytest.MonkeyPatch
):
    run = of_vit
    if tokens_of_a_span < 100:
        monkeypatch.setattr(kept, "TOKENS", tokens_of_a_span)
        monkeypatch.setattr("components.interpretation.activations._TOKENS_AT_ONCE", 34)  # two images
        for path in (Path(run.sae_url) / "interpretation").iterdir():
            path.unlink()
        assert len(steps.interpretation_job(run).spans) > 2
        steps.interpret(run)
    x, documents, counted = vit_states(run)
    features = features_of(run, x)[0] * torch.from_numpy(counted)[..., None]
    folder = Path(run.sae_url) / "interpretation"
    rows = pq.read_table(folder / "examples.parquet").to_pylist()
    table = pq.read_table(folder / "features.parquet").to_pylist()
    assert not {"token_ids", "logit_tokens"} & set(table[0])  # patches are no tokens, and lead to no logits
    fired = 0
    for feature in range(run.d_sae):
        along = features[..., feature].numpy()
        order = [one for one in np.argsort(-along.max(axis=1), kind="stable") if along[one].max() > 1e-5][:3]
        strongest = [
            row for row in rows if row["feature"] == feature and row["kind"] == "strongest" and row["activation"] > 1e-5
        ]
        assert [row["document"] for row in strongest] == documents[order, 0].tolist()
        for row, image in zip(strongest, order, strict=True):
            assert row["position"] == along[image].argmax()
            assert row["activation"] == pytest.approx(along[image].max(), rel=1e-5)
            assert np.asarray(row["activations"][1:]) == pytest.approx(along[image], rel=1e-4, abs=1e-6)
        counts, edges = (np.asarray(table[feature][name]) for name in ("histogram", "histogram_edges"))
        assert counts.sum() == table[feature]["fired"]
        # What is nothing but rounding, or at an edge, is elsewhere in a batch of another size.
        slack = 1e-5 * (1 + along)
        assert (along > slack).sum() <= counts.sum() <= (along > -slack).sum()
        for edge, above in zip(edges[:-1], counts[::-1].cumsum()[::-1], strict=True):
            if edge > 1e-5:
                assert (along - slack >= edge).sum() <= above <= (along + slack >= edge).sum()
        drawn = [row for row in rows if row["feature"] == feature and row["kind"] == "sample"]
        assert len(drawn) == min(8, counts.sum())
        for row in drawn:
            image = int(np.flatnonzero(documents[:, 0] == row["document"])[0])
            assert row["activation"] == pytest.approx(along[image, row["position"]], rel=1e-5, abs=1e-5)
        fired += bool(len(counts))
    assert fired > 10


def scripted(path: Path) -> Any:
    text = path.read_text()
    return json.loads(text[text.index("(") + 1 : text.rindex(")")].split(",", 1)[1] if "blocks" in str(path) else text[6:-2])


def test_the_browser_has_the_pictures_and_where_on_them_a_feature_fires(of_vit: Specification):
    x, documents, counted = vit_states(of_vit)
    features = features_of(of_vit, x)[0] * torch.from_numpy(counted)[..., None]
    site = Path(of_vit.sae_url) / "browser"
    index = scripted(site / "index.js")
    assert (index["grid"], index["pictures"], index["of_text"]) == ([4, 4], True, False)
    block = scripted(site / "blocks" / "00000.js")
    shown = [(feature, one) for feature, found in enumerate(block) for one in found["examples"]]
    assert shown
    for feature, one in shown:
        image = int(np.flatnonzero(documents[:, 0] == one["document"])[0])
        assert one["patches"] == pytest.approx(features[image, :, feature].numpy(), rel=1e-3, abs=1e-6)
        assert one["cell"] == one["patch"][0] * 4 + one["patch"][1] == one["position"]
        assert one["patches"][one["cell"]] == one["activation"]
        assert one["tokens"] == []
    names = pq.read_table(Path(of_vit.token_url) / "documents.parquet").to_pylist()
    known = {row["document"]: row["name"] for row in names}
    processor = ViTImageProcessorPil.from_pretrained(of_vit.config.language_model.name)
    for document, name in {(one["document"], one["name"]) for _, one in shown}:
        assert known[document].endswith(f"/{name}")
        with Image.open(site / "pictures" / f"{document}.jpg") as small:
            found = np.asarray(small.convert("RGB")).astype(float)
        with Image.open(known[document].removeprefix("file://")) as whole:
            seen = np.asarray(whole.convert("RGB").resize((32, 32), resample=processor.resample)).astype(float)
        assert np.abs(found - seen).mean() < 12  # a JPEG of noise
    assert "(" in index["first"][0][1]  # the table says image and patch
    assert all(
        float(value) == 0 for value in np.frombuffer(base64.b64decode(index["columns"]["score"]), "<f4") if value == value
    )


def test_pictures_of_ones_own_find_features(of_vit: Specification, tmp_path: Path):
    x, _, _ = vit_states(of_vit)
    features = features_of(of_vit, x)[0]  # of held-out images, [n, 16, d_sae]
    manifest = of_vit.token_manifest()
    block = read_sequences(of_vit.token_url, manifest, "held_out", 0, manifest.splits["held_out"].sequences)
    files = [tmp_path / f"{number}.img" for number in range(4)]
    for file, content in zip(files, block.images, strict=False):
        file.write_bytes(content)
    largest = features[:4].amax(dim=1)
    difference = largest[:2].mean(dim=0) - largest[2:].mean(dim=0)
    found = steps.search_pictures(of_vit, files[:2], files[2:], 5)
    assert len(found) == 5
    expected = difference.sort(descending=True).values[:5].tolist()
    assert [row["difference"] for row in found] == pytest.approx(expected, rel=1e-3)
    for row in found:
        feature = row["feature"]
        firing = [number for number in range(2) if largest[number, feature] > 0]
        assert (row["pictures"], row["against"]) == (len(firing), int((largest[2:, feature] > 0).sum()))
        assert row["patches"] == [divmod(int(features[number, :, feature].argmax()), 4) for number in firing]
    (tmp_path / "none.png").write_text("no image")
    with pytest.raises(UserError, match=r"--image: .*none\.png' cannot be read as an image"):
        steps.search_pictures(of_vit, [tmp_path / "none.png"], [], 5)


def test_what_reads_text_is_refused_in_one_sentence(of_vit: Specification, tmp_path: Path, folder: Path):
    refused = (
        lambda: steps.search_features(of_vit, ["the"], [], 5),
        lambda: steps.attribute(of_vit, "the", "a", None, 5, False, 0),
        lambda: steps.steer(of_vit, 1, 2.0, "the", 4),
        lambda: steps.explain(of_vit, 1, [], None, True),
        lambda: steps.export_features(of_vit, "delphi", tmp_path / "x", None),
        lambda: steps.list_features(of_vit, "one_token", ""),
    )
    for function in refused:
        with pytest.raises(UserError, match=r"reads images alone|the corpus is 'images'"):
            function()
    config = configured(folder, folder, "vit", "resid_post.1", evaluation={"probing": {}})
    with pytest.raises(UserError, match=r"evaluation\.probing reads text"):
        check(resolve(parse_config(config)))


@pytest.fixture(scope="module")
def of_llava(folder: Path) -> Specification:
    return interpreted(configured(folder, folder, "llava", "resid_post.1"))


def test_a_vision_language_model_is_measured_by_how_its_answers_change(of_llava: Specification):
    run = of_llava
    location, manifest = run.config.language_model.name, run.token_manifest()
    processor, model = (
        AutoProcessor.from_pretrained(location, backend="pil"),
        LlavaForConditionalGeneration.from_pretrained(location),
    )
    block = read_sequences(run.token_url, manifest, "held_out", 0, manifest.splits["held_out"].sequences)
    tokens = block.tokens[0]
    image = np.flatnonzero(tokens == model.config.image_token_id)
    sae, left, kl = steps.evaluation.own_sae(run.sae_url, CPU), 90, []
    layer = model.eval().model.language_model.layers[1]
    for content in block.images:
        picture = Image.open(io.BytesIO(content)).convert("RGB")
        inputs = processor(text=[PROMPT], images=[picture], return_tensors="pt")
        counted = torch.zeros(len(tokens), dtype=torch.bool)
        counted[image[0] : image[0] + max(0, left)] = True
        left -= int(counted.sum())

        def spliced(_module, _arguments, output, counted=counted):
            states = output[0] if isinstance(output, tuple) else output
            changed = states.clone()
            changed[0, counted] = sae.reconstruct(states[0, counted])[1]
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        with torch.no_grad():
            clean = model(**inputs).logits[0].double().log_softmax(-1)
            handle = layer.register_forward_hook(spliced)
            other = model(**inputs).logits[0].double().log_softmax(-1)
            handle.remove()
        # From the image's last token on, each position says what comes next; before, an image token does, and says nothing.
        for place in range(image[-1], len(tokens)):
            if counted[place]:
                kl.append(float((clean[place].exp() * (clean[place] - other[place])).sum()))
    found: EvaluationRecord = run.evaluation_record()
    assert len(kl) > 5
    assert found.metrics["kl_divergence"] == pytest.approx(np.mean(kl), rel=1e-3)
    assert found.metrics["explained_variance"] is not None
    assert not [name for name in found.metrics if "loss" in name]


def test_features_on_images_and_on_text_are_those_of_both_matrices(of_llava: Specification):
    run, texts = of_llava, ["the sparse feature of a model", "tokens in residual stream point along its decoder row"]
    location, manifest = run.config.language_model.name, run.token_manifest()
    processor = AutoProcessor.from_pretrained(location, backend="pil")
    model = LlavaForConditionalGeneration.from_pretrained(location).eval()
    block = read_sequences(run.token_url, manifest, "held_out", 0, manifest.splits["held_out"].sequences)
    image = np.flatnonzero(block.tokens[0] == model.config.image_token_id)
    sae, counted = steps.evaluation.own_sae(run.sae_url, CPU), block.tokens.shape[1] - image[0]

    def states(**inputs: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            hidden = model(**inputs, output_hidden_states=True).hidden_states[2][0]
            return sae.reconstruct(hidden)[0].dense()

    on_images, documents, left = [], [], 90
    for row, content in enumerate(block.images):
        picture = Image.open(io.BytesIO(content)).convert("RGB")
        found = states(**processor(text=[PROMPT], images=[picture], return_tensors="pt"))[image]
        on_images.append(found[: max(0, left)])
        documents += [int(block.documents[row].max())] * len(on_images[-1])
        left -= counted
    ids = [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    on_texts = torch.cat([states(input_ids=torch.tensor([[1, *one]]))[1:] for one in ids])
    seen, words = torch.cat(on_images), [word for text in texts for word in text.split()]
    shares = torch.stack([(seen > 0).double().mean(dim=0), (on_texts > 0).double().mean(dim=0)])
    largest = torch.stack([seen.amax(dim=0), on_texts.amax(dim=0)])
    both = [one for one in range(run.d_sae) if largest[:, one].min() > 0 and shares[:, one].max() <= 0.9]
    assert len(both) > 3
    found = steps.multimodal(run, texts, 0.9, 100)
    assert (found["image_tokens"], found["text_tokens"]) == (len(seen), len(on_texts))
    assert found["on_both"] == int(((seen > 0).any(dim=0) & (on_texts > 0).any(dim=0)).sum())
    assert sorted(row["feature"] for row in found["features"]) == both
    alike = [row["alike"] for row in found["features"]]
    assert alike == sorted(alike, reverse=True)
    for row in found["features"]:
        one = row["feature"]
        assert (row["images"]["share"], row["texts"]["share"]) == pytest.approx(tuple(shares[:, one].tolist()))
        assert (row["images"]["largest"], row["texts"]["largest"]) == pytest.approx(tuple(largest[:, one].tolist()), rel=2e-3)
        assert row["images"]["image"] == documents[int(seen[:, one].argmax())]
        assert row["texts"]["token"] == words[int(on_texts[:, one].argmax())]


def test_only_a_decoder_that_reads_both_has_features_on_both(of_vit: Specification):
    with pytest.raises(UserError, match=r"corpus\.prompt: features that fire on images and on text"):
        steps.multimodal(of_vit, [], 0.5, 5)
