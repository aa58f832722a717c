"""`sae sweep` and `sae recommend` as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from components.run.config import load_config, parse_config
from components.run.specification import resolve
from components.sweeps import work
from components.sweeps.grid import children
from components.sweeps.record import SweepRecord, load_sweep
from components.training.loop import train_together
from flows.cli import app


@pytest.fixture
def config(tiny_tree: dict, tmp_path: Path) -> str:
    tiny_tree["sae"] = {"architecture": "batchtopk", "expansion_factor": 2, "k": 4}
    tiny_tree["training"] |= {"tokens": 4_000, "learning_rate": 4e-3}
    tiny_tree["evaluation"] = {"tokens": 500, "baselines": []}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_tree))
    return str(path)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def here(group, give_up):
        jobs = [child.run.training() for child in group]
        return train_together(jobs, group[0].run.device, lambda place, points: give_up(group[place], points))

    monkeypatch.setattr(work, "in_a_process", here)


def test_a_sweep_prints_its_record_as_one_object_and_a_table_for_people(config: str):
    arguments = ["sweep", config, "--grid", "training.learning_rate=4e-3,1e14"]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert [point["status"] for point in found["points"]] == ["finished", "diverged"]
    assert found["laws"] is None
    assert "at least 3 numbers of features" in found["no_laws"]
    assert load_sweep(found["url"]) == SweepRecord.model_validate(
        {name: value for name, value in found.items() if name not in ("url", "laws", "no_laws", "sparsity")}
    )
    again = CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments)
    assert again.exit_code == 0
    table = again.stdout
    for part in ("learning_rate", "recovered", "sparse", "diverged", "no laws", "sweep.json"):
        assert part in table


def test_a_recommendation_is_printed_and_written_as_a_configuration_to_run(config: str, tmp_path: Path):
    base = resolve(load_config(config))
    grid = {"sae.d_sae": [64, 128, 256, 512], "training.tokens": [25_600, 51_200, 102_400, 204_800]}
    points = []
    for child in children(base, grid):
        point = work.point_of(child, "finished")
        points.append(point.model_copy(update={"loss": 0.03 + point.features**-0.5 + 40 * point.tokens**-0.6}))
    record = SweepRecord(
        digest="0", name="known", grid=grid, dataset_digest="0", evaluation_tokens=1, mlflow_run="0", seconds=0, points=points
    )
    place, written = tmp_path / "sweep.json", tmp_path / "next.yaml"
    place.write_text(record.model_dump_json())
    arguments = ["recommend", config, "--sweep", str(place)]
    done = CliRunner().invoke(app, [*arguments, "--flops", "1e10", "--write", str(written), "--json"])
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    chosen = parse_config(yaml.safe_load(written.read_text()))
    assert (chosen.sae.d_sae, chosen.training.tokens) == (found["features"], found["tokens"])
    assert resolve(chosen).dataset_digest == base.dataset_digest
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*arguments, "--features", "700"])
    assert shown.exit_code == 0
    assert "features 1.37 times the sweep's nearest" in " ".join(shown.stdout.split())
    for wrong, parts in {
        ("--flops", "1e10", "--features", "64"): ["exactly one"],
        ("--gpu-hours", "1"): ["--gpu-hours", "--gpu"],
        ("--gpu-hours", "1", "--gpu", "h100"): ["times the sweep's largest budget"],
    }.items():
        refused = CliRunner().invoke(app, [*arguments, *wrong])
        assert refused.exit_code == 2
        assert all(part in refused.stderr for part in parts), refused.stderr


def test_a_study_is_drawn_from_what_the_command_line_says(config: str):
    arguments = ["sweep", config, "--space", "sae.k=2..6", "--space", "training.learning_rate=1e-3..8e-3:log", "--trials", "2"]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert [point["status"] for point in found["points"]] == ["finished"] * 2
    assert found["study"]["trials"] == 2
    assert (Path(found["url"]) / "study.db").exists()
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments)
    assert "2 children" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["--grid or --space"]),
        (["--grid", "sae.k=2,4", "--space", "sae.k=2..4"], ["--grid or --space"]),
        (["--grid", "sae.k=2,4", "--trials", "3"], ["--trials", "--space"]),
        (["--space", "sae.k=2..4", "--objective", "beauty"], ["study.objective", "'beauty'", "loss_recovered"]),
        (["--space", "corpus.seed=2..4"], ["corpus.seed", "sae and training"]),
        (["--space", "sae.k=2..4", "--study-storage", "mysql://x:y@z/w"], ["study.storage", "PGPASSWORD"]),
    ],
)
def test_a_sweep_that_cannot_be_is_one_sentence(config: str, arguments: list[str], parts: list[str]):
    refused = CliRunner().invoke(app, ["sweep", config, *arguments])
    assert refused.exit_code == 2
    assert all(part in refused.stderr for part in parts), refused.stderr


def test_a_plan_for_elsewhere_is_printed_with_what_is_assumed(config: str):
    arguments = ["plan", config, "--on", "gpu=l4", "--on", "gpu_hour=0.7"]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ranks"] == 1
    assert found["memory"]["peak"] < found["gpu_bytes"] == 24 * 10**9
    shown = " ".join(CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments).stdout.split())
    for part in ("a rank", "assumed, 30% of 30 TFLOP/s of a l4", "cost, stored", "requests"):
        assert part in shown
    refused = CliRunner().invoke(app, ["plan", config, "--on", "gpu=l4", "--on", "memory_gb=0.5"])
    assert refused.exit_code == 2
    assert "training.batch_size" in refused.stderr
