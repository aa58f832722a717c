"""Retraining on a corpus that gained 10%, from the champion and from new weights: `python benchmarks/warm_start.py --help`.

The champion is the configuration as it is. Then its corpus gains `--gain` of its training text, and coders are trained on that
for each of `--tokens`: from the champion, from new weights of the same seed, and, for the longest, of another seed. Each is
measured on the champion's held-out text and its features are compared with the champion's. Trains and evaluates as `sae train`
and `sae evaluate` would, into the storage root of the configuration, where what is there is reused. One line of JSON each.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from components import steps, storage
from components.evaluation import stability
from components.run.checks import check
from components.run.config import load_config
from components.run.specification import Specification, resolve

SHOWN = ("loss_recovered", "l0", "explained_variance", "dead_fraction")
KEPT = (*stability.SHARES, *stability.COUNTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?", default="quickstart")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="overrides")
    parser.add_argument("--gain", type=float, default=0.1, help="by which share the training text grows")
    lengths = [100_000, 200_000, 400_000, 667_000, 1_000_000, 2_000_000]
    parser.add_argument("--tokens", type=int, nargs="+", default=lengths, help="lengths of the retraining")
    parser.add_argument("--retraining", action="append", default=[], metavar="FIELD=VALUE", help="of the retrainings alone")
    parser.add_argument("--only-champion", action="store_true", help="nothing from new weights")
    arguments = parser.parse_args()
    base = [*arguments.overrides, "evaluation.baselines=[]"]
    champion = resolve(load_config(arguments.config, base))
    print(json.dumps({"kind": "champion", **_measured(champion)}), flush=True)
    grown = round(champion.config.corpus.train_tokens * (1 + arguments.gain))
    earlier = _dictionary(champion)
    for tokens in sorted(arguments.tokens):
        kinds = {"champion": [f"training.start_from={champion.sae_url}"], "new weights": []}
        if tokens == max(arguments.tokens):
            kinds["new weights, another seed"] = [f"seed={champion.config.seed + 1}"]
        for kind, fields in list(kinds.items())[: 1 if arguments.only_champion else None]:
            changed = [f"corpus.train_tokens={grown}", f"training.tokens={tokens}", *fields, *arguments.retraining]
            run = resolve(load_config(arguments.config, [*base, *changed]))
            metrics = _measured(run)
            found, _ = stability.compare(_dictionary(run), earlier)
            shares = {name: found[name] for name in KEPT}
            print(json.dumps({"kind": f"from {kind}", "tokens": tokens, **metrics, **shares}), flush=True)


def _measured(run: Specification) -> dict[str, Any]:
    check(run)
    steps.extract(run)
    steps.train(run)
    metrics = steps.evaluate(run).metrics
    return {name: metrics[name] for name in SHOWN}


def _dictionary(run: Specification) -> stability.Dictionary:
    with storage.local_copies(run.sae_url, stability.FILES) as folder:
        return stability.Dictionary.read(Path(folder))


if __name__ == "__main__":
    main()
