"""What a version must show to become champion, case by case."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from components.registry.gates import GateReport, Gates, check_gates, load_gates, markdown_table, shipped_gates
from components.settings import UserError

ROOT = Path(__file__).parents[2]


def metrics(recovered: float | None = 0.9, l0: float = 10.0, half: float | None = None, **more) -> dict:
    found = {
        "loss_recovered": recovered, "l0": l0, "explained_variance": 0.8, "dead_fraction": 0.01, "evaluation_tokens": 100_000,
    }  # fmt: skip
    if half is not None:
        found |= {"loss_recovered_low": recovered - half, "loss_recovered_high": recovered + half}
    return {**found, **more}


def checked(candidate: dict, champion: dict | None = None, where: str = "set", gates: Gates | None = None) -> GateReport:
    return check_gates(gates or load_gates(None), candidate, where, champion, "set", "7")


# candidate, champion, gates that fail, and by how much the first of them does
CASES = {
    "the first one, with good numbers": (metrics(), None, {}),
    "too many dead features": (metrics(dead_fraction=0.25), None, {"dead_fraction": 0.15}),
    "as many dead features as allowed": (metrics(dead_fraction=0.1), None, {}),
    "too little loss recovered": (metrics(0.3), None, {"loss_recovered": 0.2}),
    "no loss recovered at all, as a ratio has no meaning": (metrics(None), None, {"loss_recovered": None}),
    "a metric is not a number": (metrics(mse=math.nan), None, {"finite": None}),
    "a metric is infinite": (metrics(kl_divergence=math.inf), None, {"finite": None}),
    "measured on too few tokens": (metrics(evaluation_tokens=400), None, {"evaluation_tokens": 49_600}),
    "the token count is missing": (metrics(evaluation_tokens=None), None, {"evaluation_tokens": 50_000}),
    "several at once are all named": (metrics(0.3, dead_fraction=0.2), None, {"loss_recovered": 0.2, "dead_fraction": 0.1}),
    "more loss recovered at the same l0": (metrics(0.91), metrics(0.9), {}),
    "more loss recovered at 1.04 times the l0": (metrics(0.91, 10.4), metrics(0.9, 10), {}),
    "more loss recovered at 1.1 times the l0": (metrics(0.91, 11), metrics(0.9, 10), {"champion.l0": 0.5}),
    "the same loss with fewer features": (metrics(0.9, 9), metrics(0.9, 10), {}),
    "less loss with fewer features": (
        metrics(0.89, 5), metrics(0.9, 10), {"champion.loss_recovered": 0.01, "champion.improvement": None}
    ),
    "the same again": (metrics(), metrics(), {"champion.improvement": None}),
    "less loss, but within the interval, with fewer features": (
        metrics(0.897, 9, half=0.005), metrics(0.9, 10, half=0.004), {}
    ),
    "less loss than the interval allows": (
        metrics(0.893, 9, half=0.005), metrics(0.9, 10), {"champion.loss_recovered": 0.002, "champion.improvement": None}
    ),
    "the champion's interval counts where it alone has one": (metrics(0.897, 9), metrics(0.9, 10, half=0.004), {}),
    "more loss recovered, but not beyond the interval, at the same l0": (
        metrics(0.903, half=0.005), metrics(0.9, half=0.005), {"champion.improvement": None}
    ),
    "a wide interval is no licence": (
        metrics(0.87, 9, half=0.2), metrics(0.9, 10), {"champion.loss_recovered": 0.02, "champion.improvement": None}
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_gate_says_whether_and_by_how_much(case: str):
    candidate, champion, failing = CASES[case]
    report = checked(candidate, champion)
    failed = {result.gate: result.short_by for result in report.results if not result.passed}
    assert failed == {gate: pytest.approx(short) if short is not None else None for gate, short in failing.items()}
    assert report.passed is not bool(failing)
    for gate, short in failing.items():
        assert gate in report.reason
        assert short is None or f"short by {short:.5g}" in report.reason
        assert f"| {gate} | **fail** |" in markdown_table(report.as_json())


def test_other_held_out_tokens_do_not_compare():
    report = checked(metrics(0.99), metrics(0.9), where="other set")
    assert [result.gate for result in report.results if not result.passed] == ["champion.evaluation_set"]


def seen(explained: float, l0: float = 10.0) -> dict:
    """Metrics of an SAE on images."""
    bounds = {"explained_variance_low": explained - 0.005, "explained_variance_high": explained + 0.005}
    return {"explained_variance": explained, **bounds, "l0": l0, "dead_fraction": 0.01, "evaluation_tokens": 100_000}


def test_on_images_explained_variance_is_compared_and_a_gate_on_the_loss_says_that_there_is_none():
    report = checked(seen(0.9))
    assert [row.gate for row in report.results if not row.passed] == ["loss_recovered"]
    assert "there is no such metric" in report.reason
    own = Gates(bounds={"explained_variance": {"at_least": 0.5}})
    for candidate, champion, failed in (
        (seen(0.9), None, []),
        (seen(0.92), seen(0.9), []),
        (seen(0.9, 9.0), seen(0.9), []),
        (seen(0.902), seen(0.9), ["champion.improvement"]),
        (seen(0.89, 9.0), seen(0.9), ["champion.explained_variance", "champion.improvement"]),
        (seen(0.99), metrics(), ["champion.comparable"]),  # one on text is another thing
    ):
        report = checked(candidate, champion, gates=own)
        assert [row.gate for row in report.results if not row.passed] == failed
    assert "explains more variance" in checked(seen(0.92), seen(0.9), gates=own).reason


def test_of_two_versions_at_most_one_beats_the_other():
    values = [(recovered, l0) for recovered in (0.88, 0.895, 0.899, 0.9, 0.903, 0.92) for l0 in (9.0, 9.9, 10.0, 10.3, 12.0)]
    gates = load_gates(None)
    for half in (None, 0.004):
        beats = {
            (a, b): checked(metrics(*a, half=half), metrics(*b, half=half), gates=gates).passed for a in values for b in values
        }  # fmt: skip
        assert not [pair for pair in beats if beats[pair] and beats[pair[::-1]]]
        assert any(beats.values())


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("evaluation_token: 5", ["evaluation_token", "evaluation_tokens"]),
        ("bounds: {l0: {at_lest: 1}}", ["bounds.l0.at_lest"]),
        ("bounds: {l0: {}}", ["bounds.l0", "at_least"]),
        ("bounds: {l0: {at_least: 3, at_most: 1}}", ["bounds.l0", "over"]),
        ("champion: {l0_at_most_times: 0}", ["l0_at_most_times", "greater than 0"]),
        ("[", ["not YAML"]),
    ],
)
def test_a_mistake_in_the_gates_is_one_sentence(tmp_path: Path, text: str, parts: list[str]):
    path = tmp_path / "gates.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_gates(str(path))
    assert str(error.value).startswith("tracking.gates: ")
    for part in parts:
        assert part in str(error.value)


def test_gates_that_are_not_there_are_named():
    with pytest.raises(UserError, match=r"tracking\.gates.*/nowhere/gates\.yaml"):
        load_gates("/nowhere/gates.yaml")


def test_the_shipped_gates_are_in_the_wheel_and_are_those_of_the_folder(tmp_path: Path):
    assert shipped_gates() == ROOT / "mlflow" / "gates.yaml"
    if shutil.which("git") is None:
        pytest.skip("git is needed to build")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        packed = yaml.safe_load(wheel.read("components/registry/gates.yaml"))
        assert not [name for name in wheel.namelist() if name.startswith("mlflow/")]
    assert packed == yaml.safe_load(shipped_gates().read_text())
