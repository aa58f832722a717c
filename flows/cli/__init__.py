"""The command `sae`: parses, calls a flow or a step, prints. Heavy imports wait until a command needs them."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from flows.cli import data as data_cli
from flows.cli.doctor import doctor
from flows.cli.models import models
from flows.cli.terminal import AsJson, Config, Overrides, command, log_to_stderr, print_tree

if TYPE_CHECKING:
    from components.run.config import RunConfig
    from components.run.planning import Plan

app = typer.Typer(
    name="sae",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Sparse autoencoders on language-model activations, from a corpus to a registered model.

    The line is `corpus -> tokens -> activations -> SAE -> evaluation -> registry`. `sae run CONFIG` does all of it;
    `extract`, `train`, `evaluate` and `register` do one step each, and `plan` says what a run would do. Every
    result is stored under a digest of all that decides it: what is there is reused, what was interrupted continues.

    CONFIG is a YAML file, or the name of a configuration that ships, such as `quickstart`.
    """,
)

app.add_typer(data_cli.app)
app.add_typer(models, name="models")


@app.command()
def run(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Run the whole line, as a Prefect flow with an MLflow run.

    Ends with a version in the model registry: `champion` where it is the best one so far, `challenger` otherwise.
    Run again, it does only what is not done yet; unchanged, it prints the earlier result and starts nothing.
    """
    with command(as_json) as show:
        started = time.monotonic()
        plan = _checked_plan(config, overrides)
        from components import steps

        outcome = steps.finished_run(plan)
        if outcome is not None:
            show(steps.summary(plan, outcome, {"total": time.monotonic() - started}, reused=True), _print_summary)
            return
        summary = _run_flow(plan.config)
        summary["seconds"]["total"] = round(time.monotonic() - started, 2)
        show(summary, _print_summary)


@app.command()
def plan(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Say what a run would do, without doing it: digests, what exists, tokens, bytes, memory, FLOPs, steps."""
    with command(as_json) as show:
        from components.run.planning import estimate

        show(estimate(_checked_plan(config, overrides, evaluated=False)), _print_plan)


@app.command()
def extract(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Make the token and activation datasets."""
    with command(as_json) as show:
        log_to_stderr()
        from components import steps
        from components.activations.dataset.manifest import require_manifest

        work = _checked_plan(config, overrides, only_data=True)
        if _alone(work.config):
            manifest = steps.extract(work)
        else:
            _extract_on_workers(work.config)
            manifest = require_manifest(work.dataset_url)
        show(
            {
                "tokens": {"digest": work.token_digest, "url": work.token_url},
                "activations": {
                    "digest": manifest.digest,
                    "url": work.dataset_url,
                    "tokens": manifest.tokens,
                    "documents": manifest.documents,
                    "shards": len(manifest.shards),
                    "bytes": sum(shard.bytes for shard in manifest.shards),
                },
            },
            print_tree,
        )


@app.command()
def train(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Train the SAE on the activation dataset (`sae extract` makes it)."""
    with command(as_json) as show:
        log_to_stderr()
        from components import steps

        work = _checked_plan(config, overrides, evaluated=False)
        record = steps.train(work).model_dump(mode="json")
        kept = ("digest", "d_in", "d_sae", "steps", "tokens", "tokens_per_second", "weights_sha256")
        show({"url": work.sae_url, **{key: record[key] for key in kept}, "last": record["curves"][-1]}, print_tree)


@app.command()
def evaluate(
    config: Config,
    overrides: Overrides = None,
    sae: Annotated[
        str | None,
        typer.Option(metavar="FOLDER|models:/...", help="Another SAE: a folder in SAELens' format, or a registered model."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure an SAE on CONFIG's held-out documents, through its language model and at its hook point.

    Without `--sae` it is the one that `sae train CONFIG` made. Leaves `evaluation.json`, `features.parquet` and
    `report.html`, which needs no network, at the printed address.
    """
    with command(as_json) as show:
        log_to_stderr()
        from components import steps

        work = _checked_plan(config, overrides)
        if sae is not None:
            record = steps.evaluate_given(work, sae)
        elif _alone(work.config):
            record = {"url": work.sae_url, **steps.evaluate(work)}
        else:
            record = _evaluate_on_workers(work.config)
        show({key: record[key] for key in ("url", "metrics", "baselines")}, print_tree)


@app.command()
def register(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Put the evaluated SAE into MLflow: its run, a model version, and an alias."""
    with command(as_json) as show:
        log_to_stderr()
        from components import steps

        work = _checked_plan(config, overrides)
        steps.require_evaluated(work)
        with steps.tracked(work, {}) as tracked:
            outcome = steps.register(work, tracked)
        show({"mlflow_run": tracked.run_id, **outcome}, print_tree)


@app.command()
def ui(
    config: Config = "quickstart",
    overrides: Overrides = None,
    port: Annotated[int, typer.Option(help="Port on this machine.")] = 5000,
) -> None:
    """Open the MLflow UI on what CONFIG's runs have made."""
    with command(False):
        from components.redaction import redacted
        from components.run.config import load_config
        from components.tracking.store import quiet_mlflow, tracking_uri

        settings = load_config(config, overrides or ())
        uri = tracking_uri(settings.tracking, settings.storage.root)
        if uri.startswith(("http://", "https://")):
            Console().print(f"The MLflow server of these runs is {redacted(uri)}")
            return
        quiet_mlflow()
        os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
        # Not an argument: the process list shows those to every user, and the URI may hold a password.
        os.environ["MLFLOW_BACKEND_STORE_URI"] = uri
        Console(stderr=True).print(f"MLflow UI of {redacted(uri)}: http://127.0.0.1:{port}  (Ctrl-C ends it)")
        server = [sys.executable, "-m", "mlflow", "server", "--port", str(port)]
        os.execv(server[0], server)


app.command()(doctor)


def _checked_plan(config: str, overrides: list[str] | None, only_data: bool = False, evaluated: bool = True) -> Plan:
    from components.run.config import load_config
    from components.run.planning import Plan, check, pinned

    checked = Plan(pinned(load_config(config, overrides or ())))
    check(checked, only_data=only_data, evaluated=evaluated)
    return checked


def _run_flow(config: RunConfig) -> dict[str, Any]:
    _prepare_prefect()
    from flows.pipeline import pipeline

    return pipeline(config)


def _extract_on_workers(config: RunConfig) -> None:
    _prepare_prefect()
    from flows.extraction import extract_on_its_runner

    extract_on_its_runner(config)


def _evaluate_on_workers(config: RunConfig) -> dict[str, Any]:
    _prepare_prefect()
    from flows.evaluation import evaluate_on_its_runner

    return evaluate_on_its_runner(config)


def _alone(config: RunConfig) -> bool:
    return config.execution.runner == "threads" and config.execution.workers == 1


def _prepare_prefect() -> None:
    # Read by Prefect when it is imported: the ephemeral server takes 20 s to start on two cores, and the logs of
    # `components` belong to the flow run.
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
    os.environ.setdefault("PREFECT_LOGGING_EXTRA_LOGGERS", "components")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    log_to_stderr(handler=False)
    Console(stderr=True).print("Starting Prefect ...", style="dim")


def _print_summary(summary: dict[str, Any]) -> None:
    from rich.table import Table

    metrics = summary["metrics"]
    table = Table(title=f"{summary['name']}: {'unchanged, nothing to do' if summary['reused'] else 'done'}", show_header=False)
    for name in (
        "explained_variance", "l0", "loss_recovered", "dead_fraction", "ce_loss_clean", "ce_loss_sae", "ce_loss_mean",
        "ce_loss_zero", "kl_divergence", "evaluation_tokens",
    ):  # fmt: skip
        value = metrics[name]
        table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if value is not None else "-")
    table.add_section()
    table.add_row("SAE", summary["paths"]["sae"])
    table.add_row("model version", f"models:/{summary['registered_model']}/{summary['model_version']}")
    table.add_row("alias", f"{summary['alias'] or '-'} ({summary['alias_reason']})")
    table.add_row("MLflow run", summary["mlflow_run"])
    table.add_row("seconds", ", ".join(f"{name} {value:.1f}" for name, value in summary["seconds"].items()))
    Console().print(table)


def _print_plan(estimate: dict[str, Any]) -> None:
    from rich.table import Table

    def state(part: str) -> str:
        return "there, reused" if estimate[part]["exists"] else "to do"

    tokens, stored, sae = estimate["tokens"], estimate["activations"], estimate["sae"]
    model, training, memory = estimate["language_model"], estimate["training"], estimate["memory_bytes"]
    table = Table("step", "state", "what", title=f"{estimate['name']} on {estimate['device']}")
    counted = "" if tokens["exact"] else "at most "
    split = f"{tokens['corpus']}: {counted}{tokens['train']:,} train, {tokens['held_out']:,} held out"
    table.add_row("tokens", state("tokens"), f"{split}\n{tokens['url']}")
    table.add_row(
        "extract",
        state("activations"),
        f"{model['name']} ({model['parameters']:,} parameters) at {model['hook_point']}, {stored['tokens']:,} tokens, "
        f"{stored['bytes'] / 1e6:,.0f} MB ({stored['bytes_per_token']} B/token; "
        f"{stored['peak_bytes'] / 1e6:,.0f} MB while shuffling), "
        f"{stored['flops']:.2g} FLOPs\n{stored['url']}",
    )
    table.add_row(
        "train",
        state("sae"),
        f"{sae['architecture']} {sae['d_in']} -> {sae['d_sae']:,} ({sae['parameters']:,} parameters), "
        f"{training['steps']:,} steps, {training['tokens']:,} tokens ({training['epochs']:.2f} epochs), "
        f"{training['flops']:.2g} FLOPs\n{sae['url']}",
    )
    evaluation = estimate["evaluation"]
    if evaluation["impossible"]:
        table.add_row("evaluate", "not possible", evaluation["impossible"])
    else:
        what = f"{evaluation['tokens']:,} held-out tokens, {evaluation['flops']:.2g} FLOPs"
        table.add_row("evaluate", state("evaluation"), what)
        table.add_row("register", "", estimate["registered_model"])
    table.add_row("memory", "", ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in memory.items()))
    Console().print(table)
