"""The language model beside the training that reads what it makes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from components import storage
from components.activations.online.folder import OnlineFolder, Wanted
from components.run.online import producing, production_of, require_online
from components.run.specification import Specification
from components.settings import digest
from components.steps.extraction import require_dataset
from components.steps.tokens import prepare_tokens
from components.training.checkpoint import newest_checkpoint


@contextmanager
def data_for(runs: Sequence[Specification], again: bool = False) -> Iterator[None]:
    """While the block trains the coders of these runs, which share their activations, these are there, or are made by a process
    beside it: a training of another coder on them waits for its turn then, and what is left is deleted at the end.

    again: although the coders are trained. A UserError where activations are to be there and are not.
    """
    run = runs[0]
    if run.config.activations.mode == "stored":
        require_dataset(run)
        yield
        return
    for one in runs:
        require_online(one)
    folder, key = OnlineFolder(run.dataset_url), digest(sorted(one.sae_digest for one in runs))
    if _trained(runs) and not again:
        before = folder.wanted()
        if before is not None and before.training == key:
            folder.clear()  # it was killed when all was done but this
        yield
        return
    tokens = prepare_tokens(run)
    with storage.claimed(run.dataset_url):
        if _trained(runs) and not again:  # by a rival, for whom the claim has waited
            yield
            return
        folder.begin(production_of(run, tokens).count, run.config.activations.generations_mixed or 1)
        size = run.config.training.batch_size
        step = min(newest_checkpoint(one.sae_url) or 0 for one in runs if again or one.training_record() is None)
        rows = max(one.config.training.steps for one in runs) * size
        folder.want(Wanted(training=key, first=folder.place_of(step * size), rows=rows))
        try:
            with producing(run):
                yield
        except FloatingPointError:  # it would diverge again
            folder.clear()
            raise
        folder.clear()


def _trained(runs: Sequence[Specification]) -> bool:
    return all(run.training_record() is not None for run in runs)
