"""What the commands share: their options, where they print, how a mistake ends."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, or the name of a shipped configuration.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Override a field: `--set training.tokens=2_000_000`. Repeatable."),
]
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output and nothing else.")]


def terminal(stderr: bool = False, soft_wrap: bool = False) -> Console:
    """Where a command prints. Text is as it is: names, roots, templates and tokens hold brackets (`[/INST]`) and colons, which
    are no markup; style is given to `Text`."""
    return Console(stderr=stderr, soft_wrap=soft_wrap, markup=False, emoji=False)


@contextmanager
def command(as_json: bool) -> Iterator[Callable[[dict[str, Any], Callable[[dict[str, Any]], None]], None]]:
    """Standard output is for the result alone: what libraries print meanwhile goes to standard error.

    A UserError ends in one sentence and exit code 2.
    """
    from components.redaction import errors_redacted
    from components.settings import UserError

    exempt_loopback()
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
        with errors_redacted():
            yield show
    except (UserError, FloatingPointError) as error:
        said = Text.assemble(("error", "bold red"), " ", str(error))
        terminal(stderr=True, soft_wrap=True).print(said, highlight=False)
        raise typer.Exit(2 if isinstance(error, UserError) else 1) from None
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def exempt_loopback() -> None:
    """No proxy stands between this machine and itself: Prefect's temporary server, MLflow and S3 here are asked directly."""
    named = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    exempt = [part.strip() for part in named.split(",") if part.strip()]
    if "*" not in exempt and any(os.environ.get(name) or os.environ.get(name.lower()) for name in _PROXIES):
        exempt += [name for name in ("localhost", "127.0.0.1", "::1") if name not in exempt]
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(exempt)


def log_to_stderr(handler: bool = True) -> None:
    logger = logging.getLogger("components")
    logger.setLevel(logging.INFO)
    if handler:
        from rich.logging import RichHandler

        logger.addHandler(RichHandler(console=terminal(stderr=True), show_path=False, show_level=False))


def print_tree(result: dict[str, Any]) -> None:
    import yaml

    print(yaml.safe_dump(result, sort_keys=False, allow_unicode=True), end="")


def printable(text: str) -> str:
    """In one line, with what turns or hides text made visible."""
    return "".join(character if character.isprintable() else {"\n": "⏎", "\t": "⇥"}.get(character, "�") for character in text)
