"""Which architecture explains most at equal L0, ours and the peers': `python benchmarks/quality.py quickstart --help`.

Everything reads the same batches of the configuration's activations (`sae extract` makes them), has the same number of
features, and is measured by our own evaluation on held-out documents. Each architecture is trained at three sparsities for
every seed; values at equal L0 are interpolated between those. What is trained is kept under the storage root and used again.
Prints a Markdown table and writes a picture.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from components import storage
from components.evaluation.evaluate import HeldOut, evaluate, reference_statistics
from components.evaluation.settings import EvaluationSettings
from components.interop.formats import given_sae
from components.language_model.loading import load_model
from components.run.config import load_config
from components.run.specification import Specification, resolve
from components.sae.architectures import architectures
from components.settings import digest
from components.training.job import Training, read_training_record
from components.training.loop import train_together

SPARSITIES: dict[str, tuple[str, tuple[float, ...], float, dict[str, Any]]] = {
    "relu": ("sparsity_coefficient", (1.2, 2.0, 3.4), 4e-3, {}),
    "gated": ("sparsity_coefficient", (2.5, 4.0, 6.0), 4e-3, {}),
    "jumprelu": ("sparsity_coefficient", (0.7, 1.2, 3.0), 4e-3, {}),
    "topk": ("k", (7, 12, 20), 4e-3, {}),
    "batchtopk": (
        "k",
        (7, 12, 20),
        4e-3,
        {"decoder_bias_init": "mean", "decoder_token_share": 0.5, "subtract_decoder_bias": True},
    ),
    "matryoshka": ("k", (7, 12, 20), 4e-3, {}),
}
"""Of ours: the field that decides sparsity, its values, the learning rate, and settings that are not the defaults. `batchtopk`
is the quickstart's."""

_K = ("k", (7, 12, 20))
_ANTHROPIC = {
    "jumprelu_sparsity_loss_mode": "tanh", "jumprelu_bandwidth": 2.0, "jumprelu_init_threshold": 0.1,
    "pre_act_loss_coefficient": 3e-6, "jumprelu_ste_to_input": True,
}  # fmt: skip
PEERS: dict[str, tuple[str, tuple[float, ...], dict[str, Any]]] = {
    "saelens standard": ("l1_coefficient", (1.2, 2.0, 3.4), {}),
    "saelens gated": ("l1_coefficient", (2.0, 3.4, 5.6), {}),
    "saelens jumprelu": ("l0_coefficient", (0.25, 0.4, 0.7), _ANTHROPIC),
    "saelens topk": (*_K, {}),
    "saelens batchtopk": (*_K, {"topk_threshold_lr": 0.1}),
    "saelens matryoshka": (*_K, {"matryoshka_widths": [0.25, 0.5, 1.0], "topk_threshold_lr": 0.1}),
    "dictionary_learning standard": ("l1_penalty", (0.2, 0.28, 0.4), {}),
    "dictionary_learning gated": ("l1_penalty", (0.3, 0.42, 0.6), {}),
    "dictionary_learning jumprelu": ("target_l0", (7, 12, 20), {}),
    "dictionary_learning topk": (*_K, {}),
    "dictionary_learning batchtopk": (*_K, {}),
    "dictionary_learning matryoshka": (*_K, {"group_fractions": [0.25, 0.25, 0.5]}),
    "sparsify topk": (*_K, {}),
}
"""Of the peers (`quality_peers.py`): the same. JumpReLU of SAELens as its documentation has it for Anthropic's form."""

