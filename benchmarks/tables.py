"""The tables of benchmarks/README.md, from what was measured: `python benchmarks/tables.py` writes them anew.

Each is a file of `results/`: `columns` with a title and, for numbers, a format, and `rows`, in which a cell is a number,
`[mean, half of the range]`, or text. In the page it stands between `<!-- results: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
PAGE = FOLDER / "README.md"
_PLACE = re.compile(r"(?s)(<!-- results: ([\w-]+) -->\n).*?(<!-- end -->)")


def names(text: str) -> list[str]:
    """Of the results that a page shows."""
    return [found[2] for found in _PLACE.finditer(text)]


def with_tables(text: str) -> str:
    """The page with its tables as the results are now."""
    return _PLACE.sub(lambda found: f"{found[1]}\n{table(found[2])}\n{found[3]}", text)


def table(name: str) -> str:
    """Markdown."""
    result = json.loads((FOLDER / "results" / f"{name}.json").read_text(encoding="utf-8"))
    columns = result["columns"]
    rows = [[_cell(value, column) for value, column in zip(row, columns, strict=True)] for row in result["rows"]]
    head, *body = ("".join(f"| {cell} " if cell else "| " for cell in cells) + "|\n" for cells in [_titles(columns), *rows])
    return head + "|---" * len(columns) + "|\n" + "".join(body)


def _titles(columns: list[dict[str, str]]) -> list[str]:
    return [column["title"] for column in columns]


def _cell(value: Any, column: dict[str, str]) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return " ± ".join(format(part, column["format"]) for part in value)
    return format(value, column["format"])


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
