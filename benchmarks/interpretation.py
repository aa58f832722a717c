"""The pass of an interpretation beside the bare language model and encoder, and its memory over ten times the text:
`python benchmarks/interpretation.py --help`.

The text is this Python's standard library, over and over; the model is the one that ships; the coder has random directions and
biases at which a token fires `--l0` features. The limit is the time that the same batches take to be made, without what is
kept of them: both are measured batch by batch, so that whatever else the machine does meets both. Every span goes through its
file's bytes, as in the line. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import resource
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from components.activations.exclusion import NOTHING
from components.corpus.tokens import Sequences
from components.hardware import keep_freed_memory
from components.interpretation.activations import Pass
from components.interpretation.seen import Seen
from components.interpretation.settings import InterpretationSettings
from components.language_model.hook_points import capture, parse_hook_point
from components.language_model.loading import load_encoder, load_model
from components.run.config import parse_config
from components.run.specification import resolve
from components.sae.architectures.relu import ReLUSAE, ReLUSettings

LENGTH, SPAN = 128, 100_000
POINT = parse_hook_point("resid_post.1")
CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Text:
    """As `HeldOut`, in memory."""

    ids: np.ndarray
    sequences: range
    manifest = SimpleNamespace(context_length=LENGTH)

    @property
    def tokens(self) -> int:
        return len(self.sequences) * LENGTH

    def batches(self, tokens: int, size: int) -> Iterator[Sequences]:
        for start in range(self.sequences.start, self.sequences.stop, size):
            rows = np.arange(start, min(start + size, self.sequences.stop))
            places = rows[:, None] * LENGTH + np.arange(LENGTH)
            documents, positions = np.divmod(places, 2_048)
            yield Sequences(tokens=self.ids[places % len(self.ids)], documents=documents, positions=positions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--features", type=int, default=16_384)
    parser.add_argument("--l0", type=int, default=32)
    parser.add_argument("--times", type=int, default=1, help="then so much more text, for its memory")
    parser.add_argument("--cpu-time", action="store_true", help="this process's time on the CPU: for a machine with other work")
    arguments = parser.parse_args()
    keep_freed_memory()
    source = resolve(parse_config({"name": "b", "language_model": {"name": "builtin/stdlib-llama"}})).source
    encoder, model, ids = load_encoder(source), load_model(source, CPU), list[int]()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        ids += encoder.encode([path.read_text(errors="replace")])[0]
        if len(ids) > arguments.tokens * arguments.times:
            break
    text = Text(np.array(ids), range(arguments.tokens // LENGTH))
    block = next(text.batches(4_096, 32))
    x = capture(model, [POINT], {"input_ids": torch.tensor(block.tokens)})[POINT].reshape(-1, model.config.hidden_size)
    sae = ReLUSAE.autoencoder(ReLUSettings(d_sae=arguments.features), x.shape[1])
    sae.initialise(0)
    sae.fire_on(x.detach(), arguments.l0 / arguments.features)
    whole = Pass(
        sae=sae, d_sae=arguments.features, model=model, points=(POINT,), text=text, tokens=arguments.tokens, exclusion=NOTHING,
        device=CPU,
    )  # type: ignore[arg-type]  # fmt: skip
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    before = _gigabytes()
    seconds, firing = _passed(whole, clock)
    found: dict[str, Any] = {
        "tokens": arguments.tokens, "features": arguments.features, "l0": round(firing / arguments.tokens, 1), **seconds,
        "times_the_limit": round((seconds["limit"] + seconds["kept"]) / seconds["limit"], 3),
        "gigabytes_before": before, "gigabytes": _gigabytes(),
    }  # fmt: skip
    if arguments.times > 1:
        more = Text(text.ids, range(arguments.times * len(text.sequences)))
        _passed(dataclasses.replace(whole, text=more, tokens=more.tokens), clock)
        found |= {"tokens_then": more.tokens, "gigabytes_then": _gigabytes()}
    print(json.dumps(found, indent=2))


def _passed(whole: Pass, clock: Any) -> tuple[dict[str, float], int]:
    """Seconds for the batches and for what is kept of them, and the number of activations."""
    settings = InterpretationSettings(tokens=whole.tokens)
    kept, limit, spent, firing = Seen(settings, whole.d_sae, LENGTH, CPU), 0.0, 0.0, 0
    for start in range(0, len(whole.text.sequences), SPAN // LENGTH):  # type: ignore[arg-type]
        part = range(start, min(start + SPAN // LENGTH, len(whole.text.sequences)))  # type: ignore[arg-type]
        batches = dataclasses.replace(whole, text=dataclasses.replace(whole.text, sequences=part)).batches()
        begin = clock()
        seen = Seen(settings, whole.d_sae, LENGTH, CPU, kept)
        spent += clock() - begin
        for _ in itertools.count():
            begin = clock()
            batch = next(batches, None)
            middle = clock()
            if batch is None:
                break
            seen.add(batch)
            limit, spent = limit + middle - begin, spent + clock() - middle
            firing += int(batch.features.active().sum())
        begin = clock()
        kept.include(seen.packed())
        spent += clock() - begin
    begin = clock()
    kept.examples.found()
    kept.together.nearest(10)
    return {"limit": round(limit, 2), "kept": round(spent + clock() - begin, 2)}, firing


def _gigabytes() -> float:
    """The largest memory of this process so far."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


if __name__ == "__main__":
    main()
