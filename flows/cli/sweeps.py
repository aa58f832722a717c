"""`sae sweep` and `sae recommend`. Heavy imports wait until a command needs them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.line import alone, checked, prepare_prefect
from flows.cli.terminal import AsJson, Config, Overrides, command, log_to_stderr, terminal

if TYPE_CHECKING:
    from rich.table import Table

    from components.sweeps.grid import SweepSettings
    from components.sweeps.scaling import Scaling


def sweep(
    config: Config,
    grid: Annotated[
        list[str] | None,
        typer.Option("--grid", metavar="FIELD=VALUE,VALUE", help="Values of a field: `--grid sae.k=8,12,20`. Repeatable."),
    ] = None,
    space: Annotated[
        list[str] | None,
        typer.Option(
            "--space",
            metavar="FIELD=LOW..HIGH[:log]",
            help="In place of a grid: what Optuna draws a field from, a range or `value,value`. Repeatable.",
        ),
    ] = None,
    overrides: Overrides = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Children that a study draws in all; 30 without.")] = None,
    together: Annotated[int | None, typer.Option(min=1, help="Drawn at once, and trained in lockstep; 4 without.")] = None,
    objective: Annotated[str | None, typer.Option(help="loss, explained_variance or loss_recovered.")] = None,
    pruner: Annotated[str | None, typer.Option(help="median or halving: trainings that promise less are given up.")] = None,
    study_storage: Annotated[
        str | None, typer.Option(metavar="URL", help="PostgreSQL for the study; SQLite in the sweep's folder without.")
    ] = None,
    memory_gb: Annotated[
        float | None,
        typer.Option("--memory-gb", min=0.001, help="What coders in lockstep may take together; most of what is free without."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train and measure every combination of a grid's values, or what an Optuna study draws, on one activation dataset.

    Children that share a batch size are trained in lockstep, as many as fit into memory; with `execution.workers` or a
    `runner` in groups at the same time. Killed and called again, it goes on; a child that diverges or fails is marked with the
    reason. Leaves `sweep.json` under `sweeps/` of the storage root, and one MLflow run with a child run each.
    """
    with command(as_json) as show:
        from components.settings import UserError

        log_to_stderr()
        asked = {"trials": trials, "together": together, "objective": objective, "pruner": pruner, "storage": study_storage}
        study = {name: value for name, value in asked.items() if value is not None}
        if bool(grid) == bool(space):
            raise UserError("--grid or --space: give one of them, such as --grid sae.k=8,12 or --space sae.k=8..64:log")
        if study and not space:
            raise UserError(f"--{next(iter(study))}: it is of a study, which needs --space")
        settings = _settings(grid or (), space or (), study, memory_gb)
        base = checked(config, overrides)
        from components.sweeps.conduct import check_sweep, conduct

        check_sweep(base, settings)
        if alone(base):
            url, record = conduct(base, settings)
        else:
            prepare_prefect()
            from flows.sweep import swept

            url, record = swept(base, settings)
        from components.sweeps.findings import findings

        show(
            {"url": url, **record.model_dump(mode="json"), **findings(record, base.config).model_dump(mode="json")}, print_sweep
        )


def _settings(grid: Sequence[str], space: Sequence[str], study: dict[str, Any], memory_gb: float | None) -> SweepSettings:
    from pydantic import ValidationError

    from components.run.config import error_sentence
    from components.settings import UserError
    from components.sweeps.grid import SweepSettings, parse_grid
    from components.sweeps.space import parse_space

    tree: dict[str, Any] = {"memory_gb": memory_gb}
    tree |= {"grid": parse_grid(grid)} if grid else {"study": {"space": parse_space(space), **study}}
    try:
        return SweepSettings.model_validate(tree)
    except ValidationError as error:
        raise UserError(error_sentence(error.errors()[0])) from error


