"""`sae features`: what the features of an SAE fire on and do, made, listed and shown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.line import alone, checked, prepare_prefect
from flows.cli.terminal import AsJson, Config, Overrides, command, log_to_stderr, print_tree, printable, terminal

if TYPE_CHECKING:
    from components.interpretation.record import InterpretationRecord
    from components.run.specification import Specification

app = typer.Typer(no_args_is_help=True, help="What an SAE's features fire on, and what they do.")
_SCORES = ("detection", "fuzzing", "intruder", "specificity")
Sort = Annotated[
    str, typer.Option("--sort", help="density, max_activation, mean_activation, one_token (recognised by eye) or feature.")
]


@app.command()
def make(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Find examples of every feature of CONFIG's evaluated SAE, and write the browser (`sae run` does this, too)."""
    with command(as_json) as show:
        log_to_stderr()
        from components import steps

        run = checked(config, overrides)
        record = steps.interpret(run) if alone(run) else _make_on_workers(run)
        found = {} if record is None else record.model_dump(mode="json", exclude={"identity"})
        show({**found, "browser": steps.browser_address(run)}, _print_made)


@app.command(name="list")
def list_(
    config: Config,
    overrides: Overrides = None,
    sort: Sort = "density",
    search: Annotated[
        str, typer.Option("--search", help="Only those with this in a token they fire most on or make likely.")
    ] = "",
    limit: Annotated[int, typer.Option("--limit", min=1)] = 30,
    as_json: AsJson = False,
) -> None:
    """List features with the tokens that they fire most on and make likely."""
    with command(as_json) as show:
        from components import steps

        rows = steps.list_features(checked(config, overrides), sort, search)[:limit]
        show({"features": rows}, _print_list)


