"""Coders that write elsewhere than they read: transcoders with and without a skip, and crosscoders."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from components import steps
from components.corpus.tokens import read_sequences
from components.evaluation.columns import OneColumn
from components.evaluation.evaluate import HeldOut, evaluate, reference_statistics
from components.evaluation.settings import EvaluationSettings
from components.interop.names import Kind
from components.interop.saelens import load_saelens, saelens_files
from components.language_model.hook_points import locate, parse_hook_point
from components.language_model.loading import load_model
from components.registry.pyfunc_sae import SAE
from components.run.config import parse_config
from components.run.specification import resolve
from components.sae.architectures import architectures
from components.sae.coder import Coder, Column, Progress
from components.settings import UserError
from components.training.start import as_trained

CPU = torch.device("cpu")
NAMES = ("relu", "topk", "batchtopk", "matryoshka", "jumprelu", "gated")
READ, WRITTEN = (Column("mlp_in.1", 6),), (Column("mlp_out.1", 5),)
THREE = (Column("resid_post.0", 3), Column("resid_post.1", 4), Column("resid_post.2", 2))


def made(name: str, reads: tuple[Column, ...] = READ, writes: tuple[Column, ...] = WRITTEN, **settings: object) -> Coder:
    k = {"k": 4} if name in ("topk", "batchtopk", "matryoshka") else {}
    kind = architectures()[name]
    coder = kind(kind.Settings.model_validate({"architecture": name, "d_sae": 20, **k, **settings}), reads, writes, 20)
    coder.initialise(1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, parameter in coder.named_parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter += noise.abs() if key == "threshold" else noise
    x, y = batch(coder)
    coder.losses(x, y, Progress(10, 10))
    coder.after_step()
    return coder


def batch(coder: Coder) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(40, coder.d_in, generator=generator), torch.randn(40, coder.d_out, generator=generator)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_of_the_skip_is_the_closed_form(name: str):
    coder = made(name, skip=True)
    x, y = batch(coder)
    found = coder.losses(x, y, Progress(10, 10))
    found.terms["reconstruction"].backward()
    with torch.no_grad():
        error = coder.write(found.features, x) - y
        expected = 2 * error.double().T @ x.double() / len(x)
        plain = coder.decode(found.features).double() + x.double() @ coder.W_skip.double().T
    assert found.terms["reconstruction"].item() == pytest.approx((plain - y).square().sum(dim=1).mean().item(), rel=1e-5)
    torch.testing.assert_close(coder.W_skip.grad.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", ["transcoder", "skip_transcoder", "crosscoder"])
def test_it_is_folded_saved_and_continued_as_the_same_function(name: str, place: str, tmp_path: Path):
    coder = made(name, THREE, THREE) if place == "crosscoder" else made(name, skip=place.startswith("skip"))
    scale_in = [0.4, 2.0, 0.7][: len(coder.reads)]
    scale_out = scale_in if place == "crosscoder" else [3.0]
    x = torch.randn(40, coder.d_in, generator=torch.Generator().manual_seed(4))  # none of them on BatchTopK's very threshold
    given = x / torch.cat([torch.full((c.width,), s) for c, s in zip(coder.reads, scale_in, strict=True)])
    expected = coder(x) / torch.cat([torch.full((c.width,), s) for c, s in zip(coder.writes, scale_out, strict=True)])
    folded = coder.folded(scale_in, scale_out).requires_grad_(False)
    torch.testing.assert_close(folded(given), expected.detach(), rtol=1e-4, atol=1e-4)
    metadata = {"hook_name": coder.reads[0].name, "hook_name_out": coder.writes[0].name}
    for file, content in saelens_files(folded, metadata).items():
        (tmp_path / file).write_bytes(content)
    loaded = load_saelens(tmp_path, CPU)
    assert isinstance(loaded, Coder)
    assert (loaded.reads, loaded.writes) == (coder.reads, coder.writes)
    torch.testing.assert_close(loaded(given), folded(given), rtol=1e-5, atol=1e-5)
    again = as_trained(type(coder)(coder.settings, coder.reads, coder.writes, 20), tmp_path, scale_in, scale_out)
    torch.testing.assert_close(again(x), coder(x).detach(), rtol=1e-3, atol=1e-3)

    model = SAE()
    model.load_context(SimpleNamespace(artifacts={"sae": str(tmp_path)}))
    np.testing.assert_allclose(
        model.predict(None, given.numpy())["reconstruction"], loaded(given).numpy(), rtol=1e-4, atol=1e-4
    )


def test_the_names_are_those_of_saelens_and_come_back():
    assert [str(Kind("standard", "transcoder")), str(Kind("jumprelu", "transcoder", True))] == [
        "transcoder", "jumprelu_skip_transcoder"
    ]  # fmt: skip
    for kind in (Kind("topk"), Kind("gated", "transcoder", True), Kind("standard", "crosscoder"), Kind("topk", "transcoder")):
        assert Kind.parse(str(kind)) == kind
    assert Kind.parse("cross_layer_transcoder") is None


def hooked(model: torch.nn.Module, name: str, function):
    module, reads_input = locate(model, parse_hook_point(name))
    if reads_input:
        return module.register_forward_pre_hook(lambda _m, args: (function(args[0]),))
    return module.register_forward_hook(
        lambda _m, _a, out: (function(out[0]), *out[1:]) if isinstance(out, tuple) else function(out)
    )


def kept(seen: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    return seen.setdefault(name, x.clone())


@pytest.mark.parametrize("place", ["transcoder", "crosscoder"])
def test_what_is_measured_is_what_the_model_does_with_it(place: str, tiny_tree: dict):
    """Against two plain passes of the model in float64, with hooks of the test's own."""
    reads = ["mlp_in.1"] if place == "transcoder" else ["resid_post.0", "resid_post.1"]
    written = "mlp_out.1" if place == "transcoder" else "resid_post.0"
    tiny_tree["activations"]["hook_points"] = [*reads, written] if place == "transcoder" else reads
    plan = resolve(parse_config(tiny_tree))
    text = HeldOut(url=plan.token_url, manifest=steps.prepare_tokens(plan))
    model = load_model(plan.source, CPU).double()
    columns = tuple(Column(name, 32) for name in reads)
    coder = made("relu", columns, (Column(written, 32),) if place == "transcoder" else columns).double()
    coder.requires_grad_(False)
    subject = coder if place == "transcoder" else OneColumn(coder, 0)
    point = parse_hook_point(written)
    reference = reference_statistics(model, point, text, 2_000, 16, CPU)
    settings = EvaluationSettings(tokens=10_000, baselines=())
    points = tuple(map(parse_hook_point, reads))
    found = evaluate(settings, subject, 20, model, point, text, reference, CPU, reads=points).metrics

    sequences = read_sequences(text.url, text.manifest, "held_out", 0, text.manifest.splits["held_out"].sequences)
    losses, error, total = [], [], []
    for tokens, documents in zip(sequences.tokens, sequences.documents, strict=True):
        seen: dict[str, torch.Tensor] = {}
        ids = torch.tensor(tokens[None].astype(np.int64))
        counted = torch.tensor(documents >= 0)
        handles = [hooked(model, name, partial(kept, seen, name)) for name in {*reads, written}]
        with torch.no_grad():
            model(input_ids=ids)
        for handle in handles:
            handle.remove()
        x, y = torch.cat([seen[name] for name in reads], dim=-1)[0], seen[written][0]
        f = torch.relu(x @ coder.W_enc + coder.b_enc)
        y_hat = (f @ coder.W_dec + coder.b_dec)[:, :32]
        put = torch.where(counted[:, None], y_hat, y)[None]
        handle = hooked(model, written, lambda _, put=put: put)
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0]
        handle.remove()
        predicts = counted[:-1] & torch.tensor(documents[1:] != -2)
        loss = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")[predicts]
        losses.append(loss)
        error.append((y - y_hat)[counted])
        total.append(y[counted])
    everything = torch.cat(total)
    explained = 1 - torch.cat(error).square().sum() / (everything - everything.mean(dim=0)).square().sum()
    assert found["explained_variance"] == pytest.approx(explained.item(), rel=1e-6)
    assert found["ce_loss_sae"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-6)


