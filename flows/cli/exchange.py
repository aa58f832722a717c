"""`sae import` and `sae export`: SAEs that come from other projects, and ours on their way to them."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.cli.line import checked
from flows.cli.terminal import AsJson, Overrides, command, log_to_stderr, print_tree

Source = Annotated[
    str,
    typer.Argument(
        metavar="SAE",
        help="A folder as SAELens, sparsify, dictionary_learning or Gemma Scope make it (local, `s3://...` or "
        "`hf://owner/repository/folder`), or `models:/...`.",
    ),
]
AnotherModel = Annotated[
    bool, typer.Option("--another-model", help="Although the SAE names another language model than the configuration.")
]


def import_(
    sae: Source,
    config: Annotated[str, typer.Option("--config", metavar="CONFIG", help="Names the model, hook point and held-out text.")],
    overrides: Overrides = None,
    another_model: AnotherModel = False,
    as_json: AsJson = False,
) -> None:
    """Measure an SAE that was made elsewhere as `sae evaluate CONFIG --sae` does, and register it, by the same gates as ours.

    It becomes a version of the model that CONFIG's own SAEs are versions of.
    """
    with command(as_json) as show:
        log_to_stderr()
        from components import steps

        url, metrics, outcome = steps.import_given(checked(config, overrides), sae, another_model)
        show({"url": url, "metrics": metrics, **outcome.model_dump(mode="json")}, print_tree)


def export(
    sae: Source,
    folder: Annotated[
        str, typer.Argument(metavar="FOLDER", help="Where to; empty or not there yet. `hf://owner/repo/folder` too.")
    ],
    format_: Annotated[str, typer.Option("--format", help="`saelens` or `sparsify` (TopK alone).")] = "saelens",
    root: Annotated[str, typer.Option("--root", help="Storage root whose `mlflow.db` is meant by `models:/`.")] = "data",
    uri: Annotated[str | None, typer.Option("--uri", help="MLflow server or database; MLFLOW_TRACKING_URI by default.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write an SAE, ours or another's, in a format that other projects read."""
    with command(as_json) as show:
        from components import steps
        from components.run.config import parse_config

        tree = {"storage": {"root": root}, "tracking": {"uri": uri} if uri else {}}
        show(steps.export_given(parse_config(tree).tracking, root, sae, folder, format_), print_tree)
