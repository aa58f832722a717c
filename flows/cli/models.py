"""`sae models`: what the registry holds, which version is champion, and why."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.terminal import AsJson, command, print_tree, terminal

if TYPE_CHECKING:
    from mlflow import MlflowClient

models = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""The registry: list, show, compare, promote and roll back versions.

    A version is NAME/NUMBER, NAME@ALIAS, or NAME for its champion.
    """,
)

Version = Annotated[str, typer.Argument(metavar="VERSION", help="NAME/NUMBER, NAME@ALIAS, or NAME for its champion.")]
Root = Annotated[str, typer.Option("--root", help="Storage root whose `mlflow.db` is meant where no server is named.")]
Uri = Annotated[str | None, typer.Option("--uri", help="MLflow server or database; MLFLOW_TRACKING_URI by default.")]
GatesFile = Annotated[str | None, typer.Option("--gates", help="YAML file of gates; `mlflow/gates.yaml` by default.")]


_STABILITY = (
    "champion", "kept_share", "kept_share_by_reconstruction", "persisted", "split", "new", "merged", "vanished",
)  # fmt: skip
"""Shown of how a version's features stand against those of the champion of its time."""


@models.command("list")
def list_(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="One registered model; all where it is not given.")] = None,
    root: Root = "data",
    uri: Uri = None,
    as_json: AsJson = False,
) -> None:
    """Every version with its aliases and main metrics."""
    with _on_the_registry(as_json) as print_result:
        client = _client(root, uri)
        from components.registry.catalogue import list_models

        print_result({"models": list_models(client, name)}, _print_list)


@models.command()
def show(
    version: Version,
    config: Annotated[bool, typer.Option("--config", help="Print the YAML that makes this version again.")] = False,
    root: Root = "data",
    uri: Uri = None,
    as_json: AsJson = False,
) -> None:
    """Metrics, gates, lineage, history, and the command that reproduces the version."""
    with _on_the_registry(as_json) as print_result:
        client = _client(root, uri)
        from components.registry import catalogue
        from components.registry import versions as registry

        if config:
            lineage = registry.lineage_of(client, registry.resolve_version(client, version))
            print_result(lineage.reproduction(), print_tree)
        else:
            print_result(catalogue.show(client, version), _print_version)


@models.command()
def compare(
    versions: Annotated[list[str], typer.Argument(metavar="VERSION...", help="Two or more; the first is the measure.")],
    gates: GatesFile = None,
    root: Root = "data",
    uri: Uri = None,
    as_json: AsJson = False,
) -> None:
    """Metrics side by side, and whether each later version would beat the first."""
    with _on_the_registry(as_json) as print_result:
        client = _client(root, uri)
        from components.registry.catalogue import compare as compared
        from components.registry.gates import load_gates

        print_result(compared(client, versions, load_gates(gates)), _print_comparison)


@models.command()
def promote(
    version: Version,
    force: Annotated[bool, typer.Option("--force", help="Although the gates refuse it; needs --reason.")] = False,
    reason: Annotated[str | None, typer.Option("--reason", help="Recorded with a forced promotion.")] = None,
    gates: GatesFile = None,
    root: Root = "data",
    uri: Uri = None,
    as_json: AsJson = False,
) -> None:
    """Make a version champion if it passes the gates. Exit code 1 where it is refused."""
    with _on_the_registry(as_json) as print_result:
        from components.settings import UserError

        if force and not reason:
            raise UserError("--reason: not given; a forced promotion is recorded with the reason for it")
        if reason and not force:
            raise UserError("--reason: belongs to --force; a promotion by the gates gives its reasons itself")
        client = _client(root, uri)
        from components.registry import promotion
        from components.registry import versions as registry
        from components.registry.gates import load_gates

        found = registry.resolve_version(client, version)
        decision = promotion.promote(client, found.name, str(found.version), load_gates(gates), reason if force else None)
        promoted = decision.alias == "champion"
        outcome = {"name": found.name, "version": int(found.version), "promoted": promoted, "reason": decision.reason}
        print_result({**outcome, "report": decision.report}, _print_promotion)
        if not promoted:
            raise typer.Exit(1)


@models.command()
def rollback(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A registered model.")],
    reason: Annotated[str, typer.Option("--reason", help="Recorded in the model's history.")] = "not given",
    root: Root = "data",
    uri: Uri = None,
    as_json: AsJson = False,
) -> None:
    """Make the champion before this one champion again."""
    with _on_the_registry(as_json) as print_result:
        client = _client(root, uri)
        from components.registry.promotion import rollback as roll_back

        entry, replaced = roll_back(client, name, reason)
        assert entry.version is not None
        outcome = {"name": name, "champion": int(entry.version), "replaced": int(replaced), "reason": entry.reason}
        print_result(
            outcome, lambda done: print(f"{name}: version {done['champion']} is champion again, not {done['replaced']}")
        )


