"""What people see of a run: its summary and its plan as tables."""

from __future__ import annotations

import shlex
from typing import Any

from flows.cli.terminal import terminal


def print_summary(summary: dict[str, Any], config: str, root: str) -> None:
    """config: as it was given to the command, with its overrides."""
    from rich.table import Table

    metrics = summary["metrics"]
    table = Table(title=f"{summary['name']}: {'unchanged, nothing to do' if summary['reused'] else 'done'}", show_header=False)
    for name in (
        "explained_variance", "l0", "loss_recovered", "dead_fraction", "ce_loss_clean", "ce_loss_sae", "ce_loss_mean",
        "ce_loss_zero", "kl_divergence", "evaluation_tokens",
    ):  # fmt: skip
        if name not in metrics:
            continue
        value = metrics[name]
        table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if value is not None else "-")
    _add_probes(table, summary["optional"].get("probing", {}))
    if (absorbed := summary["optional"].get("absorption")) and absorbed["fraction"] is not None:
        table.add_section()
        for name in ("fraction", "full"):
            interval = f"({absorbed[f'{name}_low']:.4f} to {absorbed[f'{name}_high']:.4f})"
            table.add_row(f"absorption, {name}", f"{absorbed[name]:.4f} {interval}")
    if structure := summary["optional"].get("meta_structure"):
        table.add_section()
        for name in ("explained_variance", "random_explained_variance", "nearest_cosine", "random_nearest_cosine"):
            if name in structure:
                table.add_row(f"meta-structure, {name}", f"{structure[name]:.4f}")
    table.add_section()
    table.add_row("SAE", summary["paths"]["sae"])
    if "safety" in summary["paths"]:
        table.add_row("safety report", summary["paths"]["safety"])
    table.add_row("model version", f"models:/{summary['registered_model']}/{summary['model_version']}")
    table.add_row("alias", f"{summary['alias'] or '-'} ({summary['alias_reason']})")
    table.add_row("MLflow run", summary["mlflow_run"])
    table.add_row("seconds", ", ".join(f"{name} {value:.1f}" for name, value in summary["seconds"].items()))
    terminal().print(table)
    _print_next(summary, config, root)


def _print_next(summary: dict[str, Any], config: str, root: str) -> None:
    """What somebody does with a new SAE, to be copied into a shell."""
    at = "" if root == "data" else f" --root {shlex.quote(root)}"
    name, version = shlex.quote(summary["registered_model"]), summary["model_version"]
    steps = {}
    if "browser" in summary["paths"]:
        steps["its features, in a web browser"] = summary["paths"]["browser"]
        steps["the same, served and opened"] = f"sae features open {config}"
        steps["in this terminal; also show, search, steer"] = f"sae features list {config}"
    steps["curves, pictures and the report"] = f"sae ui {config}"
    steps["its gates, and how to make it again"] = f"sae models show {name}/{version}{at}"
    widest = max(map(len, steps))
    print("Next:")
    for what, step in steps.items():
        print(f"  {what:<{widest}}  {step}")


def _add_probes(table: Any, probing: dict[str, Any]) -> None:
    from components.evaluation.probing_table import lines, sizes

    found = lines(probing)
    if found:
        table.add_section()
    for line in found:
        every = sizes(found)
        if line.kind == "sae":
            shown = "\n".join(f"k {k}: {line.cell(k)}" for k in every)
        elif line.kind == "dense":
            shown = line.cell(0)
        else:
            shown = ", ".join(line.cell(k, interval=False) for k in every)
        table.add_row(f"{line.task}, {line.label}", shown)


def _keeps_up(online: dict[str, Any]) -> str:
    """Whether training waits for extraction."""
    slower, waits = online["extraction_to_training"], online["training_waits"]
    known = "as measured" if online["measured"] else "by operations, on devices as fast as each other"
    if waits < 0.05:
        return f"extraction takes {slower:.2g} times as long as training, {known}: it keeps up"
    return (
        f"extraction takes {slower:.2g} times as long as training, {known}: training waits for data {waits:.0%} of its time; "
        "give execution.extraction_device a faster one, or store the activations where several trainings read them"
    )


def print_plan(estimate: dict[str, Any]) -> None:
    from rich.table import Table

    def state(part: str) -> str:
        return "there, reused" if estimate[part]["exists"] else "to do"

    tokens, stored, sae = estimate["tokens"], estimate["activations"], estimate["sae"]
    model, training, memory = estimate["language_model"], estimate["training"], estimate["memory_bytes"]
    table = Table("step", "state", "what", title=f"{estimate['name']} on {estimate['device']}")
    counted = "" if tokens["exact"] else "at most "
    split = f"{tokens['corpus']}: {counted}{tokens['train']:,} train, {tokens['held_out']:,} held out"
    table.add_row("tokens", state("tokens"), f"{split}\n{tokens['url']}")
    online, each, most = stored.get("online"), stored["bytes_per_token"], stored["peak_bytes"] / 1e6
    how = f"{stored['bytes'] / 1e6:,.0f} MB ({each} B/token; {most:,.0f} MB while shuffling)"
    if online is not None:
        how = (
            f"{online['generations']:,} generations of at most {online['generation_tokens']:,}, {online['at_once']:,} "
            f"at a time and one in the making ({each} B/token; at most {most:,.0f} MB)"
        )
    table.add_row(
        "extract",
        "beside training" if online else state("activations"),
        f"{model['name']} ({model['parameters']:,} parameters) at {model['hook_point']}, {stored['tokens']:,} tokens, {how}, "
        f"{stored['flops']:.2g} FLOPs\n{stored['url']}" + ("" if online is None else f"\n{_keeps_up(online)}"),
    )
    table.add_row(
        "train",
        state("sae"),
        f"{sae['architecture']} {sae['d_in']} -> {sae['d_sae']:,} ({sae['parameters']:,} parameters), "
        f"{training['steps']:,} steps, {training['tokens']:,} tokens ({training['epochs']:.2f} epochs) {training['starts']}, "
        f"{training['flops']:.2g} FLOPs\n{sae['url']}"
        + (f"\n{training['processes']} processes: {training['torchrun']}" if "torchrun" in training else ""),
    )
    evaluation = estimate["evaluation"]
    if evaluation["impossible"]:
        table.add_row("evaluate", "not possible", evaluation["impossible"])
    else:
        what = f"{evaluation['tokens']:,} held-out tokens, {evaluation['flops']:.2g} FLOPs"
        table.add_row("evaluate", state("evaluation"), what)
        table.add_row("register", "", estimate["registered_model"])
    each = {"training": " in each process"} if "processes" in training else {}
    table.add_row("memory", "", ", ".join(f"{name} {size / 1e6:,.0f} MB{each.get(name, '')}" for name, size in memory.items()))
    terminal().print(table)
