"""Quality of a configuration over a grid of recipes: `python benchmarks/sweep.py quickstart --help`.

Extracts once, then trains and evaluates each point of the grid as `sae train` and `sae evaluate` would, into the
storage root of the configuration (what is there is reused). Prints one line of JSON per point.
"""

from __future__ import annotations

import argparse
import itertools
import json

from components import steps
from components.config import load_config
from components.planning import Plan, check

SHOWN = ("explained_variance", "l0", "loss_recovered", "dead_fraction")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="overrides")
    parser.add_argument("--lambda", type=float, nargs="+", default=[1.2], dest="coefficients")
    parser.add_argument("--learning-rate", type=float, nargs="+", default=[4e-3], dest="rates")
    arguments = parser.parse_args()
    for coefficient, rate in itertools.product(arguments.coefficients, arguments.rates):
        point = [f"training.sparsity_coefficient={coefficient}", f"training.learning_rate={rate}"]
        plan = Plan(load_config(arguments.config, [*arguments.overrides, *point]))
        check(plan)
        steps.extract(plan)
        steps.train(plan)
        metrics = steps.evaluate(plan)["metrics"]
        line = {"hook_point": plan.hook_point, "lambda": coefficient, "learning_rate": rate}
        print(json.dumps({**line, **{name: metrics[name] for name in SHOWN}}), flush=True)


if __name__ == "__main__":
    main()
