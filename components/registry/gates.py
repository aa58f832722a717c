"""Gates: what a version must show to become champion, and the table of what it showed."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from components.settings import Settings, UserError, digest
from components.yaml_text import YamlError, parse_yaml, read_text

ALWAYS_DEFINED = ("mse", "l0", "ce_loss_clean", "ce_loss_sae", "kl_divergence")
"""Metrics that are null only where the coder's values are not finite. (A ratio may be null for want of something to divide
by.)"""


OF_EXPLANATIONS = ("interpretable_share", "scored_explanations")
"""Metrics that a version has once `sae features explain` has had its features explained and scored."""


NOT_MEASURED = "there is no such metric: it was not measured, as on images there is no loss of a next token"
"""Said of a gate on a metric that an evaluation does not have, see `evaluation.results.applicable`."""


class Bound(Settings):
    at_least: float | None = None
    """The smallest value that passes."""

    at_most: float | None = None
    """The largest value that passes."""

    @model_validator(mode="after")
    def _is_possible(self) -> Bound:
        if self.at_least is None and self.at_most is None:
            raise ValueError("give at_least, at_most or both")
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise ValueError(f"at_least {self.at_least:g} is over at_most {self.at_most:g}")
        return self


class ChampionGates(Settings):
    same_evaluation_set: bool = True
    """Both were measured on the same held-out tokens, language model and hook point, in the same way."""

    l0_at_most_times: float = Field(default=1.05, gt=0)
    """The candidate's L0 is at most so many times the champion's."""

    loss_recovered_margin_at_most: float = Field(default=0.01, ge=0)
    """Upper limit of the margin by which loss_recovered may be lower: half the width of its confidence interval."""

    must_improve: bool = True
    """More loss recovered by more than the margin, or a smaller L0 within it."""


class Gates(Settings):
    evaluation_tokens: int = Field(default=50_000, ge=0)
    """Held-out tokens that the metrics were measured on, at least."""

    bounds: dict[str, Bound] = Field(default_factory=dict)
    """Metric -> the values that pass."""

    champion: ChampionGates = ChampionGates()
    """Comparisons with the champion, skipped where there is none."""


def shipped_gates() -> Path:
    """`mlflow/gates.yaml` of a checkout, or its copy in an installed wheel."""
    installed = Path(__file__).parent / "gates.yaml"
    return installed if installed.is_file() else Path(__file__).parents[2] / "mlflow" / "gates.yaml"


def load_gates(path: str | None) -> Gates:
    """The gates in a YAML file, those that ship where none is named; a UserError for what does not fit."""
    source = Path(path) if path else shipped_gates()
    try:
        return Gates.model_validate(parse_yaml(read_text(source)) or {})
    except OSError as error:
        raise UserError(f"tracking.gates: cannot read '{source}'; name a YAML file such as mlflow/gates.yaml") from error
    except UnicodeDecodeError as error:
        raise UserError(f"tracking.gates: '{source}' is not YAML: {' '.join(str(error).split())}") from error
    except YamlError as error:
        raise UserError(f"tracking.gates: '{source}' {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        if first["type"] == "extra_forbidden":
            known = ", ".join(Gates.model_fields) if len(first["loc"]) == 1 else "the fields that mlflow/gates.yaml shows"
            raise UserError(f"tracking.gates: '{source}': there is no gate '{where}' (accepted here: {known})") from error
        raise UserError(f"tracking.gates: '{source}': {where}: {first['input']!r}: {first['msg']}") from error


@dataclass(frozen=True, kw_only=True)
class GateResult:
    gate: str
    passed: bool
    measured: str
    required: str
    short_by: float | None = None
    """How much is missing, in the metric's unit; None where it passed or cannot be said as a number."""


@dataclass(frozen=True, kw_only=True)
class GateReport:
    """The table of one candidate's gates."""

    results: tuple[GateResult, ...]
    champion: str | None
    """Version of the champion that it was compared with."""
    gates_digest: str

    @property
    def passed(self) -> bool:
        return all(result.passed for result in self.results)

    @property
    def reason(self) -> str:
        """One sentence: why it passed, or by which gates it is refused and how much."""
        failed = [result for result in self.results if not result.passed]
        if failed:
            return "refused by " + "; ".join(_sentence(result) for result in failed)
        if self.champion is None:
            return f"there was no champion, and {len(self.results)} of {len(self.results)} gates passed"
        better = next((result.measured for result in self.results if result.gate == "champion.improvement"), "no worse")
        return f"better than version {self.champion}: {better}"

    def as_json(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "reason": self.reason,
            "champion": self.champion,
            "gates_digest": self.gates_digest,
            "gates": [asdict(result) for result in self.results],
        }


def markdown_table(report: dict[str, Any]) -> str:
    """A report, as `GateReport.as_json` gives it, as a Markdown table."""
    lines = ["| gate | | measured | required | short by |", "|---|---|---|---|---|"]
    for row in report["gates"]:
        verdict = "pass" if row["passed"] else "**fail**"
        short = "" if row["short_by"] is None else f"{row['short_by']:.5g}"
        lines.append(f"| {row['gate']} | {verdict} | {row['measured']} | {row['required']} | {short} |")
    return "\n".join(lines) + "\n"


def _sentence(result: GateResult) -> str:
    short = "" if result.short_by is None else f", short by {result.short_by:.5g}"
    return f"{result.gate} ({result.measured}; required {result.required}{short})"


