"""SAEBench's `core` result against the formulas, brute force in float64, and against the layout that SAEBench 0.6.0 accepts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from components import steps
from components.corpus.tokens import PADDING, read_sequences
from components.language_model.loading import load_model
from components.run.config import parse_config
from components.run.specification import resolve
from components.steps.evaluation import own_sae
from flows.cli import app

CPU = torch.device("cpu")
# Field names and types as in SAEBench 0.6.0, `sae_bench/evals/core/eval_output.py` and `eval_config.py` (all are required).
CATEGORIES = {
    "model_behavior_preservation": "kl_div_score kl_div_with_ablation kl_div_with_sae",
    "model_performance_preservation": "ce_loss_score ce_loss_with_ablation ce_loss_with_sae ce_loss_without_sae",
    "reconstruction_quality": "explained_variance explained_variance_legacy mse cossim",
    "shrinkage": "l2_norm_in l2_norm_out l2_ratio relative_reconstruction_bias",
    "sparsity": "l0 l1",
    "token_stats": "total_tokens_eval_reconstruction total_tokens_eval_sparsity_variance",
    "misc_metrics": "freq_over_1_percent freq_over_10_percent normalized_freq_over_1_percent normalized_freq_over_10_percent "
    "average_max_encoder_cosine_sim average_max_decoder_cosine_sim frac_alive",
}
DETAILS = (
    "feature_density consistent_activation_heuristic encoder_bias encoder_norm encoder_decoder_cosine_sim "
    "max_decoder_cosine_sim max_encoder_cosine_sim"
)
CONFIG = {
    "model_name": str, "llm_dtype": str, "batch_size_prompts": int, "n_eval_reconstruction_batches": int,
    "n_eval_sparsity_variance_batches": int, "dataset": str, "context_size": int, "compute_kl": bool, "compute_ce_loss": bool,
    "compute_l2_norms": bool, "compute_sparsity_metrics": bool, "compute_variance_metrics": bool,
    "compute_featurewise_density_statistics": bool, "compute_featurewise_weight_based_metrics": bool,
    "exclude_special_tokens_from_reconstruction": bool, "verbose": bool,
}  # fmt: skip
TOP = {
    "eval_type_id": str, "eval_config": dict, "eval_id": str, "datetime_epoch_millis": int, "eval_result_metrics": dict,
    "eval_result_details": list, "sae_bench_commit_hash": str, "sae_lens_id": str, "sae_lens_release_id": str,
    "sae_lens_version": type(None), "sae_cfg_dict": dict, "eval_result_unstructured": dict,
}  # fmt: skip


@pytest.fixture(params=["crossing", "within_document"])
def tree(request: pytest.FixtureRequest, tiny_tree: dict) -> dict:
    tiny_tree["corpus"]["packing"] = request.param
    tiny_tree["training"]["tokens"] = 5_000
    tiny_tree["evaluation"] = {"tokens": 400, "reference_tokens": 500, "baselines": []}
    tiny_tree["activations"]["exclude"] = {"positions": [3]}
    return tiny_tree


def written(tree: dict, tmp_path: Path, *more: str) -> tuple[dict, dict]:
    """What the command writes, and prints."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    done = CliRunner().invoke(app, ["evaluate", str(path), "--format", "saebench", "--json", *more])
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout[done.stdout.index("{") :])
    return json.loads(Path(printed["saebench"]).read_text()), printed


def brute(run, tokens: int) -> tuple[dict, list[dict]]:
    """Every value from activations and logits of one sequence at a time, in float64, with the Llama's blocks called by hand."""
    model, sae = load_model(run.source, CPU).double(), own_sae(run.sae_url, CPU).double()
    block = read_sequences(run.token_url, run.token_manifest(), "held_out", 0, 10**6)
    xs, hats, features, prompts, kl = [], [], [], np.zeros(sae.d_sae), {"zero": [], "sae": []}
    losses: dict[str, list] = {"clean": [], "zero": [], "sae": []}
    left = tokens
    for ids, owner in zip(torch.tensor(block.tokens).long(), block.documents, strict=True):
        places = [place for place in range(len(ids)) if owner[place] >= 0][: max(left, 0)]
        if not places:
            break
        left, last = left - len(places), places[-1]
        places = [place for place in places if place != 3]
        x = model.model(ids[None], output_hidden_states=True).hidden_states[2][0]
        found, x_hat = sae.reconstruct(x[places])
        f = found.dense().detach()
        xs.append(x[places].detach())
        hats.append(x_hat.detach())
        features.append(f)
        prompts += (f > 0).any(dim=0).numpy()
        probabilities = {}
        for name, stand_in in (("clean", x[places]), ("zero", torch.zeros_like(x_hat)), ("sae", x_hat)):
            stream = x.clone()
            stream[places] = stand_in
            hidden, where = stream[None], torch.arange(len(ids))[None]
            hidden = model.model.layers[2](
                hidden, position_embeddings=model.model.rotary_emb(hidden, where), position_ids=where, attention_mask=None
            )
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
            probabilities[name] = model.lm_head(model.model.norm(hidden))[0].log_softmax(dim=-1).detach()
        for place in places:
            if place + 1 == len(ids) or owner[place + 1] == PADDING or (left <= 0 and place == last):
                continue  # nothing is predicted where the text ends, or is cut
            clean = probabilities["clean"][place]
            for name, log_q in probabilities.items():
                losses[name].append(-log_q[place, ids[place + 1]].item())
            for name in kl:
                kl[name].append((clean.exp() * (clean - probabilities[name][place])).sum().item())
    x, x_hat, f = torch.cat(xs), torch.cat(hats), torch.cat(features)
    squares, around = (x - x_hat).square().sum(dim=1), (x - x.mean(dim=0)).square().sum(dim=1)
    ce = {name: np.mean(values) for name, values in losses.items()}
    kl_mean = {name: np.mean(values) for name, values in kl.items()}
    density = (f > 0).double().mean(dim=0)
    encoder = torch.nn.functional.normalize(sae.W_enc.T, dim=1).detach()
    decoder = torch.nn.functional.normalize(sae.W_dec, dim=1).detach()
    apart = 2 * torch.eye(sae.d_sae)
    nearest = {"encoder": (encoder @ encoder.T - apart).amax(dim=1), "decoder": (decoder @ decoder.T - apart).amax(dim=1)}
    metrics = {
        "model_behavior_preservation": {
            "kl_div_score": (kl_mean["zero"] - kl_mean["sae"]) / kl_mean["zero"],
            "kl_div_with_ablation": kl_mean["zero"],
            "kl_div_with_sae": kl_mean["sae"],
        },
        "model_performance_preservation": {
            "ce_loss_score": (ce["zero"] - ce["sae"]) / (ce["zero"] - ce["clean"]),
            "ce_loss_with_ablation": ce["zero"],
            "ce_loss_with_sae": ce["sae"],
            "ce_loss_without_sae": ce["clean"],
        },
        "reconstruction_quality": {
            "explained_variance": 1 - squares.sum() / around.sum(),
            "explained_variance_legacy": (1 - squares / around).mean(),
            "mse": (x - x_hat).square().mean(),
            "cossim": torch.nn.functional.cosine_similarity(x, x_hat, dim=1).mean(),
        },
        "shrinkage": {
            "l2_norm_in": x.norm(dim=1).mean(),
            "l2_norm_out": x_hat.norm(dim=1).mean(),
            "l2_ratio": (x_hat.norm(dim=1) / x.norm(dim=1)).mean(),
            "relative_reconstruction_bias": x_hat.square().sum() / (x * x_hat).sum(),
        },
        "sparsity": {"l0": (f > 0).double().sum(dim=1).mean(), "l1": f.sum(dim=1).mean()},
        "token_stats": dict.fromkeys(CATEGORIES["token_stats"].split(), len(x)),
        "misc_metrics": {
            "freq_over_1_percent": (density > 0.01).double().mean(),
            "freq_over_10_percent": (density > 0.1).double().mean(),
            "normalized_freq_over_1_percent": density[density > 0.01].sum() / density.sum(),
            "normalized_freq_over_10_percent": density[density > 0.1].sum() / density.sum(),
            "average_max_encoder_cosine_sim": nearest["encoder"].mean(),
            "average_max_decoder_cosine_sim": nearest["decoder"].mean(),
            "frac_alive": (density > 0).double().mean(),
        },
    }
    counts = (f > 0).sum(dim=0).numpy()
    details = [
        {
            "feature_density": density[number],
            "consistent_activation_heuristic": counts[number] / prompts[number] if prompts[number] else -1,
            "encoder_bias": sae.b_enc[number].item(),
            "encoder_norm": sae.W_enc[:, number].norm().item(),
            "encoder_decoder_cosine_sim": encoder[number] @ decoder[number],
            "max_decoder_cosine_sim": nearest["decoder"][number],
            "max_encoder_cosine_sim": nearest["encoder"][number],
        }
        for number in range(sae.d_sae)
    ]
    return metrics, details