@pytest.fixture
def transcoder_tree(tiny_tree: dict) -> dict:
    tiny_tree["activations"]["hook_points"] = ["mlp_in.1", "mlp_out.1"]
    tiny_tree["training"] |= {"hook_point": "mlp_in.1", "target": "mlp_out.1"}
    tiny_tree["sae"]["skip"] = True
    return tiny_tree


def test_a_transcoder_goes_through_the_line_and_learns(transcoder_tree: dict):
    plan = resolve(parse_config(transcoder_tree))
    steps.extract(plan)
    record = steps.train(plan)
    assert record.curves[-1]["explained_variance"] > record.curves[0]["explained_variance"]
    assert set(load_file(Path(plan.sae_url) / "sae_weights.safetensors")) == {"W_enc", "b_enc", "W_dec", "b_dec", "W_skip"}
    measured = steps.evaluate(plan)
    assert measured.about.hook_point == "mlp_in.1-to-mlp_out.1"
    assert plan.registered_model.endswith("mlp_in.1-to-mlp_out.1")
    assert steps.interpret(plan) is not None
    found = steps.attribute(plan, "document 7: the sparse feature of a model fires", "self", None, 5, True, 8)
    assert found["spearman"] > 0.5, found
    _, again = steps.evaluate_given(plan, plan.sae_url)
    assert again.metrics["explained_variance"] == pytest.approx(measured.metrics["explained_variance"], rel=1e-6)
    autoencoder = {**transcoder_tree, "sae": {"d_sae": 64}, "training": {**transcoder_tree["training"], "target": None}}
    with pytest.raises(UserError, match="it is a transcoder"):
        steps.evaluate_given(resolve(parse_config(autoencoder)), plan.sae_url)
    with pytest.raises(UserError, match=r"does not fit.*skip_transcoder"):
        start = {**autoencoder["training"], "start_from": plan.sae_url}
        resolve(parse_config({**autoencoder, "training": start}))
    continued = {**transcoder_tree, "training": {**transcoder_tree["training"], "start_from": plan.sae_url}}
    assert steps.train(resolve(parse_config(continued))).curves[0]["loss"] < record.curves[0]["loss"]


