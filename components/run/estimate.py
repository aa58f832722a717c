"""What a run would do and what it would take: tokens, bytes, memory, operations."""

from __future__ import annotations

from typing import Any

from components.activations.dataset.reader import WINDOW_GROUPS
from components.activations.dataset.schema import DTYPES, TOKEN_BYTES
from components.run.checks import without_evaluation
from components.run.specification import Specification


def estimate(run: Specification) -> dict[str, Any]:
    """What a run would do and what it would take, as plain JSON."""
    config, d_in, d_sae = run.config, run.d_in, run.d_sae
    tokens = run.token_manifest()
    manifest = run.dataset_manifest()
    record = run.training_record()
    stored = manifest.tokens if manifest else (tokens.splits["train"].tokens if tokens else config.corpus.train_tokens)
    held_out = tokens.splits["held_out"].tokens if tokens else config.corpus.held_out_tokens
    row_bytes = TOKEN_BYTES + sum(run.widths.values()) * DTYPES[config.activations.dtype].itemsize
    steps = config.training.steps
    d_out = sum(column.width for column in run.written_columns)
    read_width = sum(run.widths[name] for name in {*run.reads, *run.writes})
    sae_parameters = (d_in + d_out) * d_sae + d_out + d_sae + d_in * d_out * config.sae.skip
    model_parameters = run.model.parameters
    share = max(column.depth for column in run.model.columns)
    evaluated = min(config.evaluation.tokens, held_out)
    settings = config.activations
    # chunks on their way to the disk beside the next one, then shards being shuffled at the same time
    chunk_bytes = min(stored, settings.sequences_per_chunk * config.corpus.context_length) * row_bytes
    shuffled_bytes = settings.shuffle_workers * (min(stored, settings.rows_per_shard) + 4 * settings.rows_per_group) * row_bytes
    logit_bytes = config.evaluation.batch_sequences * config.corpus.context_length * run.model.vocabulary * 4
    # weights, gradients and Adam's two moments; features and their gradients; the reader's four windows
    window_bytes = min(stored, WINDOW_GROUPS * settings.rows_per_group) * read_width * DTYPES[settings.dtype].itemsize
    training_bytes = 16 * sae_parameters + 12 * config.training.batch_size * d_sae + 4 * window_bytes
    interpreted = config.interpretation
    examples = interpreted.examples + interpreted.drawn + 2 * config.evaluation.batch_sequences
    example_bytes = 4 * examples * d_sae * config.corpus.context_length
    return {
        "name": config.name,
        "device": str(run.device),
        "language_model": {
            "name": config.language_model.name, "parameters": model_parameters, "layers": run.model.layers,
            "d_model": run.model.width, "hook_point": ", ".join(run.widths),
        },
        "tokens": {
            "digest": run.token_digest, "url": run.token_url, "exists": tokens is not None, "corpus": config.corpus.title,
            "train": stored, "held_out": held_out, "exact": tokens is not None,
        },
        "activations": {
            "digest": run.dataset_digest, "url": run.dataset_url, "exists": manifest is not None,
            "tokens": stored, "bytes": stored * row_bytes, "bytes_per_token": row_bytes,
            # scattered chunks and finished shards stand side by side until the commit
            "peak_bytes": stored * 2 * row_bytes,
            "flops": 2 * model_parameters * share * stored,
        },
        "sae": {
            "digest": run.sae_digest, "url": run.sae_url, "exists": record is not None,
            "architecture": config.sae.architecture, "d_in": d_in, "d_sae": d_sae, "parameters": sae_parameters,
        },
        "training": {
            "tokens": steps * config.training.batch_size, "epochs": steps * config.training.batch_size / stored,
            "steps": steps, "starts": run.start_said, "flops": 5 * (d_in + d_out) * d_sae * steps * config.training.batch_size,
        },
        "evaluation": {
            "exists": run.evaluation_record() is not None, "impossible": without_evaluation(run), "tokens": evaluated,
            # one pass as it is, and three from the hook point on
            "flops": (1 + 3 * (1 - share)) * 2 * model_parameters * evaluated,
        },
        "memory_bytes": {
            "extraction": 4 * model_parameters + max(4 * chunk_bytes, shuffled_bytes),
            "training": training_bytes,
            "evaluation": 4 * model_parameters + 2 * logit_bytes,
            # strongest and sampled sequences, each with what is merged into them
            **({"interpretation": 4 * model_parameters + 2 * example_bytes} if interpreted.tokens else {}),
        },
        "registered_model": run.registered_model,
    }  # fmt: skip
