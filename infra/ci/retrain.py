"""Retrain from CI: start the deployment for each configuration, wait, and say whether the new SAE passed its gates.

    python -m infra.ci.retrain CONFIG ...    # from the repository's root; every input can be an environment variable

Needs PREFECT_API_URL (and PREFECT_API_AUTH_STRING), and this project's environment. Exit codes: 0 promoted or nothing to do;
1 refused by a gate, failed, or not done in time; 2 wrong input, and nothing goes on; 3 the server cannot be reached or has no
such deployment; 130 and 143 cancelled, and so are the flow runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from components.run.config import load_config, read_config, shipped_configs
from components.settings import UserError
from components.yaml_text import parse_yaml
from infra.ci.report import Outcome, Stop, exit_code, for_comment, not_started, overall, plain, report, say

if TYPE_CHECKING:
    from infra.ci.flow_runs import Job

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """SIGINT or SIGTERM; no `except Exception` may swallow it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    configs: Annotated[
        list[str] | None, typer.Argument(envvar="SAE_CONFIGS", help="YAML files, or names of shipped configurations.")
    ] = None,
    force: Annotated[bool, typer.Option(envvar="SAE_FORCE", help="Retrain where nothing has changed, too.")] = False,
    deployment: Annotated[str, typer.Option(envvar="SAE_DEPLOYMENT", help="FLOW/NAME in Prefect.")] = "retrain/ci",
    timeout_minutes: Annotated[
        float, typer.Option(envvar="SAE_TIMEOUT_MINUTES", min=0, help="How long to wait; the flow runs go on.")
    ] = 330.0,
    crash_grace_seconds: Annotated[
        float, typer.Option(envvar="SAE_CRASH_GRACE_SECONDS", min=0, help="A crashed run may be rescheduled for so long.")
    ] = 90.0,
    poll_seconds: Annotated[
        float, typer.Option(envvar="SAE_POLL_SECONDS", min=0.1, help="Pause between two looks at the flow runs.")
    ] = 2.0,
    comment_file: Annotated[
        Path | None, typer.Option(envvar="SAE_COMMENT_FILE", help="Write the report there, too, for a comment.")
    ] = None,
) -> None:
    """Start the retrain of each configuration, wait for all, report in Markdown."""
    jobs: list[Job] = []
    commit, code, sentence = os.environ.get("GITHUB_SHA") or None, 1, ""
    with interruptible():
        try:
            wanted = checked(configs or [], force, commit, identity())
            if deployment.count("/") != 1:
                raise Stop(2, f"SAE_DEPLOYMENT: '{deployment}' is not of the form FLOW/NAME, such as retrain/ci")
            # Imported here: a wrong configuration is refused without the seconds that Prefect takes.
            from infra.ci import flow_runs

            jobs += [flow_runs.Job(*job) for job in wanted]
            with flow_runs.connect(deployment) as server:
                try:
                    flow_runs.start(server, jobs, ["ci"] + ([f"commit:{commit[:12]}"] if commit else []))
                    flow_runs.follow(server, jobs, timeout_minutes, crash_grace_seconds, poll_seconds)
                except Interrupted:
                    flow_runs.cancel(server, jobs, "the job was cancelled")
                    raise
            code = exit_code([job.outcome for job in jobs if job.outcome])
        except Stop as stop:
            code, sentence = stop.exit_code, str(stop)
            say(f"error {sentence}", error=True)
        except Interrupted as interrupted:
            code, sentence = 128 + interrupted.number, "the job was cancelled"
        except Exception as error:
            # Not left to the interpreter: a traceback may quote what a workflow command could hide in.
            for line in traceback.format_exc().splitlines():
                say(line, error=True)
            sentence = f"the script failed: {type(error).__name__}: {error}"
        _ignore_signals()  # the report is soon written, and should be whole
        _publish(jobs, sentence, code, commit, comment_file)
    raise typer.Exit(code)


def checked(configs: Sequence[str], force: bool, commit: str | None, attempt: str) -> list[tuple[str, dict[str, Any], str]]:
    """Configuration, parameters and idempotency key of each, once; Stop 2 and one sentence where one is not valid."""
    if not configs:
        raise Stop(2, "SAE_CONFIGS: no configuration is given; name YAML files or some of " + ", ".join(shipped_configs()))
    jobs = []
    for config in dict.fromkeys(configs):
        try:
            name = load_config(config).name
            # The tree as it is written and not the validated one: what it leaves out is for the worker's version to decide.
            tree = parse_yaml(read_config(config)) or {}
            text = json.dumps(tree, sort_keys=True, allow_nan=False)
        except UserError as error:
            raise Stop(2, str(error) if config in str(error) else f"{config}: {error}") from error
        except (TypeError, ValueError) as error:
            raise Stop(2, f"{config}: it holds a value that JSON has not: {error}") from error
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        jobs.append((config, {"config": tree, "force": force, "commit": commit}, f"{attempt}-{name}-{digest}"))
    return jobs


def identity() -> str:
    """Names this attempt of this CI job, so that asking twice starts one run; unique where no CI job is known."""
    run, attempt = os.environ.get("GITHUB_RUN_ID"), os.environ.get("GITHUB_RUN_ATTEMPT", "1")
    return f"ci-{run}-{attempt}" if run else f"hand-{os.urandom(8).hex()}"


@contextmanager
def interruptible() -> Iterator[None]:
    """Within this block the first SIGINT or SIGTERM raises Interrupted; those that follow are ignored."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        _ignore_signals()  # GitHub's runner sends a second one while the first is being dealt with
        raise Interrupted(number)

    before = {number: signal.signal(number, interrupt) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignore_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _publish(jobs: Sequence[Job], sentence: str, code: int, commit: str | None, comment_file: Path | None) -> None:
    """The report to standard output, the job's summary and the comment's file; the verdict to the job's outputs."""
    outcomes = [
        job.outcome or Outcome(job.config, "Unknown", f"{sentence}; the flow run may go on", job.page)
        for job in jobs
        if job.outcome or job.asked
    ]
    repository, github = os.environ.get("GITHUB_REPOSITORY", ""), os.environ.get("GITHUB_SERVER_URL", "https://github.com")
    text = report(outcomes, commit, repository, github) if outcomes else not_started(sentence)
    for line in text.splitlines():
        say(plain(line))
    for variable, what in (("GITHUB_STEP_SUMMARY", text), ("GITHUB_OUTPUT", f"verdict={_verdict(outcomes, code)}\n")):
        if os.environ.get(variable):
            with open(os.environ[variable], "a", encoding="utf-8") as file:
                file.write(what)
    if comment_file is not None:
        comment_file.parent.mkdir(parents=True, exist_ok=True)
        comment_file.write_text(for_comment(text), encoding="utf-8")


def _verdict(outcomes: Sequence[Outcome], code: int) -> str:
    """One of a few words, whatever the flow says: it goes into the job's outputs."""
    codes = {2: "Invalid", 3: "Unreachable", 130: "Cancelled", 143: "Cancelled"}
    return codes.get(code) or (overall(outcomes) if outcomes else "Failed")


if __name__ == "__main__":
    app(prog_name="retrain")
