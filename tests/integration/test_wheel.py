"""The wheel, installed outside of the checkout, and nothing but it: the first tutorial in an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from tutorials import run_tutorial

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]  # beside other work a minute becomes ten

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of an environment that has the wheel, and of everything else what is installed here.

    What is installed here is on the path of that environment, after its own, without the file that leads to this checkout:
    Python reads such files in an environment's own folder alone.
    """
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = folder.glob("sae_foundry-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "environment")], check=True)
    python = str(folder / "environment" / "bin" / "python")
    subprocess.run([*pip, "--python", python, "install", "--no-deps", str(wheel)], check=True)
    (packages,) = (folder / "environment").glob("lib/python*/site-packages")
    (packages / "locked.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "environment" / "bin"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of a newcomer: no checkout, no server, no hub."""
    strangers = ("PYTHONPATH", "PREFECT_", "MLFLOW_", "SAE_")
    found = {name: value for name, value in os.environ.items() if not name.startswith(strangers)}
    return {**found, "HF_HUB_OFFLINE": "1", "PREFECT_HOME": str(tmp_path / "prefect")}


def test_the_first_tutorial_runs_from_the_wheel_alone_in_an_empty_folder(
    programs: Path, environment: dict[str, str], tmp_path: Path
):
    folder = tmp_path / "empty"
    folder.mkdir()
    where = "import flows, components; print(flows.__path__[0], components.__path__[0])"
    done = subprocess.run([programs / "python", "-c", where], cwd=folder, env=environment, capture_output=True, text=True)
    assert all(path.startswith(str(programs.parent)) for path in done.stdout.split()), done
    said = run_tutorial("first-sae.md", folder, programs, environment)
    (record,) = (folder / "data" / "saes").glob("quickstart-*/evaluation.json")
    assert f"{record.parent.relative_to(folder)}/browser/index.html" in said
    assert (record.parent / "browser" / "index.html").is_file()
    assert "models:/stdlib-llama.resid_post.1/1" in said
