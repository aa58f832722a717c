"""Peak memory of trainings against what `sae plan` says: `python benchmarks/memory.py [--two] [CASE ...]`.

Each case trains for some steps in a process of its own, as `sae run` starts it, or with `--two` in two that share its features;
the peak is the kernel's (VmHWM; of two, the larger by getrusage). Its activation dataset is made first where it is not there.
"""

from __future__ import annotations

import json
import subprocess
import sys

from components import steps, storage
from components.planning.memory import rank_memory
from components.planning.shape import shape_of
from components.run.config import load_config
from components.run.specification import Specification, resolve
from components.training.process import _TRAINING

_CHILD = """
import json, re, sys, torch
from components.training.process import _TRAINING, launch
from components.training.settings import RankSettings
from components.training.loop import train_together

def said(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

work = _TRAINING.validate_python(json.loads(sys.stdin.readline()))
before = said("VmRSS")
train_together([work], torch.device("cpu"))
print(json.dumps({"before": before, "peak": said("VmHWM")}))
"""
_RANKS = """
import json, resource, sys, torch
from components.training.process import _TRAINING, launch
from components.training.settings import RankSettings

work = _TRAINING.validate_python(json.loads(sys.stdin.readline()))
launch(work, torch.device("cpu"), ranks=RankSettings(feature_parallel=2))
print(json.dumps({"peak": 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss}))
"""
CASES = {
    "relu": ["sae.architecture=relu", "sae.d_sae=8192"],
    "jumprelu": ["sae.architecture=jumprelu", "sae.d_sae=8192"],
    "gated": ["sae.architecture=gated", "sae.d_sae=8192"],
    "topk": ["sae.architecture=topk", "sae.k=32", "sae.d_sae=32768"],
    "batchtopk": ["sae.architecture=batchtopk", "sae.k=32", "sae.d_sae=65536"],
    "matryoshka": ["sae.architecture=matryoshka", "sae.k=32", "sae.d_sae=32768"],
}
"""Every architecture, of sizes at which the coder is most of the process."""


def case(overrides: list[str], tokens: int = 4_096) -> Specification:
    shared = ["sae={}", "training.batch_size=1024", f"training.tokens={tokens}"]
    return resolve(load_config("quickstart", [*shared, *overrides]))


def measured(run: Specification) -> dict[str, int]:
    """Bytes of the process before its training, and at its peak."""
    job = _TRAINING.dump_json(run.training()).decode()
    done = subprocess.run([sys.executable, "-c", _CHILD], input=job + "\n", capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout)
    return found


def measured_of_ranks(run: Specification) -> dict[str, int]:
    """The same of two processes that share the features, the larger of the two; nothing of the process before it."""
    job = _TRAINING.dump_json(run.training()).decode()
    done = subprocess.run([sys.executable, "-c", _RANKS], input=job + "\n", capture_output=True, text=True, check=True)
    return {"before": 0, "peak": int(json.loads(done.stdout)["peak"])}


def main() -> None:
    ranks = 2 if "--two" in sys.argv else 1
    names = [name for name in sys.argv[1:] if name != "--two"]
    print("| case | planned MB | measured MB | planned / measured | process alone MB |\n|---|---|---|---|---|")
    for name in names or CASES:
        run = case([f"rerun=memory-{name}", *CASES[name]])
        steps.extract(run)
        storage.delete(run.sae_url)
        found = measured(run) if ranks == 1 else measured_of_ranks(run)
        planned = rank_memory(shape_of(run), on_gpu=False, ranks=ranks).peak
        print(
            f"| {name} | {planned / 1e6:,.0f} | {found['peak'] / 1e6:,.0f} | {planned / found['peak']:.3f} | "
            f"{found['before'] / 1e6:,.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
