"""`sae run` and a command for each step. Heavy imports wait until a command needs them."""

from __future__ import annotations

import os
import shlex
import signal
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.tables import print_summary
from flows.cli.terminal import AsJson, Config, Overrides, command, log_to_stderr, print_tree, terminal

if TYPE_CHECKING:
    from components.evaluation.record import EvaluationRecord
    from components.run.specification import Specification


def run(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Run the whole line, as a Prefect flow with an MLflow run.

    Ends with a version in the model registry: `champion` where it is the best one so far, `challenger` otherwise.
    Run again, it does only what is not done yet; unchanged, it prints the earlier result and starts nothing.
    """
    with command(as_json) as show:
        started = time.monotonic()
        specification = checked(config, overrides)
        from components import steps

        said = shlex.join([config, *(word for override in overrides or () for word in ("--set", override))])
        for_people = partial(print_summary, config=said, root=specification.config.storage.root)

        outcome = steps.finished_run(specification)
        if outcome is not None:
            done = steps.summary(specification, outcome, {"total": time.monotonic() - started}, reused=True)
            show(done.as_json(), for_people)
            return
        _say_what_it_takes(specification)
        prepare_prefect()
        from flows.pipeline import pipeline_of

        summary = pipeline_of(specification.config.title, specification.to_json())
        summary.seconds["total"] = round(time.monotonic() - started, 2)
        show(summary.as_json(), for_people)


def extract(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Make the token and activation datasets."""
    with command(as_json) as show:
        log_to_stderr()
        from components import steps

        work = checked(config, overrides, only_data=True)
        if alone(work):
            manifest = steps.extract(work)
        else:
            _extract_on_workers(work)
            manifest = steps.require_dataset(work)
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


def train(
    config: Config,
    overrides: Overrides = None,
    replay: Annotated[
        bool, typer.Option("--replay", help="Run the step again by which the training diverged, and say what is not finite.")
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Take some steps, keep none, and say where their time goes; leaves a trace.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train the SAE on the activation dataset (`sae extract` makes it).

    Asked to stop (SIGTERM), it leaves a checkpoint and ends with exit code 75: started again, it continues. It may itself be
    started by `torchrun --no-python`, on one machine or many, as many times as `execution.training` says.
    """
    with command(as_json) as show:
        from components import steps
        from components.training.loop import Stopped
        from components.training.parallel.ranks import speaks, started_by_torchrun
        from components.training.process import CONTINUE

        if speaks():
            log_to_stderr()
        work = checked(config, overrides, evaluated=None)
        if replay:
            show(steps.replay(work), print_tree)
            return
        if profile:
            show(steps.profile(work), print_tree)
            return
        elsewhere = work.config.execution.training.size > 1 and not started_by_torchrun()
        stop = threading.Event()

        def asked(*_: object) -> None:
            stop.set()
            if elsewhere:  # the processes that train are asked on the way out
                raise Stopped("stopped; it continues from its last checkpoint", 0)

        before = signal.signal(signal.SIGTERM, asked)
        try:
            record = steps.train(work, should_stop=stop.is_set).model_dump(mode="json")
        except Stopped as stopped:
            terminal(stderr=True, soft_wrap=True).print(str(stopped))
            raise typer.Exit(CONTINUE) from None
        finally:
            signal.signal(signal.SIGTERM, before)
        if not speaks():
            return
        kept = ("digest", "d_in", "d_sae", "steps", "tokens", "tokens_per_second", "weights_sha256")
        show({"url": work.sae_url, **{key: record[key] for key in kept}, "last": record["curves"][-1]}, print_tree)


def evaluate(
    config: Config,
    overrides: Overrides = None,
    sae: Annotated[
        str | None,
        typer.Option(metavar="FOLDER|models:/...", help="Another SAE, as `sae import` takes it."),
    ] = None,
    another_model: Annotated[
        bool, typer.Option("--another-model", help="Although that SAE names another language model than CONFIG.")
    ] = False,
    format_: Annotated[
        str | None, typer.Option("--format", help="`saebench`: also as SAEBench's `core` result (JSON), beside the rest.")
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
        from components.settings import UserError

        if format_ not in (None, "saebench"):
            raise UserError(f"--format: '{format_}' cannot be written; accepted is saebench")

        work = checked(config, overrides)
        if format_ is not None:
            steps.require_autoencoder(work)
        if sae is not None:
            url, record = steps.evaluate_given(work, sae, another_model)
        elif alone(work):
            url, record = work.sae_url, steps.evaluate(work)
        else:
            url, record = _evaluate_on_workers(work)
        core = {} if format_ is None else {"saebench": steps.write_saebench(work, url, record, sae)}
        found = {"url": url, **core, "metrics": record.metrics, "baselines": record.baselines}
        show({**found, **({"optional": record.optional} if record.optional else {})}, print_tree)


def register(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Put the evaluated SAE into MLflow: its run, a model version, and an alias."""
    with command(as_json) as show:
        log_to_stderr()
        from components import steps

        work = checked(config, overrides)
        steps.require_evaluated(work)
        with steps.tracked(work, {}) as tracked:
            outcome = steps.register(work, tracked)
        show(outcome.model_dump(mode="json"), print_tree)


def checked(config: str, overrides: list[str] | None, only_data: bool = False, evaluated: bool | None = True) -> Specification:
    """The configuration, resolved, and fit for what a command is going to do with it, or leads to. evaluated: as in `check`;
    None means where the model and the corpus have an evaluation at all."""
    from components.run.checks import check, without_evaluation
    from components.run.config import load_config
    from components.run.specification import resolve

    run = resolve(load_config(config, overrides or ()))
    check(run, only_data=only_data, evaluated=without_evaluation(run) is None if evaluated is None else evaluated)
    return run


def _extract_on_workers(run: Specification) -> None:
    prepare_prefect()
    from flows.extraction import extracted

    extracted(run)


def _evaluate_on_workers(run: Specification) -> tuple[str, EvaluationRecord]:
    prepare_prefect()
    from flows.evaluation import evaluated

    return evaluated(run)


def _say_what_it_takes(run: Specification) -> None:
    """Before a work of minutes to days: how much there is to do, in one line."""
    from components.run.estimate import estimate

    found = estimate(run)
    stored, training, memory = found["activations"], found["training"], max(found["memory_bytes"].values())
    activations = f"{stored['tokens']:,} tokens of activations ({stored['bytes'] / 1e6:,.0f} MB"
    activations += ", there)" if stored["exists"] else f", {stored['peak_bytes'] / 1e6:,.0f} MB while they are shuffled)"
    if (online := stored.get("online")) is not None:
        most = stored["peak_bytes"] / 1e6
        activations = f"{online['extracted_tokens']:,} tokens of activations, made meanwhile in at most {most:,.0f} MB"
    sae = f"{training['steps']:,} steps of {run.config.training.batch_size:,} tokens for {found['sae']['d_sae']:,} features"
    sae += " (there)" if found["sae"]["exists"] else f" ({training['flops']:.1e} FLOPs)"
    measured = f"{found['evaluation']['tokens']:,} tokens to measure it on"
    line = f"{run.config.name} on {found['device']}: {activations}, {sae}, {measured}; up to {memory / 1e9:.1f} GB of memory"
    terminal(stderr=True, soft_wrap=True).print(line, highlight=False)


def alone(run: Specification) -> bool:
    return run.config.execution.runner == "threads" and run.config.execution.workers == 1


def prepare_prefect() -> None:
    # Read by Prefect when it is imported: the ephemeral server takes 20 s to start on two cores, and minutes where they are
    # busy; and the logs of `components` belong to the flow run.
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "300")
    os.environ.setdefault("PREFECT_LOGGING_EXTRA_LOGGERS", "components")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    log_to_stderr(handler=False)
    terminal(stderr=True).print("Starting Prefect ...", style="dim")
