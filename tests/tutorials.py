"""The tutorials under docs/, run as their readers run them: every block that is bash, Python or a named configuration."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

PAGES = Path(__file__).parents[1] / "docs" / "tutorials"


def script_of(page: str) -> str:
    """One script of all blocks, in their order and in one shell: a block may use what an earlier one has set."""
    steps = ["set -euo pipefail"]
    for language, block in re.findall(r"(?ms)^```(\w+)\n(.*?)^```$", (PAGES / page).read_text(encoding="utf-8")):
        if language == "bash":
            steps.append(f"set -x\n{block}{{ set +x; }} 2> /dev/null")
        elif language == "python":
            steps.append(f"python - <<'END_OF_BLOCK'\n{block}END_OF_BLOCK")
        elif language == "yaml":
            name = re.match(r"# (\S+\.yaml)\n", block)
            assert name, f"{page}: a configuration without a file name"
            steps.append(f"cat > {name[1]} <<'END_OF_BLOCK'\n{block}END_OF_BLOCK")
        else:
            assert language in ("console", "text"), f"{page}: {language}"
    return "\n".join(steps)


def run_tutorial(page: str, folder: Path, programs: Path, environment: dict[str, str]) -> str:
    """What the page prints. programs: the folder with `sae`, `python` and `prefect`."""
    path = f"{programs}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script_of(page)], cwd=folder, env={**environment, "PATH": path, "COLUMNS": "200"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=1100,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout
