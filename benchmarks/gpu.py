"""Everything that wants a GPU, in one command: `make bench-gpu`, or `python3 benchmarks/gpu.py` from any Python with torch.

No network, under nine minutes. Leaves `gpu.json` and `gpu.md` in `--out`: the kernels of `components/sae/kernels/gpu.py`
against float64, a TopK step with them and with torch's own, the encoder's product alone, the measured peak of the device,
reading through pinned memory on a side stream, a second GPU where there is one, and the quickstart on CUDA where the project
is installed.

`TRITON_INTERPRET=1 python benchmarks/gpu.py --kernels-only --device cpu` checks the kernels without a GPU; nothing is measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["SAE_TRITON"] = "1"

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from components.sae.auxiliary import auxk_loss, auxk_loss_of  # noqa: E402
from components.sae.kernels.selection import strongest_of_rows  # noqa: E402
from components.sae.kernels.sparse import Places, decoded, encoded  # noqa: E402

LIMIT = 1e-3
"""Of the relative error against float64."""
BUDGET_SECONDS = 530.0
Row = dict[str, Any]


def topk_step(x: Tensor, weights: list[Tensor], k: int, sparse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, pre-activations `[n, k]` and indices of a TopK coder, ranked by length: W_enc, b_enc, W_dec, b_dec."""
    W_enc, b_enc, W_dec, b_dec = weights
    norms = W_dec.norm(dim=1).detach()
    offsets = torch.arange(len(x) + 1, device=x.device) * k
    if sparse:
        found, indices = strongest_of_rows(x, W_enc, b_enc, norms, k)
        places = Places.of(indices.flatten(), offsets, len(b_enc))
        before = encoded(x, W_enc, b_enc, found.flatten(), places)
        written = decoded(torch.relu(before), W_dec, places) + b_dec
    else:
        every = torch.nn.functional.linear(x, W_enc.T, b_enc)
        with torch.no_grad():
            indices = (torch.relu(every) * norms).topk(k, dim=1, sorted=False).indices
        before = every.gather(1, indices).flatten()
        written = torch.nn.functional.embedding_bag(
            indices.flatten(), W_dec, offsets[:-1], per_sample_weights=torch.relu(before).to(W_dec.dtype), mode="sum"
        )
        written = written + b_dec
    return (x.float() - written.float()).square().sum(dim=1).mean(), before.reshape(len(x), k), indices


def drawn(d_in: int, d_sae: int, device: torch.device) -> list[Tensor]:
    """W_enc (feature by feature in memory), b_enc, W_dec, b_dec."""
    random = torch.Generator().manual_seed(1)
    shapes = ((d_sae, d_in), (d_sae,), (d_sae, d_in), (d_in,))
    made = [torch.randn(shape, generator=random) * d_in**-0.5 for shape in shapes]
    made[0] = made[0].T
    return [tensor.to(device).requires_grad_() for tensor in made]


def checks(device: torch.device, shape: tuple[int, int, int, int]) -> list[Row]:
    """Each output and gradient against a dense float64 step with the same features; features against a float64 order."""
    n, d_in, d_sae, k = shape
    x = torch.randn(n, d_in, generator=torch.Generator().manual_seed(2)).to(device)
    weights = drawn(d_in, d_sae, device)
    loss, before, indices = topk_step(x, weights, k, sparse=True)
    loss.backward()
    exact = [weight.detach().double().requires_grad_() for weight in weights]
    W_enc, b_enc, W_dec, b_dec = exact
    every = x.double() @ W_enc + b_enc
    strengths = torch.relu(every) * W_dec.norm(dim=1).detach()
    values = torch.relu(every.gather(1, indices))
    dense = torch.zeros_like(every).scatter(1, indices, values)
    expected = (x.double() - dense @ W_dec - b_dec).square().sum(dim=1).mean()
    expected.backward()
    weakest, kth = strengths.gather(1, indices).amin(dim=1), strengths.topk(k, dim=1).values[:, -1]
    pairs: dict[str, tuple[Tensor, Tensor]] = {
        "weakest chosen strength": (weakest, kth),
        "pre-activations": (before, every.gather(1, indices)),
        "loss": (loss, expected),
    }
    names = ("encoder gradient", "encoder bias gradient", "decoder gradient", "decoder bias gradient")
    for name, weight, reference in zip(names, weights, exact, strict=True):
        assert weight.grad is not None
        assert reference.grad is not None
        pairs[name] = (weight.grad, reference.grad)
    found = [compared(name, *pair) for name, pair in pairs.items()]
    distinct = bool((indices.sort(dim=1).values.diff(dim=1) > 0).all())
    found.append({"check": "no feature twice", "error": 0.0 if distinct else 1.0, "passed": distinct})
    return [{**row, "shape": shape} for row in found]


