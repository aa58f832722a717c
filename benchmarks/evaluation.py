"""An evaluation against the passes that it cannot do without: `python benchmarks/evaluation.py quickstart --help`.

The limit is the time, in the same run on the same batches, of one whole forward pass, of the three spliced passes from the
hook point on, and of the SAE's encode and decode, each with nothing else around it. The two are interleaved batch by batch,
so that whatever else the machine does meets both. Prints one JSON object. Needs the tokens and the SAE that `sae train` made.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from components.evaluation import baselines
from components.evaluation.baselines import Reconstruction, Rows
from components.evaluation.evaluate import HeldOut, TokenClasses, reference_statistics
from components.evaluation.features import FeatureSums
from components.evaluation.spliced_pass import Measurement
from components.evaluation.splicing import Splicer
from components.hardware import keep_freed_memory
from components.interop.saelens import load_saelens
from components.language_model.loading import load_model, load_tokenizer
from components.run.config import load_config
from components.run.specification import resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="overrides")
    parser.add_argument("--tokens", type=int, default=100_000, help="the held-out text is read again where it is shorter")
    parser.add_argument("--cpu-time", action="store_true", help="this process's time on the CPU: for a machine with other work")
    arguments = parser.parse_args()
    keep_freed_memory()
    plan = resolve(load_config(arguments.config, arguments.overrides))
    device, settings = plan.device, plan.config.evaluation
    manifest = plan.token_manifest()
    assert manifest is not None, "run `sae extract` and `sae train` first"
    text = HeldOut(url=plan.token_url, manifest=manifest)
    model = load_model(plan.source, device)
    sae = load_saelens(Path(plan.sae_url), device)
    reference = reference_statistics(model, plan.point, text, 5_000, 16, device)
    splicer, features = Splicer(model, plan.point), FeatureSums(sae.d_sae, device)

    def spliced(rows: Rows) -> Reconstruction:
        with torch.no_grad():
            encoded = sae.encode(rows.x)
            return Reconstruction(sae.decode(encoded), features.add(encoded))

    variants = {"sae": spliced, "zero": baselines.zero, "mean": baselines.constant(reference.mean)}
    classes = TokenClasses(load_tokenizer(plan.source))
    length = manifest.context_length
    measurement = Measurement(splicer, variants, frozenset({"sae"}), reference.mean, None, length, classes)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    seconds = dict.fromkeys(("evaluation", "clean", "spliced", "sae"), 0.0)

    def timed(name: str, function: Callable[[], object]) -> object:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = clock()
        result = function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds[name] += clock() - started
        return result

    size = max(1, settings.batch_sequences // (1 + len(variants)))
    done = 0
    while done < arguments.tokens:
        for block in text.batches(arguments.tokens - done, size):
            warm = done == 0
            tokens = torch.tensor(block.tokens).to(device).long()
            if warm:
                measurement.add(block, text)
            counted = timed("evaluation", lambda block=block: measurement.add(block, text))
            x, _ = timed("clean", lambda tokens=tokens: splicer.clean({"input_ids": tokens}))
            streams = x.expand(len(variants), *x.shape).contiguous()
            timed("spliced", lambda streams=streams: splicer.spliced(streams))
            rows = x.flatten(0, 1).float()
            with torch.no_grad():
                timed("sae", lambda rows=rows: sae.decode(sae.encode(rows)))
            done += counted
    bare = seconds["clean"] + seconds["spliced"] + seconds["sae"]
    result = {
        "device": str(device), "threads": torch.get_num_threads(), "clock": "cpu" if arguments.cpu_time else "wall",
        "tokens": done, "seconds": seconds, "ratio": seconds["evaluation"] / bare,
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
