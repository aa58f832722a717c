"""`sae data`: look at, check and delete activation datasets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.terminal import AsJson, command, log_to_stderr, print_tree, terminal

if TYPE_CHECKING:
    from components.activations.dataset.manifest import Manifest

app = typer.Typer(name="data", no_args_is_help=True, help="List, show, check and delete activation datasets.")

Dataset = Annotated[
    str,
    typer.Argument(
        metavar="DATASET", help="URL, name (the configuration's, where it has one dataset), or the beginning of a digest."
    ),
]
Root = Annotated[str, typer.Option("--root", help="Folder or `s3://` prefix under which everything is stored.")]


@app.command("list")
def list_(root: Root = "data", as_json: AsJson = False) -> None:
    """List the datasets under a root."""
    with command(as_json) as show:
        from components.activations.dataset.inventory import list_datasets

        rows = []
        for entry in list_datasets(root):
            row: dict[str, Any] = {"name": entry.name, "state": entry.state, "url": entry.url}
            if entry.manifest is not None:
                row |= {
                    "tokens": entry.manifest.tokens,
                    "documents": entry.manifest.documents,
                    "bytes": entry.bytes,
                    "hook_points": [column.hook_point for column in entry.manifest.columns],
                    "dtype": entry.manifest.layout.dtype,
                    "language_model": entry.manifest.configuration["language_model"]["name"],
                }
            rows.append(row)
        show({"root": root, "datasets": rows}, _print_list)


@app.command()
def show(
    dataset: Dataset,
    root: Root = "data",
    samples: Annotated[int, typer.Option(help="How many tokens to show with their neighbours.", min=0)] = 8,
    as_json: AsJson = False,
) -> None:
    """Show a dataset: its manifest, a histogram of norms, and a sample of tokens as text."""
    with command(as_json) as show_:
        import numpy as np

        from components.activations.dataset import inventory as catalog
        from components.activations.dataset.manifest import require_manifest

        url = catalog.find_dataset(root, dataset)
        manifest = require_manifest(url)
        histograms: dict[str, Any] = {}
        for column in manifest.columns:
            values = catalog.norms(url, manifest, column.hook_point)
            counts, edges = np.histogram(values, bins=12)
            histograms[column.hook_point] = {"counts": counts.tolist(), "edges": [float(f"{edge:.4g}") for edge in edges]}
        tokens = catalog.sample_tokens(url, manifest, _decoder(manifest), samples)
        result = {
            "url": url,
            "manifest": _brief(manifest),
            "norms": histograms,
            "warnings": catalog.sinks_warnings(manifest),
            "sample": [token.model_dump() for token in tokens],
        }
        show_(result, _print_dataset)


@app.command()
def check(
    dataset: Dataset,
    root: Root = "data",
    batch_size: Annotated[int, typer.Option(help="Of the batches whose mixing is measured.", min=1)] = 4096,
    as_json: AsJson = False,
) -> None:
    """Compare every byte with its checksum, see that every token is there once, and measure how documents are mixed.

    Exit code 1 where anything is wrong.
    """
    with command(as_json) as show_:
        log_to_stderr()
        from components.activations.dataset import inventory as catalog
        from components.activations.dataset.check import mixing, problems
        from components.activations.dataset.manifest import require_manifest

        url = catalog.find_dataset(root, dataset)
        manifest = require_manifest(url)
        found = list(problems(url, manifest))
        result: dict[str, Any] = {
            "url": url, "tokens": manifest.tokens, "shards": len(manifest.shards), "bytes": manifest.bytes,
            "problems": found, "strangers": catalog.strangers(url, manifest), "mixing": None,
        }  # fmt: skip
        if not found:
            measured = mixing(url, manifest, batch_size)
            result["mixing"] = {**measured.model_dump(), "share": measured.share}
        show_(result, _print_check)
        if found:
            raise typer.Exit(1)


@app.command()
def delete(
    dataset: Dataset,
    root: Root = "data",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Even if a registered model names it.")] = False,
    tracking_uri: Annotated[
        str | None, typer.Option(help="MLflow that is asked for models; MLFLOW_TRACKING_URI or ROOT/mlflow.db by default.")
    ] = None,
) -> None:
    """Delete a dataset. Asks first, and refuses one that a registered model was trained on."""
    with command(False):
        from components.activations.dataset import inventory as catalog
        from components.settings import UserError

        try:
            url = catalog.find_dataset(root, dataset)
        except UserError:
            unfinished = [entry for entry in catalog.list_datasets(root) if dataset in (entry.name, entry.url)]
            if not unfinished:
                raise
            url = unfinished[0].url
        name = url.rsplit("/", 1)[-1]
        if not force:
            models = _models_of(name.rsplit("-", 1)[-1], root, tracking_uri)
            if models:
                raise UserError(
                    f"DATASET: '{name}' is what {', '.join(models)} was trained on; with --force it is deleted all the same"
                )
        if not yes and not typer.confirm(f"Delete {url}?", err=True):
            raise typer.Exit(1)
        catalog.delete_dataset(url, root)
        terminal(stderr=True).print(f"deleted {url}")


def _models_of(digest: str, root: str, tracking_uri: str | None) -> list[str]:
    """Registered versions that name the dataset; a UserError where nobody can say."""
    from components.registry import versions as registry
    from components.settings import UserError
    from components.tracking import store
    from components.tracking.settings import TrackingSettings

    settings = TrackingSettings(uri=tracking_uri)
    if not store.database_exists(settings, root):
        return []
    try:
        return registry.versions_of_dataset(store.connect(settings, root), digest)
    except Exception as error:  # each kind of server has its own
        raise UserError(
            f"tracking.uri: cannot ask MLflow whether a registered model names the dataset ({type(error).__name__}); "
            "name its address with --tracking-uri, or use --force"
        ) from error


def _decoder(manifest: Manifest) -> Any:
    """Text of token ids, or the ids where the tokenizer is out of reach."""
    from components.language_model.loading import find_model, load_tokenizer
    from components.language_model.settings import LanguageModelSettings
    from components.settings import UserError

    try:
        tokenizer = load_tokenizer(find_model(LanguageModelSettings(**manifest.configuration["language_model"])))
    except UserError:
        return lambda tokens: " ".join(map(str, tokens))
    return tokenizer.decode


def _brief(manifest: Manifest) -> dict[str, Any]:
    """The manifest without its lists of shards, row groups and means."""
    return {
        "digest": manifest.digest,
        "schema_version": manifest.schema_version,
        "tokens": manifest.tokens,
        "documents": manifest.documents,
        "bytes": manifest.bytes,
        "bytes_per_token": round(manifest.bytes / manifest.tokens, 2),
        "shards": len(manifest.shards),
        "rows_per_group": manifest.rows_per_group,
        "compression": manifest.compression,
        "columns": list(manifest.arrow_schema),
        "hook_points": {
            column.hook_point: {
                "d_in": column.d_in, "dtype": column.dtype, "scale": column.scale,
                "mean_squared_norm": column.mean_squared_norm, "median_norm": column.median_norm,
            }
            for column in manifest.columns
        },
        "versions": manifest.versions,
        "configuration": manifest.configuration,
    }  # fmt: skip


def _print_list(result: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(title=result["root"])
    table.add_column("dataset", no_wrap=True, overflow="fold")
    for column in ("state", "tokens", "documents", "MB", "model", "hook points"):
        table.add_column(column, justify="right" if column in ("tokens", "documents", "MB") else "left", overflow="fold")
    for row in result["datasets"]:
        known = row["state"] == "finished"
        numbers = [f"{row['tokens']:,}", f"{row['documents']:,}", f"{row['bytes'] / 1e6:,.0f}"] if known else ["", "", ""]
        model = [row["language_model"], ", ".join(row["hook_points"])] if known else ["", ""]
        table.add_row(row["name"], row["state"], *numbers, *model)
    terminal().print(table)


def _print_dataset(result: dict[str, Any]) -> None:
    import yaml
    from rich.table import Table
    from rich.text import Text

    console = terminal()
    manifest = Table(title=result["url"], show_header=False)
    for name, value in result["manifest"].items():
        if name == "configuration":
            manifest.add_section()
            for part, settings in value.items():
                manifest.add_row(part, yaml.safe_dump(settings, sort_keys=False).replace("...\n", "").rstrip())
        elif name == "hook_points":
            for hook_point, numbers in value.items():
                manifest.add_row(hook_point, ", ".join(f"{key} {_short(number)}" for key, number in numbers.items()))
        elif isinstance(value, list):
            manifest.add_row(name, "\n".join(value))
        elif isinstance(value, dict):
            manifest.add_row(name, ", ".join(f"{key} {version}" for key, version in value.items()))
        else:
            manifest.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    console.print(manifest)
    for hook_point, histogram in result["norms"].items():
        console.print(f"\n||x|| at {hook_point}, rows of the first row group")
        largest = max(histogram["counts"])
        for count, low, high in zip(histogram["counts"], histogram["edges"], histogram["edges"][1:], strict=False):
            console.print(f"{low:>10.4g} to {high:<10.4g} {count:>7,} {'█' * round(40 * count / largest)}", highlight=False)
    for warning in result["warnings"]:
        console.print(f"\n{warning}", style="yellow", highlight=False)
    if not result["sample"]:
        return
    tokens = Table("document", "position", "||x||", "token", title="A random sample of tokens")
    for token in result["sample"]:
        shown = [token[part].replace("\n", "⏎") for part in ("before", "text", "after")]
        text = Text.assemble((shown[0], "dim"), (shown[1], "bold reverse"), (shown[2], "dim"))
        tokens.add_row(str(token["document"]), str(token["position"]), f"{token['norm']:.4g}", text)
    console.print()
    console.print(tokens)


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _print_check(result: dict[str, Any]) -> None:
    from rich.text import Text

    console = terminal(soft_wrap=True)
    for problem in result["problems"]:
        console.print(Text.assemble(("wrong", "bold red"), f" {problem}"), highlight=False)
    for stranger in result["strangers"]:
        console.print(Text.assemble(("not part of it", "yellow"), f" {stranger}"), highlight=False)
    if result["problems"]:
        console.print(f"{len(result['problems'])} problems. Delete the dataset (`sae data delete`) and extract it again.")
        return
    mixing = result["mixing"]
    print_tree(
        {
            "dataset": result["url"],
            "checksums": f"right, {result['shards']} shards, {result['bytes']:,} bytes",
            "tokens": f"{result['tokens']:,}, each once",
            "distinct documents in a batch": (
                f"{mixing['distinct_documents']:.1f} of {mixing['ideal']:.1f} expected of a random permutation "
                f"({mixing['share']:.1%}), {mixing['batches']} batches of {mixing['batch_size']:,}"
            ),
            "autocorrelation of documents": (
                f"{mixing['autocorrelation']:+.5f}, by chance up to about {2 * mixing['autocorrelation_noise']:.5f}"
            ),
        }
    )
