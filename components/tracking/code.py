"""The code that runs, as tags."""

from __future__ import annotations

import subprocess
from pathlib import Path

GIT_COMMIT_TAG, GIT_DIRTY_TAG = "mlflow.source.git.commit", "sae.git_dirty"


def git_tags() -> dict[str, str]:
    """Commit of the code that runs, and whether it was changed since; empty outside a checkout."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy inside somebody else's checkout must not claim that checkout's commit.
    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return {}
    dirty = "true" if git("status", "--porcelain") else "false"
    return {GIT_COMMIT_TAG: git("rev-parse", "HEAD") or "none", GIT_DIRTY_TAG: dirty}