RATES: dict[str, dict[str, dict[str, Any]]] = {
    "ours": {
        "saelens": {"learning_rate": 4e-3, "batch_size": 1_024, "warmup": 0.0},
        "dictionary_learning": {"learning_rate": 4e-3, "batch_size": 1_024, "warmup": 0.0},
        "sparsify": {"learning_rate": 4e-3, "batch_size": 1_024, "warmup": 0.0, "optimizer": "adam", "auxk_alpha": 1 / 32},
    },
    "theirs": {
        "saelens": {"learning_rate": 3e-4, "batch_size": 4_096, "warmup": 0.0},
        "dictionary_learning": {"learning_rate": None, "batch_size": 2_048, "warmup": 0.05},
        "sparsify": {"learning_rate": None, "batch_size": 2_048, "warmup": 0.0},
    },
}
"""How peers are trained: as ours are, and by the defaults of their libraries. (None: they choose it, by kind and `d_sae`. Of
sparsify all but the batch, which would be 65,536 tokens.)"""

AT_L0 = (8.0, 12.0, 16.0)
MEASURED = ("l0", "explained_variance", "loss_recovered", "dead_fraction")


def ours(plan: Specification, root: str, names: list[str], seed: int, tokens: int, kept: bool) -> dict[tuple[str, float], str]:
    """Where the artifact of each architecture at each sparsity is, trained in lockstep if it was not there. kept: only those
    that are there."""
    jobs: dict[tuple[str, float], Training] = {}
    base = plan.training()
    for name in names:
        field, values, rate, more = SPARSITIES[name]
        kind = architectures()[name].Settings
        changed = {"tokens": tokens, "learning_rate": rate, "checkpoint_tokens": tokens, "dead_after_tokens": tokens // 10}
        settings = base.settings.model_copy(update={**changed, "batch_size": 1_024})
        for value in values:
            coder = kind.model_validate({"d_sae": plan.d_sae, field: value, **more})
            identity = {"coder": coder.identity(plan.d_in), "training": settings.model_dump(), "seed": seed}
            key = digest(identity)
            jobs[name, value] = dataclasses.replace(
                base, url=storage.join(root, key), digest=key, identity=identity, settings=settings, coder=coder, seed=seed
            )
    if kept:
        jobs = {key: job for key, job in jobs.items() if read_training_record(job.url)}
    elif jobs:
        train_together(list(jobs.values()), torch.device("cpu"))
    return {key: job.url for key, job in jobs.items()}


def theirs(
    plan: Specification, root: str, names: list[str], how: str, seed: int, tokens: int, peers: Path, kept: bool
) -> dict[tuple[str, float], str]:
    """The same of peers, trained by their own libraries on our batches in a process that sees them; what they could not train
    is left out, after their own words on why."""
    found, missing = {}, {}
    for name in names:
        field, values, more = PEERS[name]
        library, _, architecture = name.partition(" ")
        rates = dict(RATES[how][library])
        fixed = {key: rates.pop(key) for key in ("learning_rate", "batch_size", "warmup")}
        for value in values:
            work = {
                "library": library, "architecture": architecture, "options": {field: value, **more, **rates}, **fixed,
                "tokens": tokens, "seed": seed, "d_sae": plan.d_sae, "dataset_url": plan.dataset_url,
                "hook_point": plan.hook_point,
            }  # fmt: skip
            folder = storage.join(root, f"{library}-{digest(work)}")
            if not Path(folder).is_dir():
                missing[folder] = work
            found[f"{name}, {how}", value] = folder
    if missing and not kept:
        works = Path(root) / "peers.json"
        works.write_text(json.dumps(missing))
        path = os.pathsep.join([str(Path(__file__).parents[1]), str(peers)])
        command = [sys.executable, str(Path(__file__).with_name("quality_peers.py")), str(works)]
        subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": path})
    return {key: folder for key, folder in found.items() if Path(folder).is_dir()}


def measured(plan: Specification, urls: dict[tuple[str, float], str], tokens: int) -> dict[tuple[str, float], dict[str, float]]:
    """What our evaluation says of each, kept beside it."""
    settings = EvaluationSettings(tokens=tokens, baselines=(), neighbours=0)
    manifest, device = plan.token_manifest(), torch.device("cpu")
    assert manifest is not None
    text, model = HeldOut(url=plan.token_url, manifest=manifest), load_model(plan.source, device)
    reference = reference_statistics(model, plan.point, text, settings.reference_tokens, settings.batch_sequences, device)
    found = {}
    for key, url in urls.items():
        kept = Path(url) / f"quality-{tokens}.json"
        if not kept.is_file():
            sae = given_sae(Path(url), url).load(device, reference.mean_norm)
            metrics = evaluate(settings, sae, sae.d_sae, model, plan.point, text, reference, device).metrics
            kept.write_text(json.dumps({name: metrics[name] for name in MEASURED}))
        found[key] = json.loads(kept.read_text())
        print(json.dumps({"what": key, **found[key]}), file=sys.stderr, flush=True)
    return found


def interpolated(points: list[dict[str, float]], l0: float, metric: str) -> float:
    """A metric at an L0 between those of `points`, not a number outside: what is lost, in logarithms of both."""
    points = sorted(points, key=lambda point: point["l0"])
    x = np.log([point["l0"] for point in points])
    lost = np.log([1 - point[metric] for point in points])
    return float(1 - np.exp(np.interp(np.log(l0), x, lost, left=np.nan, right=np.nan)))


Runs = dict[str, dict[int, list[dict[str, float]]]]
"""By architecture and seed: one point for each sparsity."""


def at_l0(seeds: dict[int, list[dict[str, float]]], l0: float, metric: str) -> np.ndarray:
    """The metric there of each seed, not a number where what was trained does not reach it."""
    return np.array([interpolated(points, l0, metric) for points in seeds.values()])


def table(runs: Runs) -> str:
    """At equal L0, best first: mean over seeds and half of what lies between the largest and the smallest."""
    columns = [(metric, l0) for metric in ("explained_variance", "loss_recovered") for l0 in AT_L0]
    head = ["architecture", *(f"{metric} at {l0:g}" for metric, l0 in columns), "L0", "dead_fraction", "seeds"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]

    def best_first(name: str) -> float:
        values = at_l0(runs[name], 12.0, "loss_recovered")
        return -np.mean(values) if np.isfinite(values).all() else np.inf

    for name in sorted(runs, key=best_first):
        cells = []
        for metric, l0 in columns:
            values = at_l0(runs[name], l0, metric)
            spread = f"{values.mean():.4f} ± {np.ptp(values) / 2:.4f}"
            cells.append(spread if np.isfinite(values).all() else "-")
        reached = [np.mean([point["l0"] for point in points]) for points in zip(*runs[name].values(), strict=True)]
        dead = max(point["dead_fraction"] for points in runs[name].values() for point in points)
        cells += [", ".join(f"{l0:.1f}" for l0 in reached), f"{dead:.3f}", str(len(runs[name]))]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def margins(runs: Runs, default: str) -> str:
    """What the default leaves of the loss at equal L0, against the best peer."""
    lines = []
    for l0 in AT_L0:
        left = {name: 1 - at_l0(seeds, l0, "loss_recovered").mean() for name, seeds in runs.items()}
        peers = {name: value for name, value in left.items() if "," in name and np.isfinite(value)}
        if peers and np.isfinite(left.get(default, np.nan)):
            best = min(peers, key=lambda name: peers[name])
            less = 1 - left[default] / peers[best]
            lines.append(f"at {l0:g}, {default} leaves {left[default]:.4f} and {best} {peers[best]:.4f}: {less:+.1%} less")
    return "\n".join(lines)


_COLOURS = ("tab:gray", "tab:green", "tab:orange", "tab:blue", "tab:red", "tab:purple")
COLOURS = dict(zip(SPARSITIES, _COLOURS, strict=True))
MARKERS = {"": "o", "saelens": "s", "dictionary_learning": "^", "sparsify": "D"}


def picture(runs: Runs, path: str) -> None:
    """Means over seeds, where the L0 is one that is compared at; the colour is the architecture's, filled are ours. What is
    worse than the worst of ours is outside."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12.5, 5))
    for axis, metric in zip(axes, ("explained_variance", "loss_recovered"), strict=True):
        for name, seeds in runs.items():
            library, _, kind = name.rpartition(",")[0].partition(" ") if "," in name else ("", "", name)
            mean = [
                [np.mean([point[key] for point in points]) for key in ("l0", metric)]
                for points in zip(*seeds.values(), strict=True)
            ]
            l0, value = np.array(sorted(mean)).T
            if not ((l0 > AT_L0[0] / 1.5) & (l0 < AT_L0[-1] * 1.5)).any():
                continue
            colour = COLOURS["relu" if kind == "standard" else kind]
            style = {"ls": "-", "lw": 2.0} if not library else {"ls": ":" if name.endswith("theirs") else "--", "lw": 1.0}
            face = colour if not library else "white"
            axis.plot(l0, 1 - value, marker=MARKERS[library], color=colour, mfc=face, ms=5, label=name, **style)
        axis.set(xlabel="L0", ylabel=f"1 - {metric}", xscale="log", yscale="log", xlim=(AT_L0[0] / 1.35, AT_L0[-1] * 1.5))
        axis.set_xticks([*AT_L0, 24], [*(f"{l0:g}" for l0 in AT_L0), "24"])
        ticks = (0.01, 0.015, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4)
        axis.set_yticks(ticks, [f"{value:g}" for value in ticks])
        lost = {name: [1 - point[metric] for points in seeds.values() for point in points] for name, seeds in runs.items()}
        top = max((max(values) for name, values in lost.items() if "," not in name), default=0.4)
        axis.set_ylim(0.9 * min(min(values) for values in lost.values()), 1.1 * top)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="center right", frameon=False)
    figure.tight_layout(rect=(0, 0, 0.8, 1))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="overrides")
    parser.add_argument("--ours", nargs="*", default=list(SPARSITIES), choices=list(SPARSITIES))
    parser.add_argument("--theirs", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--peers", type=Path, help="folder that pip has installed them in; without it, ours alone")
    parser.add_argument("--rates", nargs="*", default=list(RATES), choices=list(RATES))
    parser.add_argument("--at", action="append", default=[], metavar="NAME=VALUE,VALUE,VALUE", help="other sparsities of one")
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--evaluation-tokens", type=int, default=50_000)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--kept", action="store_true", help="train nothing: a table of what is there")
    parser.add_argument("--picture", default="quality.png")
    arguments = parser.parse_args()
    for name, _, values in (text.partition("=") for text in arguments.at):
        known: dict[str, Any] = SPARSITIES if name in SPARSITIES else PEERS
        known[name] = (known[name][0], tuple(json.loads(f"[{values}]")), *known[name][2:])
    plan = resolve(load_config(arguments.config, arguments.overrides))
    assert plan.dataset_manifest() is not None, "run `sae extract` first"
    root = storage.join(plan.config.storage.root, "quality")
    runs: Runs = defaultdict(dict)
    for seed in range(arguments.seeds):
        urls = ours(plan, root, arguments.ours, seed, arguments.tokens, arguments.kept)
        if arguments.peers:
            for how in arguments.rates:
                urls |= theirs(plan, root, arguments.theirs, how, seed, arguments.tokens, arguments.peers, arguments.kept)
        for (name, _), metrics in measured(plan, urls, arguments.evaluation_tokens).items():
            runs[name].setdefault(seed, []).append(metrics)
    for seeds in runs.values():  # of each seed all sparsities, or none
        complete = max(map(len, seeds.values()))
        for seed in [seed for seed, points in seeds.items() if len(points) < complete]:
            del seeds[seed]
    print(table(runs))
    print(margins(runs, "batchtopk"))
    picture(runs, arguments.picture)


if __name__ == "__main__":
    main()
