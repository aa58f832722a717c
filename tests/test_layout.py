"""The tree keeps its promises: imports, folders, the library that `mlflow` means."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import flows.cli

ROOT = Path(__file__).parent.parent


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_import_rules_hold():
    done = subprocess.run([str(Path(sys.executable).parent / "lint-imports")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_mlflow_is_the_library_and_not_the_folder():
    assert run_python("import mlflow; print(mlflow.__version__)").startswith("3.")
    assert not list((ROOT / "mlflow").rglob("*.py"))


def test_importing_the_command_loads_no_heavy_library():
    code = "import sys, flows.cli; print(sorted({'torch', 'prefect', 'mlflow', 'transformers'} & set(sys.modules)))"
    assert run_python(code).strip() == "[]"


def test_importing_components_loads_neither_prefect_nor_mlflow():
    code = "import sys, components.steps; print(sorted({'prefect', 'mlflow'} & set(sys.modules)))"
    assert run_python(code).strip() == "[]"


def test_torch_is_a_range_for_users_and_one_version_where_it_is_tested():
    tree = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (allowed,) = [Requirement(line) for line in tree["project"]["dependencies"] if re.match(r"torch\b", line)]
    (pin,) = [line for line in tree["dependency-groups"]["dev"] if line.startswith("torch==")]
    assert pin in (ROOT / "requirements.lock").read_text().splitlines()
    tested = pin.removeprefix("torch==")
    # pip leaves alone a build that its user has chosen, of this version and of later ones
    for build in (tested, f"{tested}+cpu", f"{tested}+cu130", "2.14.1+rocm6.4"):
        assert build in allowed.specifier, build


def test_windows_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit) as refused:
        flows.cli.main()
    assert refused.value.code == "error SAE Foundry runs on Linux; on Windows, install it inside WSL 2"
