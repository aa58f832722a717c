"""How every command ends: its result on standard output, or one sentence and an exit code."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console


@contextmanager
def command(as_json: bool) -> Iterator[Callable[[dict[str, Any], Callable[[dict[str, Any]], None]], None]]:
    """Standard output is for the result alone: what libraries print meanwhile goes to standard error.

    A UserError ends in one sentence and exit code 2.
    """
    from components.settings import UserError

    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)

    def show(result: dict[str, Any], for_people: Callable[[dict[str, Any]], None]) -> None:
        sys.stdout.flush()
        os.dup2(kept, 1)
        if as_json:
            print(json.dumps(result, indent=2, allow_nan=False), flush=True)
        else:
            for_people(result)

    try:
        yield show
    except UserError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error[/] {_escaped(str(error))}", highlight=False)
        raise typer.Exit(2) from None
    except FloatingPointError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error[/] {_escaped(str(error))}", highlight=False)
        raise typer.Exit(1) from None
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
