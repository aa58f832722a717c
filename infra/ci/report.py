"""What a retrain came to, as Markdown for people and as lines for a log; nothing in it can be more than text.

Reasons and tables come from a flow run, which may quote a corpus, a model's name or an exception: all of it is escaped.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from components.redaction import without_secrets

PROMOTED, NOTHING_TO_DO, REFUSED = "Promoted", "NothingToDo", "Refused"
"""The names of the flow's Completed states; every other verdict is a failure."""

EXIT_CODES = {PROMOTED: 0, NOTHING_TO_DO: 0, REFUSED: 1}
METRICS = ("metric", "this version", "champion", "change")
GATES = ("gate", "verdict", "measured", "required", "short by")
COMMENT_CHARACTERS = 60_000
"""GitHub refuses a comment of more than 65,536."""

_TITLES = {NOTHING_TO_DO: "Nothing to do", "TimedOut": "Timed out", "StillRunning": "Still running"}
_REPOSITORY = re.compile(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+")
_COMMIT = re.compile(r"[0-9a-f]{7,64}")
_LINK = re.compile(r"\[([^\[\]\n]*)\]\((https?://[^\s()<>]+)\)")


class Stop(Exception):
    """The end of the whole job: one sentence and the exit code."""

    def __init__(self, exit_code: int, sentence: str) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


@dataclass
class Outcome:
    """How the retrain of one configuration ended."""

    config: str
    """As it was given: a file, or the name of a shipped configuration."""
    verdict: str
    """`Promoted`, `Refused`, `NothingToDo`, or what kind of failure it was."""
    reason: str
    page: str | None = None
    """Address of the flow run in the Prefect UI."""
    metrics: list[Mapping[str, Any]] = field(default_factory=list)
    gates: list[Mapping[str, Any]] = field(default_factory=list)
    mlflow: str = ""
    """The flow's own Markdown about its MLflow run."""


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """0 where every configuration was promoted or had nothing to do, 1 otherwise."""
    return max((EXIT_CODES.get(outcome.verdict, 1) for outcome in outcomes), default=0)


def overall(outcomes: Sequence[Outcome]) -> str:
    """One word for all of them, the worst: `Failed`, `Refused`, `Promoted` or `NothingToDo`."""
    verdicts = {outcome.verdict for outcome in outcomes}
    if verdicts - EXIT_CODES.keys():
        return "Failed"
    return next((verdict for verdict in (REFUSED, PROMOTED) if verdict in verdicts), NOTHING_TO_DO)


def title(verdict: str) -> str:
    return _TITLES.get(verdict, verdict)


def log_line(text: str) -> str:
    """One line in which neither GitHub's runner (`::set-env`, `##[error]`) nor a terminal finds a command."""
    return _one_line(text).replace("::", ": :").replace("##[", "## [")


def say(text: str, error: bool = False) -> None:
    """One line for the log, at once."""
    print(log_line(text), file=sys.stderr if error else sys.stdout, flush=True)


def markdown_text(value: Any, limit: int = 1000) -> str:
    """A value as Markdown that shows exactly it, on one line, in a table or out of it; without mentions and references."""
    if value is None:
        return "-"
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    text = _one_line(text)
    if len(text) > limit:
        text = text[:limit] + " ..."
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|~])", r"\\\1", text)
    # Within a word, as in the names of metrics, an underscore is no emphasis.
    text = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)
    return re.sub(r"([@#])(?=\w)", "\\1\N{ZERO WIDTH SPACE}", text)


def plain(markdown: str) -> str:
    """The same for a terminal: what `markdown_text` escaped, as it was."""
    marks = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "\N{ZERO WIDTH SPACE}": ""}
    pattern = r"\\([\\`*\[\]|~_])|&amp;|&lt;|&gt;|\N{ZERO WIDTH SPACE}"
    return re.sub(pattern, lambda found: found[1] or marks[found[0]], markdown)


def link(text: str, address: str | None) -> str:
    """A Markdown link, or the text alone where the address is none that a browser should open."""
    address = without_secrets(address or "")
    if not re.fullmatch(r"https?://[^\s<>]+", address):
        return markdown_text(text)
    return f"[{markdown_text(text)}]({quote(address, safe=':/?#@!$&*+,;=%~-._')})"


def table(columns: Sequence[str], rows: Iterable[Mapping[str, Any]], limit: int = 200) -> str:
    """Rows as a Markdown table with these columns; an empty string where there are none."""
    rows = list(rows)
    if not rows:
        return ""
    lines = [columns, ["---"] * len(columns)]
    lines += [[markdown_text(row.get(column), 300) for column in columns] for row in rows[:limit]]
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return text if len(rows) <= limit else f"{text}\n\n{len(rows) - limit} more rows are on the flow run's page."


def report(outcomes: Sequence[Outcome], commit: str | None = None, repository: str = "", server: str = "") -> str:
    """All outcomes as one Markdown document, with a link to the commit where it is known."""
    parts = ["\n\n".join(_section(outcome)) for outcome in outcomes]
    if len(outcomes) > 1:
        parts.insert(0, f"## Retrains: {title(overall(outcomes))}")
    if commit and _COMMIT.fullmatch(commit):
        known = _REPOSITORY.fullmatch(repository) is not None
        parts.append(f"Commit: {link(commit[:12], f'{server}/{repository}/commit/{commit}' if known else None)}")
    return "\n\n".join(parts) + "\n"


def not_started(sentence: str) -> str:
    """The report of a retrain that never began."""
    return f"## Retrain: not started\n\n{markdown_text(sentence)}\n"


def for_comment(text: str) -> str:
    """The report, cut at the end of a line where it is too long for a comment."""
    if len(text) <= COMMENT_CHARACTERS:
        return text
    return text[:COMMENT_CHARACTERS].rpartition("\n")[0] + "\n\nThe rest is in the job's summary.\n"


def _section(outcome: Outcome) -> list[str]:
    parts = [f"## Retrain of {markdown_text(outcome.config)}: {markdown_text(title(outcome.verdict))}"]
    parts.append(markdown_text(outcome.reason))
    parts.append(table(METRICS, outcome.metrics))
    parts.append(table(GATES, outcome.gates))
    lines = [f"- {_inline(line)}" for line in outcome.mlflow.splitlines()[:20] if line.strip(" -*#\t")]
    if outcome.page:
        lines.append(f"- Flow run: {link(outcome.page, outcome.page)}")
    parts.append("\n".join(lines))
    return [part for part in parts if part]


def _inline(line: str) -> str:
    """A line of the flow's own Markdown: its links stay, everything else becomes text."""
    line = re.sub(r"^\s*([-*]|#+)\s+", "", line).replace("`", "").replace("**", "")
    pieces, end = [], 0
    for match in _LINK.finditer(line):
        pieces += [markdown_text(line[end : match.start()]) if match.start() > end else "", link(match[1], match[2])]
        end = match.end()
    return "".join(pieces) + (markdown_text(line[end:]) if end < len(line) else "")


def _one_line(text: str) -> str:
    # Control characters move a terminal's cursor; invisible ones (bidirectional overrides) make text lie about itself.
    kinds = {"Cc": " ", "Zl": " ", "Zp": " ", "Cf": ""}
    plain = "".join(kinds.get(unicodedata.category(letter), letter) for letter in text)
    return re.sub(r" {2,}", " ", plain).strip()
