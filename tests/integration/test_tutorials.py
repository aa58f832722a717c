"""The tutorials that need servers, with those of the stack. (The first one is run by test_wheel.py.)"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import s3fs
from mlflow import MlflowClient
from stack_client import Live
from tutorials import run_tutorial

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]  # beside other work a minute becomes ten

PROGRAMS = Path(sys.executable).parent


def test_own_model_and_corpus_on_s3(live: Live, bucket: s3fs.S3FileSystem, tmp_path: Path):
    said = run_tutorial("own-data-on-s3.md", tmp_path, PROGRAMS, {**live.environment, "BUCKET": "sae"})
    assert "models:/llama-4x64-my-model.resid_post.2/1" in said
    kinds = {path.split("/")[3] for path in bucket.find("s3://sae/tutorial/sae")}
    assert kinds == {"tokens", "activations", "saes"}
    assert "['document', 'position', 'token', 'resid_post.2'] 20" in said


def test_compare_and_promote(live: Live, mlflow: MlflowClient, tmp_path: Path):
    run_tutorial("compare-and-promote.md", tmp_path, PROGRAMS, live.environment)
    # refused by its L0, promoted by hand, rolled back
    rival = mlflow.get_model_version("compare", "2").tags
    assert float(rival["eval.loss_recovered"]) > float(mlflow.get_model_version("compare", "1").tags["eval.loss_recovered"])
    assert mlflow.get_model_version_by_alias("compare", "champion").version == "1"


def test_nightly_on_the_stack(live: Live, mlflow: MlflowClient, tmp_path: Path):
    said = run_tutorial("nightly.md", tmp_path, PROGRAMS, live.environment)
    assert "Retrained" in said
    assert [version.version for version in mlflow.search_model_versions("name = 'house'")] == ["1"]
