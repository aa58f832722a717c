"""README and docs: short where a newcomer begins, links that lead somewhere, commands and configurations that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
import typer
import yaml

from components.run.config import parse_config
from flows.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LONGEST_README = 9_000


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    titles = re.findall(r"(?m)^#+ (.*)$", re.sub(r"(?s)```.*?```", "", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_readme_is_read_in_a_few_minutes():
    assert (ROOT / "README.md").stat().st_size <= LONGEST_README


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http:", "https:")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(there), f"{page.name}: {target}"


def test_every_page_is_found_from_the_readme():
    linked = set(re.findall(r"\]\((docs/[\w/-]+\.md)", (ROOT / "README.md").read_text()))
    assert linked == {page.relative_to(ROOT).as_posix() for page in PAGES[1:]}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_option_exists(page: Path):
    for line in re.findall(r"(?m)^ *(?:\.venv/bin/)?sae ([a-z].*)$", page.read_text().replace("\\\n", " ")):
        words = shlex.split(line.partition(" #")[0].partition(" |")[0])
        command: Any = typer.main.get_command(app)
        while hasattr(command, "commands") and words:
            assert words[0] in command.commands, f"{page.name}: sae {line}"
            command = command.commands[words.pop(0)]
        known = {name for parameter in command.params for name in parameter.opts}
        for word in words:
            if word.startswith("--"):
                assert word in known, f"{page.name}: sae {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_configuration_has_fields_that_exist(page: Path):
    for text in re.findall(r"(?s)```yaml\n(.*?)```", page.read_text()):
        tree = yaml.safe_load(text)
        if "name" in tree:  # a whole one
            parse_config(tree)


def test_the_tables_of_the_benchmarks_are_those_of_their_results():
    tables, page = run_path(str(ROOT / "benchmarks" / "tables.py")), (ROOT / "benchmarks" / "README.md").read_text()
    assert tables["with_tables"](page) == page, "run `python benchmarks/tables.py`"
    shown = tables["names"](page)
    assert sorted(shown) == sorted(path.stem for path in (ROOT / "benchmarks" / "results").glob("*.json"))
    # one that has been edited by hand, or whose result has changed, is noticed
    assert tables["with_tables"](page.replace("| 0.9878 |", "| 0.9978 |")) == page