@app.command(name="show")
def show_(
    config: Config,
    feature: Annotated[int, typer.Argument(metavar="FEATURE", help="Its number.", min=0)],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Show a feature: examples with what fires marked, what it makes likely, its neighbours."""
    with command(as_json) as show:
        from components import steps

        show(steps.show_feature(checked(config, overrides), feature), _print_feature)


@app.command()
def search(
    config: Config,
    texts: Annotated[list[str] | None, typer.Option("--text", help="A text that they should fire on. Repeatable.")] = None,
    against: Annotated[list[str] | None, typer.Option("--against", help="A text that they should not. Repeatable.")] = None,
    images: Annotated[
        list[Path] | None, typer.Option("--image", help="A picture on which they should fire. Repeatable.")
    ] = None,
    against_images: Annotated[
        list[Path] | None, typer.Option("--against-image", help="A picture on which they should not. Repeatable.")
    ] = None,
    explanation: Annotated[
        str | None, typer.Option("--explanation", help="Words of what was said of them (`sae features explain`).")
    ] = None,
    direction: Annotated[
        Path | None, typer.Option("--direction", help="A .npy of a direction, such as a probe's weights; by cosine.")
    ] = None,
    overrides: Overrides = None,
    limit: Annotated[int, typer.Option("--limit", min=1)] = 20,
    as_json: AsJson = False,
) -> None:
    """Find features by what they fire on (`--text "raise ValueError(x)" --against "return x"`, `--image cat.png`), by
    `--explanation` or by `--direction`."""
    with command(as_json) as show:
        from components import steps
        from components.settings import UserError

        if [bool(texts), bool(images), explanation is not None, direction is not None].count(True) != 1:
            raise UserError("--text, --image, --explanation or --direction: one of them is needed")
        run = checked(config, overrides)
        if explanation is not None:
            show({"features": steps.search_explanations(run, explanation, limit)}, _print_explained)
        elif images:
            show({"features": steps.search_pictures(run, images, against_images or [], limit)}, _print_seen)
        elif direction is not None:
            show({"features": steps.search_direction(run, direction, limit)}, print_tree)
        else:
            show({"features": steps.search_features(run, texts or [], against or [], limit)}, _print_found)


@app.command()
def attribute(
    config: Config,
    prompt: Annotated[str, typer.Option("--prompt", help="What the model continues.")],
    token: Annotated[str, typer.Option("--token", help="A next token.")],
    other: Annotated[str | None, typer.Option("--other", help="Another; else the mean of all.")] = None,
    ablate: Annotated[bool, typer.Option("--ablate", help="Take each away and run on, too: slower, and exact.")] = False,
    passes: Annotated[
        int,
        typer.Option("--passes", help="Forward and backward, to look half way to the ablations; 0 for the gradient.", min=0),
    ] = 32,
    overrides: Overrides = None,
    limit: Annotated[int, typer.Option("--limit", min=1)] = 20,
    as_json: AsJson = False,
) -> None:
    """Find features that bring the model to one next token rather than another: gradient times activation, or ablation."""
    with command(as_json) as show:
        from components import steps

        show(steps.attribute(checked(config, overrides), prompt, token, other, limit, ablate, passes), _print_attributed)


@app.command()
def explain(
    config: Config,
    features: Annotated[
        int, typer.Option("--features", help="How many should have an explanation, drawn at random of those that fire.", min=1)
    ] = 50,
    chosen: Annotated[list[int] | None, typer.Option("--feature", help="This one. Repeatable.", min=0)] = None,
    max_cost: Annotated[
        float | None,
        typer.Option("--max-cost", help="Dollars that it may cost; else interpretation.explainer.max_cost.", min=0),
    ] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Say what it would cost, and ask nothing.")] = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Have a language model say what features stand for, and score what it says (`interpretation.explainer`)."""
    with command(as_json) as show:
        log_to_stderr()
        from components import steps

        found = steps.explain(checked(config, overrides), features, chosen or [], max_cost, estimate)
        show(found, print_tree)
        if found["stopped"] is not None:
            raise typer.Exit(1)


@app.command()
def export(
    config: Config,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    format_: Annotated[
        str,
        typer.Option("--format", help="neuronpedia (batches), neuronpedia-tree (bulk), feature-json (circuit-tracer), delphi."),
    ],
    source_set: Annotated[str | None, typer.Option("--source-set", help="Neuronpedia's name of the set.")] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Write the features in another project's format."""
    with command(as_json) as show:
        log_to_stderr()
        from components import steps

        show(steps.export_features(checked(config, overrides), format_, folder, source_set), print_tree)


def _make_on_workers(run: Specification) -> InterpretationRecord | None:
    prepare_prefect()
    from flows.interpretation import interpreted

    interpreted(run)
    return run.interpretation_record()


def _print_found(result: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("feature", "difference", "fires on", "of the others", "most on")
    for row in result["features"]:
        numbers = (str(row["feature"]), f"{row['difference']:.3g}", str(row["texts"]), str(row["against"]))
        table.add_row(*numbers, Text("  ".join(map(printable, row["tokens"]))))
    terminal().print(table)


def _print_seen(result: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table("feature", "difference", "fires on", "of the others", "most on patch")
    for row in result["features"]:
        numbers = (str(row["feature"]), f"{row['difference']:.3g}", str(row["pictures"]), str(row["against"]))
        table.add_row(*numbers, "  ".join(map(str, row["patches"])))
    terminal().print(table)


def _print_attributed(result: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("feature", "attribution", "ablation", "most on", title=Text(printable(result["prompt"])))
    for row in result["features"]:
        ablation = "-" if row["ablation"] is None else f"{row['ablation']:.3g}"
        table.add_row(str(row["feature"]), f"{row['attribution']:.3g}", ablation, Text(printable(row["token"])))
    console = terminal()
    console.print(table)
    if result["spearman"] is not None:
        console.print(f"Both orders of the {result['firing']} features that fire agree to {result['spearman']:.3f} (Spearman).")


def _print_explained(result: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("feature", *_SCORES, "explanation")
    for row in result["features"]:
        scores = ("-" if row[name] is None else f"{row[name]:.2f}" for name in _SCORES)
        table.add_row(str(row["feature"]), *scores, Text(printable(row["explanation"])))
    terminal().print(table)


def _print_made(result: dict[str, Any]) -> None:
    print(result["browser"])


def _print_list(result: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    alone = any("one_token" in row for row in result["features"])
    logits = any(row["logits"] for row in result["features"])
    named = (*(["on one token"] if alone else []), "fires most on", *(["makes likely"] if logits else []))
    table = Table("feature", "density", "largest", *named)
    for row in result["features"]:
        numbers = (str(row["feature"]), f"{row['density']:.4%}", f"{row['max']:.3g}")
        share = [f"{row['one_token']:.0%}"] if alone else []
        likely = [Text(printable(row["logits"]))] if logits else []
        table.add_row(*numbers, *share, Text(printable(row["tokens"])), *likely)
    terminal().print(table)


def _history(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table("in version", "feature", "cosine", "density", "explained as", title="earlier versions", title_justify="left")
    for row in rows:
        if row["feature"] is None:
            table.add_row(row["version"], "none: new since")
            continue
        density = "-" if row["density"] is None else f"{row['density']:.4%}"
        said = Text(printable(row["explanation"]))
        table.add_row(row["version"], f"{row['feature']} ({row['status']})", f"{row['cosine']:.2f}", density, said)
    return table


def _print_feature(result: dict[str, Any]) -> None:
    from rich.text import Text

    console, row = terminal(), result["row"]
    of_images = any("name" in one for one in result["examples"])
    of_text = not of_images or any(one["tokens"] for one in result["examples"])
    units = "tokens" if of_text else "patches", "images" if of_images else "sequences"
    console.print(f"feature {row['feature']}: fires on {row['density']:.4%} of {units[0]}, in {row['sequences']:,} {units[1]}")
    if said := result["explained"]:
        scores = ", ".join(f"{name} {said[name]:.2f}" for name in _SCORES if said[name] is not None)
        origin = (
            said["explainer"]
            if said["carried_from"] is None
            else f"of its feature {said['carried_feature']} in {said['carried_from']}"
        )
        console.print(
            Text(f"explained as: {printable(said['explanation'])} ({'; '.join(part for part in (scores, origin) if part)})")
        )
    for title, key in (("makes likely", "likely"), ("makes unlikely", "unlikely")) if result["likely"] else ():
        console.print(Text(f"{title}: " + "  ".join(printable(word) for word, _ in result[key])))
    console.print("nearest: " + ", ".join(f"{other} ({cosine:.2f})" for other, cosine in result["neighbours"]))
    if match := result["match"]:
        near = "" if match["nearest"] is None else f", nearest is its feature {match['nearest']} ({match['cosine']:.2f})"
        console.print(f"compared with the champion of the time: {match['status']}{near}")
    if result["history"]:
        console.print(_history(result["history"]))
    for example in result["examples"]:
        kind = "strongest" if example["quantile"] < 0 else f"group {example['quantile'] + 1}"
        line = Text(f"{example['activation']:>8.3g} {kind:<10} ", style="dim")
        if "name" in example:
            where = f", patch ({', '.join(map(str, example['patch']))})" if example["patch"] else ""
            line.append(f"image {example['document']} ({printable(example['name'])}){where} ", style="not dim")
        for token, activation in zip(example["tokens"], example["activations"], strict=True):
            line.append(printable(token), style="bold black on yellow" if activation > 0 else "not dim")
        console.print(line)
