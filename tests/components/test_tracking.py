"""Runs, versions and aliases in a real MLflow store (SQLite), and the registered model in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file

from components import steps, storage
from components.interop.saelens import load_saelens
from components.registry.history import CHAMPION
from components.registry.records import Outcome
from components.registry.versions import CHALLENGER, champion_of
from components.run.config import parse_config
from components.run.specification import Specification, resolve
from components.settings import UserError
from components.tracking.runs import EVALUATION_SET, TrackedRun
from components.tracking.settings import TrackingSettings
from components.tracking.store import connect, tracking_uri


def complete(tree: dict, sparsity_coefficient: float = 5.0, **training) -> tuple[Specification, Outcome]:
    """The whole line without Prefect."""
    sae = {**tree["sae"], "sparsity_coefficient": sparsity_coefficient}
    plan = resolve(parse_config({**tree, "sae": sae, "training": {**tree["training"], **training}}))
    steps.extract(plan)
    steps.train(plan)
    steps.evaluate(plan)
    with steps.tracked(plan, {}) as run:
        outcome = steps.register(plan, run)
    return plan, outcome


def client_of(plan: Specification) -> MlflowClient:
    return connect(plan.config.tracking, plan.config.storage.root)


@pytest.fixture(autouse=True)
def _few_samples(tiny_tree: dict):
    tiny_tree["evaluation"]["tokens"] = 400
    tiny_tree["training"]["tokens"] = 10_000


def test_a_run_holds_parameters_curves_evaluation_dataset_figures_and_artifact(tiny_tree: dict):
    plan, outcome = complete(tiny_tree)
    client = client_of(plan)
    run = client.get_run(outcome.mlflow_run)
    assert run.info.status == "FINISHED"
    assert run.data.params["sae.sparsity_coefficient"] == "5.0"
    assert run.data.params["corpus.context_length"] == "32"
    record, measured = plan.training_record(), plan.evaluation_record()
    history = client.get_metric_history(outcome.mlflow_run, "train/loss")
    assert [(m.step, m.value) for m in history] == [(int(p["tokens"]), p["loss"]) for p in record.curves]
    for name, value in measured.metrics.items():
        if value is not None:
            assert run.data.metrics[f"eval/{name}"] == pytest.approx(value)
    by_name = {found.dataset.name: found for found in run.inputs.dataset_inputs}
    assert set(by_name) == {Path(plan.dataset_url).name, EVALUATION_SET}
    dataset = by_name[Path(plan.dataset_url).name]
    assert dataset.dataset.digest == plan.dataset_digest
    assert plan.dataset_url in dataset.dataset.source
    assert run.data.tags["sae.dataset_digest"] == plan.dataset_digest
    assert len(run.data.tags["mlflow.source.git.commit"]) == 40
    names = {entry.path for folder in (None, "sae") for entry in client.list_artifacts(outcome.mlflow_run, folder)}
    assert {"training.png", "cross_entropy.png", "feature_density.png"} <= names
    assert {"sae/cfg.json", "sae/evaluation.json", "sae/lineage.json", "sae/MODEL_CARD.md"} <= names
    assert not {"sae/sae_weights.safetensors", "sae/features.parquet"} & names  # those are in the model alone
    lineage = json.loads(Path(plan.sae_url, "lineage.json").read_text())
    assert lineage["mlflow_run"] == outcome.mlflow_run
    assert lineage["dataset_digest"] == plan.dataset_digest


def test_registering_again_adds_neither_run_nor_version_nor_point(tiny_tree: dict):
    plan, first = complete(tiny_tree)
    client = client_of(plan)
    points = len(client.get_metric_history(first.mlflow_run, "train/loss"))
    _, second = complete(tiny_tree)
    assert second == first
    assert len(client.search_model_versions(f"name='{plan.registered_model}'")) == 1
    assert len(client.search_logged_models([client.get_run(first.mlflow_run).info.experiment_id])) == 1
    assert len(client.get_metric_history(first.mlflow_run, "train/loss")) == points


def eval_points(client: MlflowClient, run: str, names: list[str]) -> list[tuple]:
    return [(m.key, m.value, m.timestamp) for name in names for m in client.get_metric_history(run, f"eval/{name}")]


def test_the_logged_model_has_the_evaluation_as_its_metrics_once(tiny_tree: dict, monkeypatch: pytest.MonkeyPatch):
    def killed(*arguments) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(TrackedRun, "log_model_metrics", killed)
        complete(tiny_tree)
    plan, outcome = complete(tiny_tree)
    client, run = client_of(plan), outcome.mlflow_run
    measured = plan.evaluation_record().metrics
    numbers = {name: value for name, value in measured.items() if value is not None}
    version = client.get_model_version(plan.registered_model, str(outcome.model_version))
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    assert {metric.key: metric.value for metric in model.metrics} == {f"eval/{name}": numbers[name] for name in numbers}
    evaluation_set = plan.evaluation_set(measured["evaluation_tokens"])
    assert {(m.dataset_name, m.dataset_digest, m.run_id) for m in model.metrics} == {(EVALUATION_SET, evaluation_set, run)}
    points = eval_points(client, run, list(numbers))
    assert len(points) == len(numbers)  # the model's are the run's own, not a second point of each

    client.delete_model_version(plan.registered_model, version.version)  # as if killed just before it was made
    complete(tiny_tree)
    (again,) = client.search_logged_models([client.get_run(run).info.experiment_id])
    assert (again.model_id, len(again.metrics)) == (model.model_id, len(numbers))
    assert eval_points(client, run, list(numbers)) == points


def test_logged_models_are_found_and_ordered_by_what_was_measured(tiny_tree: dict):
    plan, worse = complete(tiny_tree, learning_rate=1e-2, sparsity_coefficient=500.0)
    _, better = complete(tiny_tree, learning_rate=1e-2, sparsity_coefficient=0.1)
    client = client_of(plan)
    experiment = [client.get_run(worse.mlflow_run).info.experiment_id]
    key = "metrics.`eval/explained_variance`"
    tokens = plan.evaluation_record().metrics["evaluation_tokens"]
    same_text = {"dataset_name": EVALUATION_SET, "dataset_digest": plan.evaluation_set(tokens)}
    ordered = client.search_logged_models(experiment, order_by=[{"field_name": key, "ascending": False, **same_text}])
    assert [model.source_run_id for model in ordered] == [better.mlflow_run, worse.mlflow_run]
    found = client.search_logged_models(experiment, f"{key} > 0.5", datasets=[same_text])
    assert [model.source_run_id for model in found] == [better.mlflow_run]
    assert not client.search_logged_models(experiment, f"{key} > 0.5", datasets=[{**same_text, "dataset_digest": "other"}])


def test_other_weights_of_the_same_run_leave_the_registered_version_whole(tiny_tree: dict):
    plan, first = complete(tiny_tree)
    # as if the same configuration had been trained on another kind of device
    weights = Path(plan.sae_url, "sae_weights.safetensors")
    tensors = load_file(weights)
    save_file({**tensors, "b_dec": tensors["b_dec"] + 1e-6}, weights)
    record = storage.read_json(f"{plan.sae_url}/training.json")
    storage.put_json({**record, "weights_sha256": storage.file_sha256(weights)}, f"{plan.sae_url}/training.json")
    again, second = complete(tiny_tree)
    assert (second.mlflow_run, second.model_version) == (first.mlflow_run, 2)
    client = client_of(again)
    kept = client.search_logged_models([client.get_run(first.mlflow_run).info.experiment_id])
    assert len(kept) == 2  # a deleted one is not found, and is gone for good with MLflow's next clean-up


def test_more_training_text_does_not_make_saes_incomparable(tiny_tree: dict):
    first = resolve(parse_config(tiny_tree))
    tiny_tree["corpus"]["train_tokens"] = 5_000
    second = resolve(parse_config(tiny_tree))
    assert first.token_digest != second.token_digest
    assert first.evaluation_set(400) == second.evaluation_set(400)
    for section, change in {"corpus": {"held_out_tokens": 900}, "activations": {"hook_points": ["mlp_out.0"]}}.items():
        other = resolve(parse_config({**tiny_tree, section: {**tiny_tree[section], **change}}))
        assert other.evaluation_set(400) != first.evaluation_set(400)


def test_a_killed_registration_decides_again_against_the_champion_of_now(tiny_tree: dict):
    plan, first = complete(tiny_tree, learning_rate=1e-2, sparsity_coefficient=500.0)
    client, name = client_of(plan), plan.registered_model
    # as if the call had been killed between its decision and its alias, and a better version had won meanwhile
    client.delete_model_version_tag(name, str(first.model_version), "sae.registered")
    client.delete_registered_model_alias(name, CHAMPION)
    _, second = complete(tiny_tree, learning_rate=1e-2, sparsity_coefficient=0.1)
    assert second.alias == CHAMPION
    with steps.tracked(plan, {}) as run:
        assert steps.register(plan, run).alias == CHALLENGER
    assert int(champion_of(client, name).version) == second.model_version


def test_a_failed_run_says_why_and_the_next_one_continues_it(tiny_tree: dict):
    plan = resolve(parse_config(tiny_tree))
    with pytest.raises(RuntimeError), steps.tracked(plan, {}) as run:
        run.add_points([{"tokens": 10.0, "loss": 1.0}])
        raise RuntimeError("the disk is full")
    client = client_of(plan)
    failed = client.get_run(run.run_id)
    assert failed.info.status == "FAILED"
    assert failed.data.tags["sae.failure"] == "RuntimeError: the disk is full"
    assert failed.data.metrics["train/loss"] == 1.0
    tiny_tree["language_model"]["batch_sequences"] = 7  # changes no result, so it is the same run
    plan = resolve(parse_config(tiny_tree))
    with steps.tracked(plan, {}) as again:
        again.add_points([{"tokens": 10.0, "loss": 1.0}, {"tokens": 20.0, "loss": 0.5}])
    assert again.run_id == run.run_id
    assert [m.step for m in client.get_metric_history(run.run_id, "train/loss")] == [10, 20]
    assert client.get_run(run.run_id).info.status == "FINISHED"
    assert "sae.failure" not in client.get_run(run.run_id).data.tags


PREDICT = """
import json, sys
sys.path = [entry for entry in sys.path if entry not in ("", sys.argv[4])]
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("components", "flows"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import mlflow, numpy as np
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
result = model.predict(np.load(sys.argv[3]))
np.savez(sys.argv[3] + ".out.npz", **result)
"""


def test_the_registered_model_runs_without_this_project(tiny_tree: dict, tmp_path: Path):
    plan, _ = complete(tiny_tree)
    x = np.random.default_rng(0).standard_normal((20, 32)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    uri = tracking_uri(plan.config.tracking, plan.config.storage.root)
    arguments = [uri, f"models:/{plan.registered_model}@champion", str(tmp_path / "x.npy"), str(Path(__file__).parents[2])]
    subprocess.run([sys.executable, "-c", PREDICT, *arguments], cwd=tmp_path, check=True)
    result = np.load(tmp_path / "x.npy.out.npz")
    sae = load_saelens(Path(plan.sae_url), torch.device("cpu"))
    with torch.no_grad():
        features, reconstruction = sae.reconstruct(torch.tensor(x))
    np.testing.assert_allclose(result["features"], features.dense(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(result["reconstruction"], reconstruction, rtol=1e-5, atol=1e-5)


def test_without_a_server_a_remote_root_has_no_place_for_the_database():
    with pytest.raises(UserError, match=r"tracking\.uri.*s3://bucket"):
        tracking_uri(TrackingSettings(), "s3://bucket/prefix")
