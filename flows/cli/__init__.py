"""The command `sae`: one file for each group of commands."""

from __future__ import annotations

import sys

import typer

from components.threads import make_threads_patient
from flows.cli import begin, browsing, contrasts, data, exchange, features, line, models, planning, steering, sweeps, ui
from flows.cli.doctor import doctor

app = typer.Typer(
    name="sae",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Sparse autoencoders on language-model activations, from a corpus to a registered model.

    The line is `corpus -> tokens -> activations -> SAE -> evaluation -> registry`. `sae run CONFIG` does all of it;
    `extract`, `train`, `evaluate` and `register` do one step each, and `plan` says what a run would do. Every
    result is stored under a digest of all that decides it: what is there is reused, what was interrupted continues.

    CONFIG is a YAML file, or the name of a configuration that ships, such as `quickstart`.
    """,
)


def main() -> None:
    """The command."""
    if sys.platform == "win32":
        sys.exit("error SAE Foundry runs on Linux; on Windows, install it inside WSL 2")
    make_threads_patient()
    app()


for command in (
    line.run,
    planning.plan,
    line.extract,
    line.train,
    line.evaluate,
    line.register,
    begin.init,
    begin.fetch,
    begin.runs,
    ui.ui,
    doctor,
):
    app.command()(command)
app.command()(sweeps.sweep)
app.command()(sweeps.recommend)
app.command("import")(exchange.import_)
app.command()(exchange.export)
app.add_typer(data.app)
features.app.command("open")(browsing.open_)
features.app.command()(contrasts.contrast)
features.app.command()(contrasts.safety)
features.app.command()(contrasts.multilingual)
features.app.command()(contrasts.multimodal)
features.app.command()(steering.steer)
features.app.command()(steering.effect)
app.add_typer(features.app, name="features")
app.add_typer(models.models, name="models")
