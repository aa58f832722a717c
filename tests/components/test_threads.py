"""Threads of torch that wait do not spin, unless the user wants it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from components.threads import with_patient_threads
from components.training import process as training_process


def test_what_the_user_has_set_stays():
    assert with_patient_threads({"A": "1"}) == {"A": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    assert with_patient_threads({"OMP_WAIT_POLICY": "ACTIVE"}) == {"OMP_WAIT_POLICY": "ACTIVE"}


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_a_training_process_is_started_so(given: str | None, expected: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    seen: dict[str, Any] = {}

    def popen(*arguments: Any, **named: Any) -> None:
        seen.update(named["env"])
        raise InterruptedError

    monkeypatch.setattr(training_process.subprocess, "Popen", popen)
    with pytest.raises(InterruptedError):
        training_process.launch(None, None)  # type: ignore[arg-type]
    assert seen["OMP_WAIT_POLICY"] == expected


def test_the_command_settles_it_before_torch_is_loaded():
    code = (
        "import os, sys; os.environ.pop('OMP_WAIT_POLICY', None); import flows.cli as cli; assert 'torch' not in sys.modules\n"
        "cli.app = lambda: print(os.environ['OMP_WAIT_POLICY']); cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "PASSIVE", done.stderr
