"""Features turned up or down: what the model writes then, what else changes, and the changed model as one that runs alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor

from components import storage
from components.interpretation import steered_model
from components.interpretation.logits import logit_effects
from components.interpretation.prompt_sets import load_harmless
from components.interpretation.steering import Edit, Kind, Where, continued, edited, steered
from components.language_model.loading import kept_model, load_encoder, load_tokenizer
from components.run.checks import require_prompts, require_text
from components.run.specification import Specification
from components.settings import UserError
from components.steps.evaluation import own_sae
from components.steps.interpretation import decode_of, held_out_pass, token_ids, written_at
from components.steps.reference import held_out_of

_UNRELATED_SEQUENCES, _UNRELATED_TOKENS = 16, 1 << 15
_LIKELY = 10


def steer(
    run: Specification,
    feature: int,
    scale: float,
    prompt: str,
    count: int,
    kind: Kind = "clamp",
    positions: str = "all",
    save: Path | None = None,
) -> dict[str, Any]:
    """What the model writes after the prompt as it is, and with a feature held at `scale` times its largest activation, with
    that added to it, or scaled. positions: all, prompt, new, or numbers. save: where to put the model that adds it."""
    require_prompts(run)
    model, sae, largest = _feature(run, feature)
    encoder, decode = load_encoder(run.source), decode_of(run)
    room = run.model.longest_text or run.config.corpus.context_length
    bos = [] if run.bos is None else [run.bos]
    ids = [*bos, *encoder.of(rendered=True)([prompt])[0]]
    if not ids or len(ids) + count > room:
        raise UserError(f"--prompt: {len(ids)} tokens with {count} to come are not accepted: 1 to {room} are, all together")
    if save is not None and (kind, positions) != ("add", "all"):
        raise UserError(
            f"--save: a model without this project can hold `--mode add` at all positions, not '{kind}' at '{positions}'"
        )
    value = scale if kind == "scale" else scale * largest
    coder = written_at(run, sae)
    # What is added does not depend on f.
    longest = None if kind == "add" else longest_of(run)
    change = edited(coder, [Edit(feature, value, kind)], where_of(positions, len(ids)), longest=longest)
    if save is not None:
        made = steered_model.with_bias(model, run.point, value * coder.W_dec[feature].detach())
        steered_model.save(made, load_tokenizer(run.source), save)
    plain = continued(model, run.point, lambda *_: None, ids, count, run.device)
    changed = continued(model, run.point, change, ids, count, run.device, run.read_points)
    return {
        "feature": feature,
        "mode": kind,
        "positions": positions,
        "held_at": value,
        "prompt": prompt,
        "plain": "".join(map(decode, plain)),
        "steered": "".join(map(decode, changed)),
        "saved": None if save is None else str(save),
    }


def longest_of(run: Specification) -> float | None:
    """The norm over which the SAE has seen no token, where there is such a limit and it reads what it writes."""
    manifest = None if run.read_points else run.dataset_manifest()
    return None if manifest is None else manifest.exclusion.norm_limits.get(str(run.point))


def where_of(positions: str, prompt: int) -> Where | None:
    """prompt: its tokens."""
    if positions == "all":
        return None
    if positions in ("prompt", "new"):
        return lambda at: (at < prompt) == (positions == "prompt")
    try:
        numbers = [int(part) for part in positions.split(",")]
    except ValueError:
        numbers = [-1]
    if min(numbers) < 0:
        raise UserError(f"--positions: '{positions}' is not accepted: all, prompt, new or numbers from 0 such as 3,4,9 are")
    return lambda at: torch.isin(at, torch.tensor(numbers, device=at.device))


@torch.no_grad()
def steering_effect(run: Specification, feature: int, scales: Sequence[float], texts: Sequence[str]) -> dict[str, Any]:
    """What holding a feature at multiples of its largest activation does: on `texts` (harmless ones that ship where none are
    given) to the ten tokens that it makes likely and to all others, and to the next token of unrelated text, which is of the
    held-out corpus and does not make it fire (None where there is no such sequence)."""
    require_text(run, "the effect is measured on")
    model, sae, largest = _feature(run, feature)
    coder, longest = written_at(run, sae), longest_of(run)
    some = list(texts) or list(load_harmless().texts)
    ids, bos = token_ids(run, some, "--text"), [] if run.bos is None else [run.bos]
    prompts = [torch.tensor([[*bos, *one]], device=run.device) for one in ids]
    effects = logit_effects(model, run.point, coder.W_dec[[feature]].detach(), _LIKELY)
    likely = None if effects is None else effects[0][0, :_LIKELY]
    unrelated = _unrelated(run, feature)
    count = int(sum(counted[:, 1:].sum() for _, counted in unrelated))
    clean = [model(input_ids=one, use_cache=False).logits.log_softmax(dim=-1) for one in prompts]
    before = sum(_loss(model, *one) for one in unrelated) / count if count else None
    rows = []
    for scale in scales:
        divergence = tokens = 0.0
        likeliest = []
        edits = [Edit(feature, scale * largest)]
        with steered(model, run.point, coder, edits, reads=run.read_points, longest=longest):
            for one, was in zip(prompts, clean, strict=True):
                now = model(input_ids=one, use_cache=False).logits.log_softmax(dim=-1)
                divergence += float((was.exp() * (was - now))[0, len(bos) :].sum())
                tokens += one.shape[1] - len(bos)
                if likely is not None:
                    likeliest.append(now[0, len(bos) :, likely].exp().sum(dim=-1))
            after = sum(_loss(model, *one) for one in unrelated) / count if count else None
        rows.append(
            {
                "scale": scale,
                "held_at": scale * largest,
                "kl_divergence": divergence / tokens,
                "likely_tokens": float(torch.cat(likeliest).mean()) if likeliest else None,
                "unrelated_loss": after,
                "unrelated_loss_added": None if after is None or before is None else after - before,
            }
        )
    decode = decode_of(run)
    return {
        "feature": feature,
        "largest": largest,
        "texts": len(some),
        "unrelated_tokens": count,
        "unrelated_loss_before": before,
        "likely": [] if likely is None else [decode(int(token)) for token in likely],
        "likely_tokens_before": None
        if likely is None
        else float(torch.cat([one[0, len(bos) :, likely].exp().sum(dim=-1) for one in clean]).mean()),
        "scales": rows,
    }


def _unrelated(run: Specification, feature: int) -> list[tuple[Tensor, Tensor]]:
    """Held-out sequences in which the feature does not fire, one by one, and which of their tokens count; at most
    `_UNRELATED_SEQUENCES` of the first `_UNRELATED_TOKENS` tokens."""
    manifest = run.token_manifest()
    assert manifest is not None
    text = held_out_of(run, manifest)
    found = list[tuple[Tensor, Tensor]]()
    looked_at = replace(held_out_pass(run, text), tokens=_UNRELATED_TOKENS)
    for batch in looked_at.batches():
        quiet = batch.activations(torch.tensor([feature], device=run.device)).amax(dim=(1, 2)) == 0
        for row in quiet.nonzero().flatten().tolist():
            counted = torch.tensor(batch.block.documents[row : row + 1] >= 0, device=run.device)
            found.append((torch.tensor(batch.block.tokens[row : row + 1], device=run.device).long(), counted))
            if len(found) == _UNRELATED_SEQUENCES:
                return found
    return found


def _loss(model: Any, tokens: Tensor, counted: Tensor) -> float:
    """Sum of the next-token losses in nats."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    return float(losses[counted[:, 1:]].double().sum())


def _feature(run: Specification, feature: int) -> tuple[Any, Any, float]:
    """Language model, coder and the feature's largest activation."""
    if run.evaluation_record() is None:
        raise UserError(f"sae: the artifact {run.sae_url} is not evaluated yet; run `sae evaluate` first")
    model, sae = kept_model(run.source, run.device), own_sae(run.sae_url, run.device)
    if not 0 <= feature < sae.d_sae:
        raise UserError(f"FEATURE: {feature} is not accepted: there are 0 to {sae.d_sae - 1}")
    with storage.local_copies(run.sae_url, ("features.parquet",)) as folder:
        largest = pq.read_table(folder / "features.parquet", columns=["max_activation"])["max_activation"][feature].as_py()
    if not largest > 0:
        raise UserError(
            f"FEATURE: {feature} is not accepted: it fires on none of the evaluation's tokens, so it has no largest activation "
            "to be a multiple of; `sae features list` has those that fire"
        )
    return model, sae, float(largest)