def test_every_value_is_the_formulas_own(tree: dict, tmp_path: Path):
    run = resolve(parse_config(tree))
    steps.extract(run)
    steps.train(run)
    result, printed = written(tree, tmp_path)
    assert {name: type(value) for name, value in result.items()} == TOP
    assert {name: type(value) for name, value in result["eval_config"].items()} == CONFIG
    assert {name: set(values) for name, values in result["eval_result_metrics"].items()} == {
        name: set(fields.split()) for name, fields in CATEGORIES.items()
    }
    assert all(set(row) == {"index", *DETAILS.split()} for row in result["eval_result_details"])
    expected, details = brute(run, 400)
    for category, values in expected.items():
        for name, value in values.items():
            found = result["eval_result_metrics"][category][name]
            assert found == pytest.approx(float(value), rel=2e-4, abs=2e-6), (category, name)
            assert isinstance(found, int if category == "token_stats" else float), name
    for number, (row, values) in enumerate(zip(result["eval_result_details"], details, strict=True)):
        assert row["index"] == number
        for name, value in values.items():
            assert row[name] == pytest.approx(float(value), rel=2e-4, abs=2e-6), (number, name)
    kept = printed["metrics"]
    assert result["eval_result_metrics"]["model_performance_preservation"]["ce_loss_score"] == kept["loss_recovered"]
    assert result["sae_cfg_dict"] == json.loads(Path(run.sae_url, "cfg.json").read_text())
    assert Path(printed["saebench"]).name == f"tiny_{Path(run.sae_url).name}_eval_results.json"


def test_an_sae_made_elsewhere_has_one_too_and_another_format_is_refused(tiny_tree: dict, tmp_path: Path):
    from components.interop.saelens import saelens_files
    from components.sae.architectures.gated import GatedSAE, GatedSettings

    sae = GatedSAE.autoencoder(GatedSettings(d_sae=64), 32)
    sae.initialise(seed=1)
    torch.nn.init.normal_(sae.b_mag, generator=torch.Generator().manual_seed(2))
    (tmp_path / "given").mkdir()
    for name, content in saelens_files(sae, {"hook_name": "blocks.1.hook_resid_post"}).items():
        (tmp_path / "given" / name).write_bytes(content)
    tiny_tree["evaluation"] = {"tokens": 200, "reference_tokens": 500, "baselines": []}
    result, printed = written(tiny_tree, tmp_path, "--sae", str(tmp_path / "given"))
    biases = [row["encoder_bias"] for row in result["eval_result_details"]]
    assert biases == pytest.approx(sae.b_mag.tolist())
    assert result["eval_result_metrics"]["sparsity"]["l0"] == printed["metrics"]["l0"]
    done = CliRunner().invoke(app, ["evaluate", "quickstart", "--format", "csv"])
    assert done.exit_code == 2
