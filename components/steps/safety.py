"""Features that tell prompts from their contrast: of any set, and of all that ship as the safety report."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from components import storage
from components.evaluation.held_out import HeldOut
from components.interpretation import contrast, safety, search
from components.interpretation.explanations.table import read_explanations
from components.interpretation.logits import logit_effects
from components.interpretation.prompt_sets import Parallel, PromptSet, load_harmless, load_parallel, load_sets, shipped_sets
from components.interpretation.safety import SafetyReport, SetResult
from components.language_model.loading import kept_model
from components.run.checks import require_prompts, require_text
from components.run.specification import Specification
from components.settings import UserError, digest
from components.steps.evaluation import own_sae
from components.steps.interpretation import decode_of, held_out_pass, token_ids, written_at
from components.steps.reference import held_out_of

CANDIDATES = 5
"""Features of each set that are measured."""
_CORPUS_TOKENS = 8_000
_SHOWN = 3
_LIKELY = 6


def safety_sets(run: Specification) -> list[PromptSet]:
    """Those that ship, and the user's own."""
    return load_sets([*shipped_sets(), *run.config.interpretation.prompt_sets], "interpretation.prompt_sets")


def safety_report(run: Specification, sets: Sequence[PromptSet], count: int = CANDIDATES) -> SafetyReport:
    """The report of the trained coder, which lies beside it from then on."""
    named = _digest(run, sets, count)
    report = safety.read_safety(run.sae_url, named)
    if report is None:
        report = examine(run, sets, count)
        safety.write_safety(run.sae_url, report)
    return report


def safety_page(run: Specification) -> str:
    return storage.join(run.sae_url, safety.PAGE)


def require_safety(run: Specification) -> None:
    """Make the report where `interpretation.safety` asks for it."""
    if run.config.interpretation.safety:
        safety_report(run, safety_sets(run))


def safety_is_there(run: Specification) -> bool:
    """Whether there is nothing left to do for `interpretation.safety`."""
    wanted = run.config.interpretation.safety
    return not wanted or safety.read_safety(run.sae_url, _digest(run, safety_sets(run), CANDIDATES)) is not None


def examine(run: Specification, sets: Sequence[PromptSet], count: int) -> SafetyReport:
    """Every set on the trained coder; writes nothing."""
    require_text(run, "prompts and their contrast are")
    trained, manifest = run.training_record(), run.token_manifest()
    if trained is None or manifest is None:
        raise UserError(f"sae: the artifact {run.sae_url} is not there yet; run `sae train` first")
    harmless = load_harmless()
    texts = {one.name: safety.sides(one)[0] for one in sets}
    ids = {name: token_ids(run, some, f"set '{name}'") for name, some in texts.items()}
    model, sae = kept_model(run.source, run.device), own_sae(run.sae_url, run.device)
    points, bos = run.read_points or (run.point,), run.bos
    values, places, found = {}, {}, {}
    for one in sets:
        values[one.name], places[one.name] = search.largest(model, points, sae, ids[one.name], bos, run.device)
        found[one.name] = safety.chosen(one, values[one.name], count)
    features = sorted({one.feature for some in found.values() for one in some})
    quiet, _ = search.largest(model, points, sae, token_ids(run, harmless.texts, "harmless"), bos, run.device)
    length = int(np.median([len(one) for some in ids.values() for one in some]))
    passages = _in_passages(run, held_out_of(run, manifest), features, length)
    explanations, likely = read_explanations(run.sae_url, trained.weights_sha256), _likely(run, model, sae, features)
    decode, ps = decode_of(run), safety.corrected(found)
    results = []
    for one in sets:
        candidates = []
        for feature, p in zip(found[one.name], ps[one.name], strict=True):
            number, level = feature.feature, feature.threshold
            silent, corpus = contrast.rate(quiet[:, number] > level), contrast.rate(passages[:, features.index(number)] > level)
            shown = _shown(one, values[one.name][:, number], places[one.name][:, number], ids[one.name])
            candidates.append(
                safety.Candidate(
                    **dict(feature),
                    p_corrected=p,
                    harmless=silent,
                    corpus=corpus,
                    verdict=safety.verdict(p, silent, corpus),
                    fires_on=tuple(
                        safety.Place(text=texts[one.name][row], token=decode(token), activation=activation)
                        for row, token, activation in shown
                    ),
                    likely=likely.get(number, ()),
                    explanation=explanations[number].explanation if number in explanations else None,
                )
            )
        chose = int(safety.sides(one)[2].sum()) // 2
        results.append(
            SetResult(
                name=one.name,
                about=one.about,
                chosen_on=chose,
                measured_on=len(one.pairs) - chose,
                candidates=tuple(candidates),
                by_chance=safety.found_by_chance(one, values[one.name], count, sum(map(len, found.values()))),
            )
        )
    return SafetyReport(
        digest=_digest(run, sets, count),
        about=f"{run.config.name}: {run.config.language_model.name} at {run.hook_point}",
        features=sae.d_sae,
        harmless_texts=len(quiet),
        corpus_passages=len(passages),
        passage_tokens=length,
        sets=tuple(results),
    )


