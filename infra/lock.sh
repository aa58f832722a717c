#!/usr/bin/env bash
# Resolve pyproject.toml in an environment of its own and write every version into requirements.lock.
set -euo pipefail
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
pip() { "$scratch/venv/bin/python" -m pip --disable-pip-version-check "$@"; }
requirements() {  # the lists in pyproject.toml, one requirement a line
    python3 - "$@" <<'PY'
import sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))
lines = project["project"]["dependencies"] + project["dependency-groups"]["dev"] + project["build-system"]["requires"]
print("\n".join(line for line in lines if line.startswith("torch==") == (sys.argv[1] == "torch")))
PY
}
# Torch first and alone, in the exact version of the group `dev`: with it there, the range that the project asks for and what
# others ask of it are satisfied, and nothing fetches another build.
pip install -q -r <(requirements torch)
pip install -q -r <(requirements others)
pip check
{
    echo "# Made by 'make lock' from pyproject.toml; every package with its exact version. Torch's build (CPU or CUDA) is"
    echo "# what pip finds for the machine. Install with pip, not uv: uv does not look where pip finds CPU wheels."
    pip freeze | sed -E 's/^(torch==[0-9.]+)\+.*/\1/'
} > requirements.lock
