"""Whatever a configuration holds, it is right or refused in one sentence, soon."""

from __future__ import annotations

import json
import os
import time
import traceback
from pathlib import Path

import fuzz
import pytest
import yaml

from components.run.estimate import estimate
from components.settings import UserError
from flows.cli.line import checked

SECONDS = 5.0
"""Longest that a call may take of this process; the clock would count what else a machine is doing."""


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No network, no keys, no home of somebody."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "MLFLOW_TRACKING_URI", "SAE_STORAGE_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "config.yaml"


def faults(tree: dict, path: Path, seed: int, count: int, seconds: float = SECONDS) -> list[str]:
    """Of each call that ended in anything but a plan or one sentence, or took too long: what it was."""
    found = []
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    checked(str(path), [], evaluated=None)  # what the first call loads takes seconds
    checked_ones = refused = 0
    for number, (text, overrides) in enumerate(fuzz.configurations(tree, seed, count)):
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        begun, clock = time.process_time(), time.monotonic()
        said = fault = ""
        try:
            json.dumps(estimate(checked(str(path), overrides, evaluated=None)), allow_nan=False)
            checked_ones += 1
        except UserError as error:
            said = str(error)
            refused += 1
        except Exception as error:
            where = "".join(traceback.format_tb(error.__traceback__)[-2:])
            fault = f"{type(error).__name__}: {str(error)[:200]}\n{where}"
        took = time.process_time() - begun, time.monotonic() - clock
        if took[0] > seconds or took[1] > 6 * seconds:
            fault += f"took {took[0]:.1f} s of the processor, {took[1]:.1f} s in all"
        if "\n" in said or len(said) > 2_500:
            fault += f"not one sentence: {said[:500]!r}"
        if fault:
            found.append(f"{number}: {fault}\n{overrides!r:.300}\n{'' if overrides else text[:1500]}")
    assert refused > count / 3
    assert checked_ones > count / 50, "some of them are right"
    return found


def test_300_configurations_are_right_or_refused_in_one_sentence(tiny_tree: dict, alone: Path):
    found = faults(tiny_tree, alone, seed=1, count=300, seconds=3 * SECONDS)  # this runs on machines of any speed
    assert not found, "\n\n".join(found[:5])


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_10000_configurations_are_right_or_refused_in_one_sentence(tiny_tree: dict, alone: Path):
    found = faults(tiny_tree, alone, seed=int(os.environ.get("FUZZ_SEED", "2")), count=10_000)
    assert not found, f"{len(found)} of 10,000\n" + "\n\n".join(found[:20])