def multilingual(run: Specification, name: str | None, limit: int) -> dict[str, Any]:
    """Features that fire on a meaning in every language and not on other meanings: chosen in every second language, measured
    in the others."""
    require_prompts(run)
    if run.training_record() is None:
        raise UserError(f"sae: the artifact {run.sae_url} is not there yet; run `sae train` first")
    parallel = load_parallel(name, "--prompts")
    languages, meanings = parallel.languages, parallel.meanings
    texts = [meaning[language] for meaning in meanings for language in languages]
    model, sae = kept_model(run.source, run.device), own_sae(run.sae_url, run.device)
    ids = token_ids(run, texts, f"set '{parallel.name}'")
    values, places = search.largest(model, run.read_points or (run.point,), sae, ids, run.bos, run.device)
    decode = decode_of(run)
    rows = []
    for number, meaning in enumerate(meanings):
        own = slice(number * len(languages), (number + 1) * len(languages))
        for found in contrast.check(values, *_of_meaning(parallel, number), 1):
            fires = values[own, found.feature] > found.threshold
            tokens = [decode(ids[row][places[row, found.feature]]) for row in range(own.start, own.stop)]
            rows.append(
                {
                    "feature": found.feature,
                    "meaning": next(iter(meaning.values())),
                    "languages": [language for language, there in zip(languages, fires, strict=True) if there],
                    "tokens": [token for token, there in zip(tokens, fires, strict=True) if there],
                    "other_meanings": found.false_alarms.model_dump(),
                    **found.held_out.model_dump(),
                }
            )
    for row, p in zip(rows, contrast.holm([row["p"] for row in rows]), strict=True):
        row["p_corrected"] = p
    rows.sort(key=lambda row: (-len(row["languages"]), row["p_corrected"], -row["auroc"]))
    return {"set": parallel.name, "languages": list(languages), "features": rows[:limit]}


def _of_meaning(parallel: Parallel, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each text, in the order of meanings and then languages: whether it has the meaning, whether it chooses features."""
    place = np.arange(len(parallel.meanings) * len(parallel.languages))
    return place // len(parallel.languages) == number, place % len(parallel.languages) % 2 == 0


def _shown(
    prompts: PromptSet, values: np.ndarray, places: np.ndarray, ids: Sequence[Sequence[int]]
) -> list[tuple[int, int, float]]:
    """The held-out texts in which a feature is strongest: number, token, activation."""
    _, positive, chosen_on = safety.sides(prompts)
    rows = np.flatnonzero(positive & ~chosen_on & (values > 0))
    order = rows[np.argsort(-values[rows], kind="stable")][:_SHOWN].tolist()
    return [(row, ids[row][places[row]], float(f"{values[row]:.4g}")) for row in order]


def _in_passages(run: Specification, text: HeldOut, features: list[int], length: int) -> np.ndarray:
    """Largest activations in passages of so many tokens, none of which is excluded from sums as padding, `[n, features]`."""
    held_out = held_out_pass(run, text)
    held_out = dataclasses.replace(held_out, tokens=min(_CORPUS_TOKENS, text.tokens))
    chosen, found = torch.tensor(features, dtype=torch.int64, device=run.device), [np.zeros((0, len(features)), np.float32)]
    for batch in held_out.batches():
        activations, inside = batch.activations(chosen), torch.tensor(batch.block.documents >= 0, device=run.device)
        length = min(length, activations.shape[1])
        windows = activations.unfold(1, length, length).amax(dim=-1)  # [b, windows, features]
        found.append(windows[inside.unfold(1, length, length).all(dim=-1)].cpu().numpy())
    return np.concatenate(found)


def _likely(run: Specification, model: Any, sae: Any, features: list[int]) -> dict[int, tuple[str, ...]]:
    rows = getattr(written_at(run, sae), "W_dec", None)
    if rows is None or not features:
        return {}
    effects, decode = logit_effects(model, run.point, rows[features].detach(), _LIKELY), decode_of(run)
    if effects is None:
        return {}
    ids = effects[0][:, :_LIKELY].tolist()
    return {feature: tuple(map(decode, some)) for feature, some in zip(features, ids, strict=True)}


def _digest(run: Specification, sets: Sequence[PromptSet], count: int) -> str:
    trained = run.training_record()
    named = {
        "version": 1,
        "weights": None if trained is None else trained.weights_sha256,
        "model": run.model.identity,
        "tokens": run.token_digest,
        "sets": [one.model_dump(mode="json") for one in (*sets, load_harmless())],
        "candidates": count,
    }
    return digest(named)