@contextmanager
def _on_the_registry(as_json: bool) -> Iterator[Any]:
    """As `command`; that a server refuses somebody is said in one sentence as well."""
    with command(as_json) as print_result:
        from components.tracking.store import refusal_explained

        with refusal_explained():
            yield print_result


def _client(root: str, uri: str | None) -> MlflowClient:
    from components.run.config import parse_config
    from components.settings import UserError

    tree = {"storage": {"root": root}, "tracking": {"uri": uri} if uri else {}}
    settings = parse_config(tree).tracking
    from components.redaction import redacted
    from components.tracking import store

    if not store.database_exists(settings, root):
        meant = redacted(store.tracking_uri(settings, root))
        raise UserError(f"--root: there is no registry yet at {meant}; give --root, --uri or MLFLOW_TRACKING_URI")
    return store.connect(settings, root)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value == int(value) and abs(value) >= 1000 else f"{value:.4f}"


def _print_list(result: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    columns = ("loss_recovered", "l0", "explained_variance", "dead_fraction")  # 80 characters with the others
    heads = [name.replace("_", "\n") for name in columns]
    for model in result["models"]:
        table = Table(title=model["name"], box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
        for head in ("version", "alias", "created", *heads):
            table.add_column(head, no_wrap=head in ("alias", "created"))
        for row in model["versions"]:
            cells = [_number(row[name]) for name in columns]
            table.add_row(str(row["version"]), "\n".join(row["aliases"]), row["created"][:10], *cells)
        terminal().print(table)
    if not result["models"]:
        print("no registered models yet; `sae run` makes them")


def _print_version(result: dict[str, Any]) -> None:
    from rich.table import Table

    aliases = f" ({', '.join(result['aliases'])})" if result["aliases"] else ""
    table = Table(title=f"{result['name']} version {result['version']}{aliases}", show_header=False)
    metrics = result["metrics"]
    for name, value in metrics.items():
        if name.endswith(("_low", "_high")):
            continue
        low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
        interval = f"  [{_number(low)}, {_number(high)}]" if low is not None and high is not None else ""
        table.add_row(name, _number(value) + interval)
    if result["stability"] is not None:
        table.add_section()
        for name in _STABILITY:
            table.add_row(f"features: {name}", _kept(result["stability"], name))
    table.add_section()
    for name, value in result["lineage"].items():
        table.add_row(name, str(value))
    table.add_section()
    for entry in result["history"]:
        table.add_row(entry["action"], f"{entry['at']} by {entry['by']}: {entry['reason']}")
    table.add_row("reproduce", "\n".join(result["reproduce"]))
    terminal().print(table)
    if result["gates"]:
        _print_gates(result["gates"])


def _print_gates(report: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    against = f" against champion {report['champion']}" if report["champion"] else ""
    table = Table("gate", "", "measured", "required", "short by", title=f"gates{against}")
    for row in report["gates"]:
        short = "" if row["short_by"] is None else f"{row['short_by']:.5g}"
        verdict = Text("pass", style="green") if row["passed"] else Text("fail", style="bold red")
        table.add_row(row["gate"], verdict, row["measured"], row["required"], short)
    terminal().print(table)


def _print_comparison(result: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table("metric", *result["versions"], title="the same evaluation set" if result["same_evaluation_set"] else None)
    for name, values in result["metrics"].items():
        table.add_row(name, *(_number(value) for value in values))
    table.add_section()
    for name in _STABILITY if any(result["stability"]) else ():
        table.add_row(f"features: {name}", *(_kept(found, name) for found in result["stability"]))
    terminal().print(table)
    if not result["same_evaluation_set"]:
        print("These were not measured on the same held-out tokens, model and hook point: the numbers do not compare.")
    for name, report in result["against_first"].items():
        print(f"\n{name}, with {result['versions'][0]} as champion: {report['reason']}")
        _print_gates(report)


def _kept(stability: dict[str, Any] | None, name: str) -> str:
    if stability is None or stability[name] is None:
        return "-"
    value = stability[name]
    return f"version {value}" if name == "champion" else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _print_promotion(result: dict[str, Any]) -> None:
    state = "is champion" if result["promoted"] else "is not champion"
    print(f"{result['name']} version {result['version']} {state}: {result['reason']}")
    _print_gates(result["report"])