def check_gates(
    gates: Gates,
    candidate: dict[str, Any],
    candidate_set: str,
    champion: dict[str, Any] | None = None,
    champion_set: str | None = None,
    champion_version: str | None = None,
) -> GateReport:
    """All gates, also after the first that fails.

    candidate, champion: metrics by name, with `NAME_low` and `NAME_high` where there is a confidence interval;
    *_set: names what they were measured on.
    """
    results = [_finite(candidate), _tokens(gates, candidate)]
    results += [_bound(name, bound, candidate.get(name), name in candidate) for name, bound in gates.bounds.items()]
    if champion is not None:
        results += _against(gates.champion, candidate, candidate_set, champion, champion_set)
    return GateReport(
        results=tuple(results),
        champion=champion_version if champion is not None else None,
        gates_digest=digest(json.loads(gates.model_dump_json())),
    )


def _finite(candidate: dict[str, Any]) -> GateResult:
    bad = {name for name, value in candidate.items() if isinstance(value, float) and not math.isfinite(value)}
    bad |= {name for name in ALWAYS_DEFINED if name in candidate and candidate[name] is None}
    return GateResult(
        gate="finite", passed=not bad, measured="not finite: " + ", ".join(sorted(bad)) if bad else "all metrics are finite",
        required="no NaN, no infinity",
    )  # fmt: skip


def _tokens(gates: Gates, candidate: dict[str, Any]) -> GateResult:
    tokens = int(candidate.get("evaluation_tokens") or 0)
    missing = gates.evaluation_tokens - tokens
    return _by_distance("evaluation_tokens", missing, f"{tokens:,}", f">= {gates.evaluation_tokens:,}")


def _bound(name: str, bound: Bound, value: Any, measured: bool) -> GateResult:
    required = " and ".join(
        f"{sign} {limit:g}" for sign, limit in ((">=", bound.at_least), ("<=", bound.at_most)) if limit is not None
    )
    if not _is_number(value):
        unexplained = "no explanation of its features has been scored yet; `sae features explain` has that done"
        missing = unexplained if name in OF_EXPLANATIONS else "not defined" if measured else NOT_MEASURED
        return GateResult(gate=name, passed=False, measured=missing if value is None else str(value), required=required)
    under = bound.at_least - value if bound.at_least is not None else -math.inf
    over = value - bound.at_most if bound.at_most is not None else -math.inf
    return _by_distance(name, max(under, over), f"{value:.5g}", required)


def _by_distance(gate: str, short: float, measured: str, required: str) -> GateResult:
    """short: how much is missing; 0 or less where it passed."""
    missing = float(short) if short > 0 else None
    return GateResult(gate=gate, passed=short <= 0, measured=measured, required=required, short_by=missing)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def quality_of(candidate: dict[str, Any], champion: dict[str, Any]) -> str:
    """What is to be no lower than the champion's: of SAEs on images, which have no loss to recover, the explained variance."""
    return "loss_recovered" if "loss_recovered" in {**candidate, **champion} else "explained_variance"


def margin_of(gates: ChampionGates, candidate: dict[str, Any], champion: dict[str, Any]) -> float:
    """Half the width of the wider confidence interval of `quality_of`, capped; 0 where there is none."""
    widths, name = [0.0], quality_of(candidate, champion)
    for metrics in (candidate, champion):
        low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
        if _is_number(low) and _is_number(high):
            widths.append((float(high) - float(low)) / 2)  # type: ignore[arg-type]
    return min(max(widths), gates.loss_recovered_margin_at_most)


def _against(
    gates: ChampionGates, candidate: dict[str, Any], candidate_set: str, champion: dict[str, Any], champion_set: str | None
) -> list[GateResult]:
    results = []
    if gates.same_evaluation_set:
        same = candidate_set == champion_set
        measured = "the same" if same else f"{candidate_set}, champion {champion_set}"
        required = "the champion's held-out tokens, language model and hook point"
        results.append(GateResult(gate="champion.evaluation_set", passed=same, measured=measured, required=required))
    quality = quality_of(candidate, champion)
    unknown = [name for name in (quality, "l0") if not (_is_number(candidate.get(name)) and _is_number(champion.get(name)))]
    if unknown:
        measured = ", ".join(f"{name} {candidate.get(name)} against {champion.get(name)}" for name in unknown)
        return [*results, GateResult(gate="champion.comparable", passed=False, measured=measured, required="numbers")]
    found, before = float(candidate[quality]), float(champion[quality])
    l0, l0_before = float(candidate["l0"]), float(champion["l0"])
    margin = margin_of(gates, candidate, champion)
    limit = gates.l0_at_most_times * l0_before
    lowest = before - margin
    required = f">= {lowest:.5f} (champion {before:.5f}, margin {margin:.5f})"
    results.append(_by_distance(f"champion.{quality}", lowest - found, f"{found:.5f}", required))
    required = f"<= {limit:.4g} ({gates.l0_at_most_times:g} times {l0_before:.4g})"
    results.append(_by_distance("champion.l0", l0 - limit, f"{l0:.4g}", required))
    if gates.must_improve:
        # Only a gain beyond the margin counts as more loss recovered, so that of two versions at most one beats the other.
        more, fewer = found > before + margin, abs(found - before) <= margin and l0 < l0_before
        does, what = ("recovers", "loss") if quality == "loss_recovered" else ("explains", "variance")
        kind = f"{does} more {what}" if more else f"{does} no less {what} with fewer features" if fewer else "no improvement"
        if found == before and l0 == l0_before:
            kind = "is equal"
        measured = f"{kind}: {quality} {found:.5f} against {before:.5f}, l0 {l0:.4g} against {l0_before:.4g}"
        required = f"more {what} {does[:-1]}ed beyond the margin, or a smaller l0 within it"
        results.append(GateResult(gate="champion.improvement", passed=more or fewer, measured=measured, required=required))
    return results
