"""`sae features steer` and `effect`: features turned up or down, and what that does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from flows.cli.line import checked
from flows.cli.terminal import AsJson, Config, Overrides, command, printable, terminal

Feature = Annotated[int, typer.Argument(metavar="FEATURE", help="Its number.", min=0)]


def steer(
    config: Config,
    feature: Feature,
    prompt: Annotated[str, typer.Option("--prompt", help="What the model continues.")],
    scale: Annotated[float, typer.Option("--scale", help="Times its largest activation; 0 takes it away.")] = 5.0,
    tokens: Annotated[int, typer.Option("--tokens", help="To be written, the most likely one each time.", min=1)] = 40,
    mode: Annotated[
        Literal["clamp", "scale", "add"],
        typer.Option("--mode", help="Held at that, times as much as it is, or so much more than it is."),
    ] = "clamp",
    positions: Annotated[str, typer.Option("--positions", help="all, prompt, new, or numbers such as 3,4,9.")] = "all",
    save: Annotated[
        Path | None, typer.Option("--save", help="With --mode add: a folder for the steered model, for transformers alone.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Hold a feature at a value while the language model writes, beside what it writes without."""
    with command(as_json) as show:
        from components import steps

        show(steps.steer(checked(config, overrides), feature, scale, prompt, tokens, mode, positions, save), _print_steered)


def effect(
    config: Config,
    feature: Feature,
    scales: Annotated[list[float] | None, typer.Option("--scale", help="Times its largest activation. Repeatable.")] = None,
    texts: Annotated[
        list[str] | None, typer.Option("--text", help="On which it is measured; else everyday ones that ship. Repeatable.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Measure what holding a feature at 0, 2, 5 and 10 times its largest activation does, also to unrelated text."""
    with command(as_json) as show:
        from components import steps

        run = checked(config, overrides)
        show(steps.steering_effect(run, feature, scales or [0.0, 2.0, 5.0, 10.0], texts or []), _print_effect)


def _print_steered(result: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    verb = {"clamp": "held at", "scale": "times", "add": "with"}[result["mode"]]
    table = Table("as it is", f"feature {result['feature']} {verb} {result['held_at']:.4g}", title=Text(result["prompt"]))
    table.add_row(Text(result["plain"]), Text(result["steered"]))
    terminal().print(table)
    if result["saved"] is not None:
        print(result["saved"])


def _print_effect(result: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    console, before = terminal(), result["likely_tokens_before"]
    clean = result["unrelated_loss_before"]
    table = Table("scale", "held at", "its likely tokens", "KL on the texts", "loss on unrelated text")
    as_it_is = ("-" if before is None else f"{before:.3%}", "0", "-" if clean is None else f"{clean:.4f}")
    table.add_row("as it is", "", *as_it_is)
    for row in result["scales"]:
        likely = "-" if row["likely_tokens"] is None else f"{row['likely_tokens']:.3%}"
        loss = "-" if clean is None else f"{row['unrelated_loss_added']:+.4f}"
        table.add_row(f"{row['scale']:g}", f"{row['held_at']:.3g}", likely, f"{row['kl_divergence']:.4f}", loss)
    console.print(Text("makes likely by itself: " + "  ".join(map(printable, result["likely"]))))
    console.print(table)
    unrelated = f"{result['unrelated_tokens']:,} tokens of held-out sequences in which it does not fire"
    if clean is None:
        unrelated = "no unrelated text: it fires in every held-out sequence that was looked at"
    console.print(f"{result['texts']} texts; {unrelated}; nats per token")
