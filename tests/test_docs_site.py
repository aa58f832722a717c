"""`make docs`: the site builds without a warning, its links lead somewhere, and its pages ask no network for anything."""

from __future__ import annotations

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[1]


class Page(HTMLParser):
    """What a page links to, what it loads, and the places in it that can be linked to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        if "id" in found:
            self.anchors.add(found["id"])
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif tag == "link" and "href" in found:
            self.loads.append(found["href"])
        elif tag in ("img", "script", "iframe") and "src" in found:
            self.loads.append(found["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


def test_every_page_of_the_repository_is_in_the_site(site: Path):
    written = {*(ROOT / "docs").rglob("*.md"), *(ROOT / folder / "README.md" for folder in ("benchmarks", "infra", "mlflow"))}
    for page in written:
        built = page.relative_to(ROOT).with_name("index.html" if page.name == "README.md" else f"{page.stem}.html")
        assert (site / built).is_file(), page


def test_every_link_of_the_site_leads_somewhere(site: Path):
    pages = {path: Page(path) for path in site.rglob("*.html")}
    broken = []
    for path, page in pages.items():
        for target in [*page.links, *page.loads]:
            if target.startswith(("https://", "http://", "data:", "mailto:")):
                continue
            # the page for what is not there is shown at any address, and links from the root
            start = site if target.startswith("/") else path.parent
            file, _, anchor = unquote(target).lstrip("/").partition("#")
            there = (start / file).resolve() if file else path
            there = there / "index.html" if there.is_dir() else there
            if not there.is_file() or (anchor and there in pages and anchor not in pages[there].anchors):
                broken.append(f"{path.relative_to(site)}: {target}")
    assert len(pages) > 15
    assert broken == []


def test_no_page_of_the_site_loads_anything_from_elsewhere(site: Path):
    styles = [path for path in site.rglob("*.css") if "url(http" in path.read_text(encoding="utf-8")]
    loads = [(path.name, target) for path in site.rglob("*.html") for target in Page(path).loads if "//" in target]
    assert styles == loads == []
