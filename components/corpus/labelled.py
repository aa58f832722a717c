"""Text with labels for probes, none of which needs a network: the standard library, and tables with a column of labels."""

from __future__ import annotations

import ast
import inspect
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.corpus.files import damage_explained, kind_of, read_rows
from components.corpus.listing import ListedFile, files_identity, find_files
from components.corpus.settings import LabelledSettings, SourceSettings
from components.corpus.sources import ListedSource
from components.corpus.standard_library import read_standard_library, standard_library_files
from components.settings import UserError
from components.storage import file_sha256

_LANGUAGES = Path(__file__).with_name("languages.json")
"""By language, written for this: each text in all of them."""


@dataclass(frozen=True, kw_only=True)
class LabelledText:
    """A text and its label; `document` is what it comes from, which may give several texts and is never cut by a split."""

    document: str
    text: str
    label: str


def list_labelled(tasks: Sequence[LabelledSettings]) -> tuple[ListedSource, ...]:
    """Every source of labelled text as it is now, with what decides its texts and labels; a UserError for files that are not
    there."""
    return tuple(_listed(task, number) for number, task in enumerate(tasks))


def read_labelled(task: LabelledSettings, number: int, listed: ListedSource) -> Iterator[LabelledText]:
    """The texts of a task, in the order of its files and rows; a UserError for a column that is not there or no text."""
    if task.source == "files":
        yield from _rows(task, number, listed)
        return
    if task.source == "languages":
        for label, texts in json.loads(_LANGUAGES.read_text(encoding="utf-8")).items():
            for place, text in enumerate(texts):  # the same in every language, so that no probe has seen what it is tested on
                yield LabelledText(document=f"text {place}", text=text, label=label)
        return
    for document in read_standard_library(listed.files):
        if task.source == "code_or_prose":
            code, prose = code_and_prose(document.text)
            for label, text in (("code", code), ("prose", prose)):
                if text.strip():
                    yield LabelledText(document=document.name, text=text, label=label)
        elif document.name.count("/") > 1:  # pythonX.Y/package/...: a module alone is no package
            yield LabelledText(document=document.name, text=document.text, label=document.name.split("/")[1])


def code_and_prose(source: str) -> tuple[str, str]:
    """A module's lines without docstrings and lines of comments alone, and its docstrings; empty for what does not parse."""
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return "", ""
    prose, taken = [], set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first = node.body[0] if node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            prose.append(inspect.cleandoc(first.value.value))
            taken |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    lines = source.splitlines(keepends=True)
    code = [line for place, line in enumerate(lines, start=1) if place not in taken and not line.lstrip().startswith("#")]
    return "".join(code), "\n\n".join(prose)


def _listed(task: LabelledSettings, number: int) -> ListedSource:
    if task.source == "files":
        files = tuple(find_files(task.paths, f"evaluation.probing.tasks.{number}.paths"))
        columns = {"text_column": task.text_column, "label_column": task.label_column}
    elif task.source == "languages":
        return ListedSource(content={"source": task.source, "sha256": file_sha256(_LANGUAGES)})
    else:
        files, columns = tuple(standard_library_files()), {}
    return ListedSource(content={"source": task.source, **files_identity(files), **columns}, files=files)


def _rows(task: LabelledSettings, number: int, listed: ListedSource) -> Iterator[LabelledText]:
    field = f"evaluation.probing.tasks.{number}"
    for file in listed.files:
        for name, row in _table(task, file, field):
            text, label = row[task.text_column], row[task.label_column]
            if text is None or label is None:
                continue
            if not isinstance(text, str):
                raise UserError(
                    f"{field}.text_column: '{task.text_column}' in {name} is a {type(text).__name__}; it must be a string"
                )
            if not isinstance(label, str | int):
                raise UserError(
                    f"{field}.label_column: '{task.label_column}' in {name} is a {type(label).__name__}; accepted are strings, "
                    "whole numbers and true or false"
                )
            if text.strip():
                yield LabelledText(document=name, text=text, label=str(label))


def _table(task: LabelledSettings, file: ListedFile, field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name and the fields of each row of a table, both columns among them."""
    file.require_unchanged(f"{field}.paths")
    source, columns = SourceSettings(source="files", paths=task.paths, text_column=task.text_column), {
        "text_column": task.text_column, "label_column": task.label_column
    }  # fmt: skip
    with damage_explained(file, f"{field}.paths"):
        kind = kind_of(file.name)
        rows = None if kind == "text" else read_rows(file, kind, source, field, {"label_column": task.label_column})
        if rows is None:
            raise UserError(f"{field}.paths: '{file.path}' is neither JSON nor Parquet and has no column")
        for name, row in rows:
            for setting, column in columns.items():
                if column not in row:
                    raise UserError(f"{field}.{setting}: '{column}' is not in {name}, which has {', '.join(sorted(row))}")
            yield name, row
