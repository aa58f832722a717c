"""Which code would run: a digest of each component's source, without comments and docstrings."""

from __future__ import annotations

import ast
from hashlib import sha256
from pathlib import Path

DECIDING = ("sae", "training", "evaluation")
"""The components whose code decides what an SAE becomes of its activations, and how it is measured. Those before them make data
that is reused: each has a version of its own in the data's digest, raised when it would give other bytes."""


def code_versions(root: Path = Path(__file__).parent) -> dict[str, str]:
    """Component -> 16 hexadecimal digits that change when its Python code does.

    Comments, docstrings and formatting change nothing. Another minor version of Python may, as it writes syntax trees
    differently.
    """
    return {name: _digest(root / name) for name in DECIDING}


def _digest(folder: Path) -> str:
    state = sha256()
    for path in sorted(folder.rglob("*.py")):
        tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                # Strings that stand alone: docstrings, and those under the fields of settings.
                kept = [part for part in node.body if not _is_string(part)]
                node.body = kept or [ast.Pass()]
        state.update(f"{path.relative_to(folder).as_posix()}\0{ast.unparse(tree)}\0".encode())
    return state.hexdigest()[:16]


def _is_string(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