def auxk_checks(device: torch.device) -> list[Row]:
    """AuxK, with fewer dead features than take part in it, and with more."""
    n, d_in, d_sae, k = 20, 40, 128, 8
    random = torch.Generator().manual_seed(3)
    x, residual = (torch.randn(n, d_in, generator=random).to(device) for _ in range(2))
    found = []
    for count in (0, 5, 70):
        dead = torch.arange(d_sae, device=device) < count
        W_enc, b_enc, W_dec, _ = weights = drawn(d_in, d_sae, device)
        named = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "d_sae": d_sae}
        coder: Any = SimpleNamespace(**named, mesh=None, read_bias=lambda bias: bias)  # which needs no pydantic
        loss = auxk_loss_of(coder, x, None, dead, residual, k)
        exact = [weight.detach().double().requires_grad_() for weight in weights]
        expected = auxk_loss(x.double() @ exact[0] + exact[1], dead, residual, exact[2], k)
        expected.backward()
        if loss.requires_grad:
            loss.backward()
        found.append(compared(f"AuxK loss, {count} dead", loss, expected))
        for name, weight, reference in zip(("W_enc", "b_enc", "W_dec"), weights, exact, strict=False):
            value = torch.zeros_like(weight) if weight.grad is None else weight.grad
            assert reference.grad is not None
            found.append(compared(f"AuxK gradient to {name}, {count} dead", value, reference.grad))
    return found


def compared(name: str, value: Tensor, exact: Tensor) -> Row:
    error = ((value.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()
    return {"check": name, "error": error, "passed": error <= LIMIT}


def timed(function: Callable[[], object], device: torch.device, count: int = 10) -> float:
    """Median of milliseconds, after three calls that warm up."""
    for _ in range(3):
        function()
    times = []
    for _ in range(count):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        function()
        torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - started))
    return sorted(times)[count // 2]


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


def steps(device: torch.device, shape: tuple[int, int, int, int], peak: float) -> list[Row]:
    """Forward, backward, clipping and fused Adam in bfloat16 products with float32 weights; the encoder's product alone."""
    n, d_in, d_sae, k = shape
    x, rows = torch.randn(n, d_in, device=device), []
    half, weight = x.bfloat16(), torch.randn(d_sae, d_in, device=device, dtype=torch.bfloat16)
    product = timed(lambda: torch.nn.functional.linear(half, weight), device)
    flops = 2 * n * d_in * d_sae
    rows.append({"step": "encoder product", "ms": product, "share_of_peak": flops / product / 1e9 / peak})
    for name, sparse in (("TopK, torch", False), ("TopK, Triton", True)):
        weights = drawn(d_in, d_sae, device)
        optimizer = torch.optim.Adam(weights, lr=1e-4, fused=True)

        def step(weights=weights, optimizer=optimizer, sparse=sparse) -> None:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss, _, _ = topk_step(x, weights, k, sparse)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        torch.cuda.reset_peak_memory_stats(device)
        taken = timed(step, device, 5)
        memory = torch.cuda.max_memory_allocated(device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
            waits = ""
        except RuntimeError as error:
            waits = str(error).splitlines()[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        shares = {"share_of_peak": flops / taken / 1e9 / peak, "of_product": product / taken}
        rows.append({"step": name, "ms": taken, **shares, "bytes": memory, "waits_for_the_device": waits})
    return [{**row, "shape": shape} for row in rows]


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
    missing = [name for name in ("prefect", "mlflow", "transformers", "pyarrow") if importlib.util.find_spec(name) is None]
    if missing:
        return {"quickstart": "not run", "why": f"this Python has no {', '.join(missing)}"}
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "flows.cli",
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


def main() -> int:
    parser = argparse.ArgumentParser(description="Everything that wants a GPU, in one command.")
    parser.add_argument("--out", type=Path, default=ROOT / "data/bench-gpu")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--kernels-only", action="store_true")
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print("There is no GPU that torch can use here, so nothing was measured.")
        return 0
    started, device = time.monotonic(), torch.device(arguments.device)
    small = [(35, 40, 96, 5), (17, 64, 128, 16)]
    sections: dict[str, list[Row]] = {
        "kernels": [row for shape in small for row in checks(device, shape)] + auxk_checks(device)
    }
    if not arguments.kernels_only:
        sections["kernels"] += checks(device, (2048, 768, 16_384, 32))
        peak = peaks(device)
        sections["device"] = [{"device": torch.cuda.get_device_name(device), "torch": torch.__version__, **peak}]
        sections["steps"] = steps(device, (4096, 768, 16_384, 32), peak["bfloat16"])
        if torch.cuda.mem_get_info(device)[0] > 30e9:
            sections["steps"] += steps(device, (8192, 2304, 65_536, 64), peak["bfloat16"])
        sections["reading"] = reading(device)
        if torch.cuda.device_count() > 1:
            second = torch.device("cuda:1")
            sections["cuda:1"] = [row for shape in small for row in checks(second, shape)]
        sections["quickstart"] = [quickstart(BUDGET_SECONDS - (time.monotonic() - started))]
    text = "\n".join(f"## {name}\n\n{table(rows)}" for name, rows in sections.items())
    print(text)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "gpu.json").write_text(json.dumps(sections, indent=1))
    (arguments.out / "gpu.md").write_text(text)
    return 0 if all(row.get("passed", True) for rows in sections.values() for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
