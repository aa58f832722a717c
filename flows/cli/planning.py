"""`sae plan`: what a run would take, here or elsewhere. Heavy imports wait until a command needs them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from flows.cli.line import checked
from flows.cli.tables import print_plan
from flows.cli.terminal import AsJson, Config, Overrides, command, terminal


def plan(
    config: Config,
    overrides: Overrides = None,
    on: Annotated[
        list[str] | None,
        typer.Option(
            "--on",
            metavar="FIELD=VALUE",
            help="For a run elsewhere: gpu=h100, ranks=64, extraction_workers=8, prices (gpu_hour=2.5, gb_month=0.023), ...",
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="FIELD=VALUE",
            help="A language model that is not here: parameters=70e9, layers=80, width=8192, dtype=bfloat16.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a run would do, without doing it: digests, what exists, tokens, bytes, memory, FLOPs, steps.

    With `--on` for a run that does not fit here: memory of a rank, ranks, bytes and requests of the store, hours and cost. What
    cannot be is refused, with what to change.
    """
    with command(as_json) as show:
        if not on and not model:
            from components.run.estimate import estimate

            show(estimate(checked(config, overrides, evaluated=None)), print_plan)
            return
        from components.planning.place import parse_model, parse_place
        from components.planning.plan import plain
        from components.planning.plan import plan as planned
        from components.planning.shape import shape_of, shape_on_paper
        from components.run.config import load_config

        place = parse_place(on or ())
        if model:
            shape = shape_on_paper(load_config(config, overrides or ()), parse_model(model))
        else:
            shape = shape_of(checked(config, overrides, evaluated=None))
        show(plain(planned(shape, place)), _print)


def _print(found: dict[str, Any]) -> None:
    from rich.table import Table

    memory, asked = found["memory"], found["requests"]
    table = Table("part", "what", title=f"{found['name']} on {found['gpu']} ({found['gpu_bytes'] / 1e9:g} GB)")
    parts = ", ".join(
        f"{name} {_bytes(memory[name])}"
        for name in ("parameters", "gradients", "optimizer", "activations", "tiles")
        if memory[name]
    )
    table.add_row("training, a rank", f"{_bytes(memory['peak'])}: {parts}")
    table.add_row("", f"in the machine's memory {_bytes(memory['host'])} more")
    table.add_row("ranks", f"{found['ranks']:,}; at least {found['ranks_needed']:,} hold the coder")
    for name in ("extraction", "training"):
        hours = found[name]
        table.add_row(
            name, f"{hours['hours']:,.1f} h, {hours['gpu_hours']:,.0f} GPU hours, {hours['tokens_per_second']:,.0f} tokens/s"
        )
    table.add_row("language model", f"{found['gpus_per_worker']} GPU(s) for each extraction worker")
    table.add_row(
        "activations",
        f"{_bytes(found['dataset_bytes'])} in {found['shards']:,} shards; {_bytes(asked['peak_bytes'])} while they are "
        f"shuffled, after {found['merges']} levels of merging",
    )
    table.add_row("requests", f"{asked['puts']:,} writing, {asked['gets']:,} reading; training {asked['trained_gets']:,}")
    table.add_row(
        "training reads", f"{_bytes(asked['trained_bytes'])}, {_bytes(found['read_bytes_per_second'])}/s by all ranks"
    )
    for name, title in (("stored_cost", "cost, stored"), ("online_cost", "cost, online")):
        if found[name] is not None:
            cost = found[name]
            parts = ", ".join(f"{part} {value:,.2f}" for part, value in cost.items() if part != "total")
            table.add_row(title, f"{cost['total']:,.2f}: {parts}")
    table.add_row("online", f"{found['online_workers']:,} extraction worker(s) keep the training busy")
    for line in found["said"]:
        table.add_row("", line)
    terminal().print(table)


def _bytes(size: float) -> str:
    for unit, name in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:,.3g} {name}"
    return f"{size:,.0f} B"
