"""What a sweep recommends for three times its largest budget, against five random settings of the same budget, all trained:
`python benchmarks/recommended.py SWEEP.json [FIELD=VALUE ...]`, with the fields that the sweep's configuration sets.

The random settings are drawn, and printed with the prediction, before anything is trained: features log-uniformly from
256 to 8,192, one of four learning rates, and the tokens that the budget leaves.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np

from components import steps
from components.run.config import load_config
from components.run.specification import Specification, resolve
from components.sweeps.grid import Child, child_of
from components.sweeps.recommendation import recommend
from components.sweeps.record import load_sweep
from components.sweeps.scaling import fit_sweep
from components.sweeps.work import in_a_process

TIMES = 3
DRAWN = 5
SEED = 0
RATES = (1e-3, 2e-3, 4e-3, 8e-3)


def drawn(base: Specification, flops: float, flops_per_feature: float) -> list[dict[str, Any]]:
    generator = np.random.default_rng(SEED)
    found = []
    for _ in range(DRAWN):
        features = 8 * round(float(np.exp(generator.uniform(np.log(256), np.log(8192)))) / 8)
        size = base.config.training.batch_size
        tokens = max(1, round(flops / flops_per_feature / features / size)) * size
        found.append(
            {"sae.d_sae": features, "training.tokens": tokens, "training.learning_rate": float(generator.choice(RATES))}
        )
    return found


def main() -> None:
    record, base = load_sweep(sys.argv[1]), resolve(load_config("quickstart", sys.argv[2:]))
    fit = fit_sweep(record, base.config)
    budget = TIMES * max(point.flops_dense for point in fit.everything)
    found = recommend(base, fit, flops=budget)
    settings = [found.set, *drawn(base, budget, fit.flops_per_feature)]
    print(found.model_dump_json(indent=2))
    print(json.dumps(settings[1:], indent=2), flush=True)
    everyone: list[Child] = [child_of(base, values) for values in settings]
    steps.extract(base)
    in_a_process(everyone)
    measured = [record.metrics for record in steps.evaluate_together([child.run for child in everyone])]
    print("\n| features | tokens | learning rate | loss | loss recovered | dead |\n|---|---|---|---|---|---|")
    for values, metrics in zip(settings, measured, strict=True):
        print(
            f"| {values['sae.d_sae']:,} | {values['training.tokens']:,} | {values['training.learning_rate']:g} "
            f"| {metrics['normalized_mse']:.4f} | {metrics['loss_recovered']:.4f} | {metrics['dead_fraction']:.2f} |"
        )
    loss, predicted = float(measured[0]["normalized_mse"] or np.nan), found.loss
    best = min(float(metrics["normalized_mse"] or np.nan) for metrics in measured[1:])
    print(
        f"\nrecommended: {loss:.4f}, {loss / predicted.value - 1:+.1%} from the prediction {predicted.value:.4f} "
        f"({predicted.low:.4f} to {predicted.high:.4f}); the best of {DRAWN} random settings: {best:.4f}"
    )


if __name__ == "__main__":
    main()
