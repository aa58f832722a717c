"""The generations of a run whose activations are made while it trains, and the process that makes them.

Between it and who starts it: the specification as one line of JSON on standard input, which stays open for as long as the
parent lives; its log on standard error; whatever else is said stands in the folder of the generations.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import replace
from functools import partial

from components.activations.dataset.job import Extraction, count_part
from components.activations.dataset.schema import Layout
from components.activations.online.folder import Failure, OnlineFolder
from components.activations.online.production import Production, cut, production
from components.activations.online.space import require_space
from components.corpus.manifest import TokenManifest
from components.hardware import resolve_device
from components.language_model.loading import require_runnable
from components.run import identity
from components.run.specification import Specification
from components.settings import UserError
from components.threads import with_patient_threads
from components.training.process import forward_log

_MODULE = "components.run.online"
_END_SECONDS = 5.0

logger = logging.getLogger(__name__)


def generation(run: Specification, tokens: TokenManifest, number: int) -> Extraction:
    """A dataset as any other, of some of the sequences."""
    whole, folder = run.extraction(tokens), OnlineFolder(run.dataset_url)
    assert whole.settings.generation_tokens is not None
    found = cut(whole.split, tokens.context_length, whole.settings.generation_tokens)
    named = identity.generation_identity(run.dataset_identity, number, found.count, found.pieces)
    return replace(
        whole,
        url=folder.generation_url(number),
        digest=identity.digest(named),
        identity=named,
        part=count_part(run.token_url, tokens, whole.settings.split, found.generation(number)),
        shared_url=folder.url,
    )


def production_of(run: Specification, tokens: TokenManifest) -> Production:
    execution = run.config.execution
    device = run.device if execution.extraction_device is None else resolve_device(execution.extraction_device)
    return production(OnlineFolder(run.dataset_url), partial(generation, run, tokens), run.extraction(tokens), device)


def require_online(run: Specification) -> None:
    """A UserError for a configuration whose generations cannot be."""
    config, settings = run.config, run.config.activations
    if settings.mode == "stored":
        if config.execution.extraction_device is not None:
            raise UserError(
                f"execution.extraction_device: '{config.execution.extraction_device}' is for activations.mode 'online', where "
                "extraction goes on beside training; `device` is for all else"
            )
        return
    tokens = settings.generation_tokens
    assert tokens is not None
    if settings.split != "train":
        raise UserError(
            "activations.mode: 'online' makes what is trained on, and activations.split is 'held_out'; use 'stored'"
        )
    context = len(run.model.layout()) if run.of_images else config.corpus.context_length
    for field, least in (
        ("training.batch_size", config.training.batch_size),
        ("activations.rows_per_shard", settings.rows_per_shard),
        ("corpus.context_length", context),
    ):
        if tokens < least:
            raise UserError(
                f"activations.generation_tokens: {tokens:,} is less than {field} ({least:,}); accepted is as much or more"
            )
    if config.execution.extraction_device is not None:
        require_runnable(run.source, resolve_device(config.execution.extraction_device))
    found, layout = run.token_manifest(), Layout(run.widths, settings.dtype)
    if found is None:
        sequences = -(-config.corpus.train_tokens // max(1, context - 1))  # a BOS does not count
        largest = min(sequences, tokens // context)
        require_space(settings, layout, largest, context, -(-sequences // largest))
    else:
        known = cut(found.splits["train"], found.context_length, tokens)
        require_space(settings, layout, known.largest, found.context_length, known.count)


@contextmanager
def producing(run: Specification) -> Iterator[None]:
    """A process beside the block that makes generations; it has ended when the block has."""
    folder = OnlineFolder(run.dataset_url)
    folder.fail(None)
    process = subprocess.Popen(
        [sys.executable, "-m", _MODULE, "WARNING" if sys.stderr.isatty() else "INFO"],  # a terminal has the training's bar
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=with_patient_threads(os.environ),
        start_new_session=True,  # Ctrl-C is the parent's to handle
    )
    assert process.stdin is not None
    assert process.stderr is not None
    # In this thread's context, by which Prefect knows whose log it is.
    log = partial(copy_context().run, forward_log, process.stderr)
    threading.Thread(target=log, name="extraction-log", daemon=True).start()
    asked = threading.Event()

    def watch() -> None:
        code = process.wait()
        if code and not asked.is_set() and folder.failure() is None:
            how = (
                f"was killed (signal {-code}), by hand or because memory ran out"
                if code < 0
                else f"ended with exit code {code}"
            )
            folder.fail(Failure(kind="Killed", text=f"the process that extracts {how}"))

    watcher = threading.Thread(target=watch, name="extraction-watch", daemon=True)
    watcher.start()
    try:
        try:
            process.stdin.write(run.to_json() + "\n")
            process.stdin.flush()
        except BrokenPipeError:  # it ended at once; `watch` says so
            pass
        yield
    finally:
        asked.set()
        process.terminate()  # whatever it was at is there whole, or begun anew
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        watcher.join()
        process.stdin.close()


def main() -> None:
    """The other side."""
    logging.basicConfig(level=sys.argv[1], format="%(levelname)s: %(message)s", stream=sys.stderr)
    run = Specification.from_json(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    tokens = run.token_manifest()
    try:
        if tokens is None:
            raise UserError(f"{run.token_url} is not there any more; run again, which makes it anew")
        production_of(run, tokens).run()
    except Exception as error:
        if not isinstance(error, UserError):
            logger.exception("extract: failed")
        OnlineFolder(run.dataset_url).fail(Failure(kind=type(error).__name__, text=str(error)))
        sys.exit(1)


def _end_with_parent() -> None:
    """Standard input ends when the parent does, however that came about."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
