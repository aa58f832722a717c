"""Quality of a configuration over a grid of recipes: `python benchmarks/sweep.py quickstart --help`.

Extracts once, then trains and evaluates each point of the grid as `sae train` and `sae evaluate` would, into the
storage root of the configuration (what is there is reused). Prints one line of JSON per point. In MLflow each point is a
child run of one parent run, which the same grid continues.
"""

from __future__ import annotations

import argparse
import itertools
import json

from components import steps
from components.run.checks import check
from components.run.config import load_config
from components.run.specification import resolve
from components.settings import digest
from components.tracking.runs import PARENT_TAG, tracked_run

SHOWN = ("explained_variance", "l0", "loss_recovered", "dead_fraction")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="overrides")
    parser.add_argument("--lambda", type=float, nargs="+", default=[1.2], dest="coefficients")
    parser.add_argument("--learning-rate", type=float, nargs="+", default=[4e-3], dest="rates")
    arguments = parser.parse_args()
    grid = {"lambda": arguments.coefficients, "learning_rate": arguments.rates}
    base = load_config(arguments.config, arguments.overrides)
    name = f"sweep of {base.name}"
    identity = digest([name, grid, resolve(base).run_digest])
    with tracked_run(base.tracking, base.storage.root, name, identity, grid, {"sae.kind": "sweep"}) as parent:
        for coefficient, rate in itertools.product(arguments.coefficients, arguments.rates):
            point = [f"sae.sparsity_coefficient={coefficient}", f"training.learning_rate={rate}"]
            plan = resolve(load_config(arguments.config, [*arguments.overrides, *point]))
            check(plan)
            steps.extract(plan)
            with steps.tracked(plan, {PARENT_TAG: parent.run_id}) as child:
                steps.train(plan, child.add_points)
                metrics = steps.evaluate(plan).metrics
                steps.log_results(plan, child)
            line = {"hook_point": plan.hook_point, "lambda": coefficient, "learning_rate": rate}
            print(json.dumps({**line, **{name: metrics[name] for name in SHOWN}}), flush=True)


if __name__ == "__main__":
    main()
