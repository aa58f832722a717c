"""mkdocs' hook: the site holds every page where the repository holds it, and the files that pages link to, so that one link
works on both."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\(([^)#\s]+)[^)\s]*\)")


def pages() -> list[Path]:
    """Every page of the site."""
    beside = (ROOT / folder / "README.md" for folder in ("benchmarks", "infra", "mlflow"))
    return [ROOT / "README.md", ROOT / "CHANGELOG.md", *beside, *sorted((ROOT / "docs").rglob("*.md"))]


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """What mkdocs finds under docs/ and more, under the paths of the repository."""
    theme = [file for file in files if file.generated_by is not None or not str(file.abs_src_path).startswith(config.docs_dir)]
    wanted = dict.fromkeys([*pages(), ROOT / "docs" / "site.css"])
    for page in list(wanted):
        for target in LINK.findall(page.read_text(encoding="utf-8")):
            linked = (page.parent / target).resolve()
            if "://" not in target and linked.is_file():
                wanted[linked] = None
    return Files([*theme, *(_file(config, path) for path in wanted)])


def _file(config: Any, path: Path) -> File:
    # included: a workflow under .github, which would be passed over
    return File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path), inclusion=InclusionLevel.INCLUDED)
