"""Progress of long work: a bar on a terminal, a plain line now and then in a log. Always on standard error."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

LINE_INTERVAL_SECONDS = 10.0


@contextmanager
def progress(logger: logging.Logger, title: str, total: int, unit: str) -> Iterator[Callable[[int, str], None]]:
    """Yields `advance(count, note)`: `count` more of `total` units are done; a `note` is shown until the next one."""
    if sys.stderr.isatty():
        yield from _bar(title, total, unit)
    else:
        yield from _lines(logger, title, total, unit)


def _bar(title: str, total: int, unit: str) -> Iterator[Callable[[int, str], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text("" if task.speed is None else f"{task.speed:,.0f}/s")

    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + unit),
        Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total, note="")

        def advance(count: int, note: str = "") -> None:
            fields: dict[str, Any] = {"note": note} if note else {}
            bar.update(task, advance=count, **fields)

        yield advance


def _lines(logger: logging.Logger, title: str, total: int, unit: str) -> Iterator[Callable[[int, str], None]]:
    started = last = time.monotonic()
    done, shown = 0, ""
    logger.info("%s: %s %s to do", title, f"{total:,}", unit)

    def advance(count: int, note: str = "") -> None:
        nonlocal done, last, shown
        done += count
        shown = f", {note}" if note else shown
        now = time.monotonic()
        if now - last >= LINE_INTERVAL_SECONDS:
            last = now
            left = (total - done) * (now - started) / done
            state = f"{done:,} of {total:,} {unit}, {done / (now - started):,.0f}/s, {left:.0f} s left"
            logger.info("%s: %s%s", title, state, shown)

    yield advance
    seconds = time.monotonic() - started
    logger.info("%s: %s %s in %.1f s", title, f"{done:,}", unit, seconds)
