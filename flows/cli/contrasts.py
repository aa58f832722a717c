"""`sae features contrast`, `safety` and `multilingual`: features found with sets of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flows.cli.line import checked
from flows.cli.terminal import AsJson, Config, Overrides, command, log_to_stderr, printable, terminal

Candidates = Annotated[int, typer.Option("--candidates", help="Features of each set that are measured.", min=1, max=100)]


def contrast(
    config: Config,
    sets: Annotated[
        list[str], typer.Option("--prompts", help="A YAML file of pairs, or the name of a set that ships. Repeatable.")
    ],
    candidates: Candidates = 10,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Find features that tell texts from others like them: chosen on half of the pairs, measured on the other half."""
    with command(as_json) as show:
        log_to_stderr()
        from components import steps
        from components.interpretation.prompt_sets import load_sets

        found = load_sets(sets, "--prompts")
        show(steps.examine(checked(config, overrides), found, candidates).model_dump(mode="json"), _print_report)


def safety(
    config: Config,
    sets: Annotated[
        list[str] | None,
        typer.Option("--prompts", help="Only this one: a name, or a YAML file of your own. Repeatable."),
    ] = None,
    candidates: Candidates = 5,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Write the safety report: features that separate prompts of several kinds of harm from their contrast, with evidence."""
    with command(as_json) as show:
        log_to_stderr()
        from components import steps
        from components.interpretation.prompt_sets import load_sets

        chosen = load_sets(sets, "--prompts") if sets else None
        run = checked(config, overrides)
        report = steps.safety_report(run, chosen or steps.safety_sets(run), candidates)
        show({**report.model_dump(mode="json"), "page": steps.safety_page(run)}, _print_report)


def multimodal(
    config: Config,
    texts: Annotated[
        Path | None, typer.Option("--texts", help="A file with a text on each line; else harmless ones that ship.")
    ] = None,
    densest: Annotated[
        float, typer.Option("--densest", help="Of features that fire on a larger share of either's tokens, none.", min=0, max=1)
    ] = 0.2,
    limit: Annotated[int, typer.Option("--limit", min=1)] = 20,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Find features of a vision-language model that fire on held-out images and on texts."""
    with command(as_json) as show:
        from components import steps
        from components.settings import UserError
        from components.yaml_text import read_text

        try:
            lines = [] if texts is None else [line for line in read_text(texts).splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--texts: '{texts}' cannot be read as text; a file with a text on each line is accepted"
            ) from error
        show(steps.multimodal(checked(config, overrides), lines, densest, limit), _print_multimodal)


def _print_multimodal(result: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("feature", "alike", "of image tokens", "largest", "on", "of text tokens", "largest", "on")
    for row in result["features"]:
        image, text = row["images"], row["texts"]
        where = f"image {image['image']}" + (f" {tuple(image['patch'])}" if image["patch"] else "")
        of_image = (f"{image['share']:.2%}", f"{image['largest']:.3g}", where)
        of_text = (f"{text['share']:.2%}", f"{text['largest']:.3g}", Text(printable(text["token"])))
        table.add_row(str(row["feature"]), f"{row['alike']:.2f}", *of_image, *of_text)
    console = terminal()
    console.print(table)
    console.print(
        f"Of {result['firing']:,} features that fire on {result['image_tokens']:,} tokens of images or "
        f"{result['text_tokens']:,} of text, {result['on_both']:,} fire on both; shown are those on at most "
        f"{result['densest']:.0%} of either."
    )


def multilingual(
    config: Config,
    chosen: Annotated[
        str | None, typer.Option("--prompts", help="A YAML file of meanings in several languages; else the one that ships.")
    ] = None,
    overrides: Overrides = None,
    limit: Annotated[int, typer.Option("--limit", min=1)] = 20,
    as_json: AsJson = False,
) -> None:
    """Find features that fire on a meaning in all languages: chosen in every second language, measured in the others."""
    with command(as_json) as show:
        log_to_stderr()
        from components import steps

        show(steps.multilingual(checked(config, overrides), chosen, limit), _print_multilingual)


def _print_report(result: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    from components.interpretation.safety import SetResult, said

    console = terminal()
    for found in result["sets"]:
        one = SetResult.model_validate(found)
        chance = f"by chance in {one.by_chance.count} of {one.by_chance.of} runs"
        console.print(Text.assemble((one.name, "bold"), f": {said(one)} ({chance}).\n{one.about}"))
        shown = [row for row in one.candidates if row.verdict != "not confirmed"]
        if not shown and one.candidates:
            best = one.candidates[0]
            said_of = f"AUROC {best.held_out.auroc:.2f} on prompts that did not choose it, p {best.p_corrected:.2g}"
            console.print(f"The closest was feature {best.feature}: {said_of}.\n")
            continue
        table = Table("feature", "verdict", "AUROC", "95%", "p", "hits", "contrast", "harmless", "corpus", "most on")
        for row in shown:
            effect = row.held_out
            rates = (f"{rate.share:.0%}" for rate in (row.hits, row.false_alarms, row.harmless, row.corpus))
            interval = f"{effect.auroc_low:.2f}-{effect.auroc_high:.2f}"
            words = "  ".join(printable(place.token) for place in row.fires_on)
            numbers = (f"{effect.auroc:.2f}", interval, f"{row.p_corrected:.2g}", *rates)
            table.add_row(str(row.feature), row.verdict, *numbers, Text(words))
        console.print(table)
        console.print("")
    for caveat in result["caveats"]:
        console.print(f"- {caveat}")
    if "page" in result:
        print(result["page"])


def _print_multilingual(result: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("feature", "languages", "AUROC", "p", "other meanings", "meaning", "most on")
    for row in result["features"]:
        words = Text("  ".join(map(printable, row["tokens"])))
        numbers = (f"{row['auroc']:.2f}", f"{row['p_corrected']:.2g}", f"{row['other_meanings']['share']:.0%}")
        table.add_row(str(row["feature"]), f"{len(row['languages'])}", *numbers, row["meaning"], words)
    terminal().print(table)
    print(f"of {len(result['languages'])} languages: {', '.join(result['languages'])}; p is corrected for all meanings")
