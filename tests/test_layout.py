"""The tree keeps its promises: imports, folders, the library that `mlflow` means."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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


def test_torch_is_pinned_to_the_same_version_everywhere():
    pin = next(line.strip().strip('",') for line in (ROOT / "pyproject.toml").read_text().splitlines() if '"torch==' in line)
    assert pin in (ROOT / "requirements.lock").read_text().splitlines()
