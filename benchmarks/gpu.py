"""Everything that wants a GPU, in one command: `make bench-gpu`, or `python3 benchmarks/gpu.py` from any Python with torch.

No network, under nine minutes. Leaves `gpu.json` and `gpu.md` in `--out`: the kernels of `components/sae/kernels/gpu` against
float64 (`gpu_checks.py`), whole training steps (`gpu_steps.py`; SAELens' too with `--peers FOLDER`), the measured peak of the
device, reading through pinned memory on a side stream, a second GPU where there is one, trainings that are stopped and go on,
and the quickstart on CUDA: the last three where this Python has what the project needs.

`TRITON_INTERPRET=1 python benchmarks/gpu.py --kernels-only --device cpu` checks the kernels without a GPU; nothing is measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from gpu_checks import Row, all_checks, checks, selection_checks  # noqa: E402
from gpu_steps import continued, steps, timed  # noqa: E402
from torch import Tensor  # noqa: E402

BUDGET_SECONDS = 530.0


def peaks(device: torch.device) -> Row:
    """Teraflops of one square product in each number format."""
    found: Row = {}
    for name, dtype, tf32 in (
        ("bfloat16", torch.bfloat16, False),
        ("tf32", torch.float32, True),
        ("float32", torch.float32, False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = (torch.randn(8192, 8192, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        found[name] = 2 * 8192**3 / timed(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device) / 1e9
    torch.backends.cuda.matmul.allow_tf32 = False
    return found


def reading(device: torch.device) -> list[Row]:
    """A step's product on batches from host memory: pageable, pinned, and pinned one ahead on a side stream."""
    n, d_in, d_sae = 8192, 2304, 16_384
    weight = torch.randn(d_sae, d_in, device=device, dtype=torch.bfloat16)
    hosts = {"pageable": torch.randn(4, n, d_in).bfloat16()}
    hosts["pinned"] = hosts["pageable"].pin_memory()
    side, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    found = []
    for name, host, ahead in (("pageable", "pageable", 0), ("pinned", "pinned", 0), ("pinned, side stream", "pinned", 1)):

        def epoch(batches: Tensor = hosts[host], ahead: int = ahead) -> None:
            waiting: list[Tensor] = []
            for batch in batches:
                with torch.cuda.stream(side if ahead else current):
                    waiting.append(batch.to(device, non_blocking=True))
                if len(waiting) > ahead:
                    use(waiting.pop(0), ahead)
            for batch in waiting:
                use(batch, ahead)

        def use(batch: Tensor, ahead: int) -> None:
            if ahead:
                current.wait_stream(side)
                batch.record_stream(current)
            torch.nn.functional.linear(batch, weight)

        found.append({"reading": name, "ms": timed(epoch, device) / 4})
    return found


def quickstart(seconds: float) -> Row:
    """The whole line on CUDA, where this Python has what it needs."""
    if absent := missing("prefect", "mlflow", "transformers", "pyarrow", "typer"):
        return {"quickstart": "not run", "why": f"this Python has no {absent}"}
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-c",
            "from flows.cli import main; main()",
            "run",
            "quickstart",
            "--set",
            "device=cuda",
            "--set",
            f"storage.root={folder}",
        ]
        started = time.perf_counter()
        try:
            done = subprocess.run([*command, "--json"], cwd=ROOT, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"quickstart": "not finished", "why": f"{seconds:.0f} s were left"}
    if done.returncode:
        return {"quickstart": "failed", "why": done.stderr.strip()[-500:]}
    return {"quickstart": "done", "seconds": time.perf_counter() - started, "result": json.loads(done.stdout)}


def table(rows: list[Row]) -> str:
    """Markdown."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for row in rows:
        cells = (row.get(name, "") for name in names)
        lines.append("| " + " | ".join(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def written(sections: dict[str, list[Row]], out: Path) -> str:
    text = "\n".join(f"## {name}\n\n{table(rows)}" for name, rows in sections.items())
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.json").write_text(json.dumps(sections, indent=1))
    (out / "gpu.md").write_text(text)
    return text


def missing(*names: str) -> str:
    """Of these modules, those that this Python does not have."""
    return ", ".join(name for name in names if importlib.util.find_spec(name) is None)


def main() -> int:
    parser = argparse.ArgumentParser(description="Everything that wants a GPU, in one command.")
    parser.add_argument("--out", type=Path, default=ROOT / "data/bench-gpu")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--kernels-only", action="store_true")
    parser.add_argument("--peers", type=Path, help="a folder in which pip has installed SAELens without its requirements")
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print("There is no GPU that torch can use here, so nothing was measured.")
        return 0
    started, device = time.monotonic(), torch.device(arguments.device)
    sections: dict[str, list[Row]] = {"kernels": all_checks(device)}
    if not arguments.kernels_only:
        large = (2048, 768, 16_384, 32)
        sections["kernels"] += checks(device, large) + selection_checks(device, large)
        peak = peaks(device)
        sections["device"] = [{"device": torch.cuda.get_device_name(device), "torch": torch.__version__, **peak}]
        sections["reading"] = reading(device)
        if torch.cuda.device_count() > 1:
            sections["cuda:1"] = all_checks(torch.device("cuda:1"))
        if absent := missing("pydantic", "pyarrow"):
            sections["steps"] = [{"steps": "not run", "why": f"this Python has no {absent}"}]
        else:
            shapes = [(4096, 768, 16_384, 32), (8192, 2304, 65_536, 64), (1024, 64, 1 << 20, 32)]
            free = torch.cuda.mem_get_info(device)[0]
            some = shapes if free > 30e9 else shapes[:1]
            sections["steps"] = [row for shape in some for row in steps(device, shape, peak["bfloat16"], arguments.peers)]
        written(sections, arguments.out)
        if absent := missing("pydantic", "pyarrow", "transformers"):
            sections["continued"] = [{"continued": "not run", "why": f"this Python has no {absent}"}]
        else:
            sections["continued"] = continued(device)
        sections["quickstart"] = [quickstart(BUDGET_SECONDS - (time.monotonic() - started))]
    print(written(sections, arguments.out))
    return 0 if all(row.get("passed", True) for rows in sections.values() for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
