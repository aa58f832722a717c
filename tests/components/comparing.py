"""Whether two trees of what was measured are the same, up to the rounding of another order of additions."""

from __future__ import annotations

from typing import Any

import pytest


def assert_same(found: Any, expected: Any, path: str = "record", rel: float = 1e-9, abs: float = 1e-12) -> None:
    """rel, abs: of numbers that are floats; all else is equal."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key, value in expected.items():
            assert_same(found[key], value, f"{path}.{key}", rel, abs)
    elif isinstance(expected, list):
        assert len(found) == len(expected), path
        for number, value in enumerate(expected):
            assert_same(found[number], value, f"{path}[{number}]", rel, abs)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=rel, abs=abs), path
    else:
        assert found == expected, path