def recommend(
    config: Config,
    sweep: Annotated[str, typer.Option("--sweep", metavar="SWEEP.json", help="What `sae sweep` has written.")],
    overrides: Overrides = None,
    flops: Annotated[float | None, typer.Option(min=1, help="Budget of the training in dense FLOPs, such as 1e18.")] = None,
    gpu_hours: Annotated[float | None, typer.Option(min=1e-6, help="Budget in hours of the GPU that --gpu names.")] = None,
    gpu: Annotated[str | None, typer.Option(help="a100, h100, h200 or l4.")] = None,
    utilisation: Annotated[float, typer.Option(min=0.001, max=1, help="Share of the GPU's peak that training reaches.")] = 0.3,
    features: Annotated[int | None, typer.Option(min=1, help="A number of features instead of a budget.")] = None,
    write: Annotated[Path | None, typer.Option(help="Write the configuration to train here, as YAML.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what to train for a budget, or for a number of features: size, length, learning rate, and the loss to expect.

    Beyond the sweep it extrapolates, and says so; what the fit does not carry is refused.
    """
    with command(as_json) as show:
        from components.settings import UserError

        if sum(given is not None for given in (flops, gpu_hours, features)) != 1:
            raise UserError("--flops, --gpu-hours or --features: give exactly one of them")
        if (gpu is None) != (gpu_hours is None):
            raise UserError("--gpu-hours and --gpu go together: such as --gpu-hours 100 --gpu h100")
        from components.sweeps.record import load_sweep

        record = load_sweep(sweep)
        base = checked(config, overrides, evaluated=False)
        from components.sweeps.recommendation import flops_of, with_values
        from components.sweeps.recommendation import recommend as recommended
        from components.sweeps.scaling import fit_sweep

        assumed = None
        if gpu is not None and gpu_hours is not None:
            flops, assumed = flops_of(gpu, gpu_hours, utilisation, base.config.training.autocast)
        found = recommended(base, fit_sweep(record, base.config), flops, features, assumed)
        result = {**found.model_dump(mode="json"), "written": None}
        if write is not None:
            import yaml

            tree = with_values(base, found.set).config.model_dump(mode="json")
            write.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")
            result["written"] = str(write)
        show(result, print_recommendation)


def print_sweep(found: dict[str, Any]) -> None:
    from rich.table import Table

    from components.sweeps.scaling import Scaling

    fields = list(found["grid"])
    table = Table(
        *(field.partition(".")[2] for field in fields), "loss", "L0", "EV", "recovered", "FLOPs", "sparse",
        title=f"{found['name']}: {len(found['points'])} children",
    )  # fmt: skip
    for point in found["points"]:
        values = [str(point["values"][field]) for field in fields]
        if point["status"] != "finished":
            table.add_row(*values, f"[red]{point['status']}[/]", "", "", "", _flops(point["flops_dense"]), "")
            continue
        numbers = {name: point[name] for name in ("loss", "l0", "explained_variance", "loss_recovered")}
        costs = [point["flops_dense"], point["flops_sparse"]]
        table.add_row(
            *values,
            *("-" if number is None else f"{number:.{1 if name == 'l0' else 4}f}" for name, number in numbers.items()),
            *("-" if cost is None else _flops(cost) for cost in costs),
        )
    console = terminal()
    console.print(table)
    for point in found["points"]:
        if point["reason"]:
            setting = ", ".join(f"{field} {value}" for field, value in point["values"].items())
            console.print(f"{setting}: {point['status']}: {point['reason']}", markup=False, highlight=False)
    if found["laws"] is not None:
        console.print(_laws(Scaling.model_validate(found["laws"])))
    elif found["no_laws"]:
        console.print(f"no laws: {found['no_laws']}", markup=False, highlight=False)
    sparsity = found["sparsity"]
    if sparsity is not None:
        beyond = ", at an end of what was tried: the least may lie beyond" if sparsity["at_the_end"] else ""
        said = f"decoder rows are least alike (a proxy, arXiv 2508.16560) at k {sparsity['k']}, L0 {sparsity['l0']:.1f}{beyond}"
        console.print(said, markup=False, highlight=False)
    console.print(f"{found['url']}/sweep.json and sweep.html, MLflow run {found['mlflow_run']}", markup=False, highlight=False)


def _flops(count: float) -> str:
    return f"{count:.1e}".replace("e+", "e")


def _laws(laws: Scaling) -> Table:
    from rich.table import Table

    from components.sweeps.page import laws_table

    at = "" if laws.k is None else f" at k {laws.k}"
    table = Table(
        "law",
        "value",
        "90% interval",
        title=f"Laws of the normalised MSE{at}, through {laws.points} settings; C in dense FLOPs",
    )
    for row in laws_table(laws):
        table.add_row(*row)
    return table


def print_recommendation(found: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(title="What to train", show_header=False)
    for field, value in found["set"].items():
        table.add_row(field, f"{value:,}" if isinstance(value, int) else f"{value:g}")
    if found["k"] is not None:
        table.add_row("sae.k", f"{found['k']} (CONFIG's)")
    table.add_row("steps", f"{found['steps']:,}")
    sparse = "" if found["flops_sparse"] is None else f"; {found['flops_sparse']:.3g} sparse"
    table.add_row("FLOPs", f"{found['flops_dense']:.3g} dense{sparse}")
    loss = found["loss"]
    table.add_row("expected loss", f"{loss['value']:.4f} (90%: {loss['low']:.4f} to {loss['high']:.4f}), normalised MSE")
    table.add_row("learning rate", found["learning_rate_said"])
    beyond = ", ".join(f"{name} {times:g} times the sweep's nearest" for name, times in found["extrapolates"].items())
    table.add_row("extrapolates", beyond or "no: all within the sweep")
    if found["law_alone"] is not None:
        said = f"nothing further beyond the sweep than the budget; the law alone would have {found['law_alone']:,} features"
        table.add_row("kept to", said)
    if found["assumed"]:
        table.add_row("assumed", found["assumed"])
    if found["written"]:
        table.add_row("written", found["written"])
    terminal().print(table)