def test_a_crosscoder_is_measured_column_by_column(tiny_tree: dict):
    tiny_tree["activations"]["hook_points"] = ["resid_post.0", "resid_post.1"]
    tiny_tree["training"]["crosscoder"] = ["resid_post.0", "resid_post.1"]
    plan = resolve(parse_config(tiny_tree))
    steps.extract(plan)
    steps.train(plan)
    measured = steps.evaluate(plan)
    rows = measured.breakdown["column"]
    assert [row["column"] for row in rows] == ["resid_post.0", "resid_post.1"]
    for name in ("explained_variance", "ce_loss_sae"):
        assert measured.metrics[name] == pytest.approx(sum(row[name] for row in rows) / 2)
    assert rows[0]["l0"] == rows[1]["l0"]
    assert steps.interpret(plan) is not None
    found = steps.attribute(plan, "document 7: the sparse feature of a model fires", "self", None, 5, True, 8)
    assert found["spearman"] > 0.5, found


@pytest.mark.parametrize(
    ("training", "sae", "message"),
    [
        ({"target": "mlp_out.0"}, {}, "training.target: 'mlp_out.0' is not in activations.hook_points"),
        ({"target": "nonsense"}, {}, "training.target: 'nonsense' is not a hook point"),
        ({"crosscoder": ["resid_post.1"]}, {}, "training.crosscoder.*two or more"),
        (
            {"crosscoder": ["resid_post.0", "resid_post.1"], "target": "mlp_out.1"},
            {},
            "training.crosscoder: it is given beside",
        ),
        ({}, {"skip": True}, "sae.skip: true is accepted for a transcoder"),
    ],
)
def test_what_makes_no_coder_is_refused(training: dict, sae: dict, message: str, tiny_tree: dict):
    tiny_tree["activations"]["hook_points"] = ["resid_post.0", "resid_post.1", "mlp_out.1"]
    tiny_tree["training"] |= training
    tiny_tree["sae"] |= sae
    with pytest.raises(UserError, match=message):
        resolve(parse_config(tiny_tree))
