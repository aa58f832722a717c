"""What a run would do and what it would take: tokens, bytes, memory, operations."""

from __future__ import annotations

from statistics import median
from typing import Any

from components.activations.dataset.reader import WINDOW_GROUPS
from components.activations.dataset.schema import DTYPES, TOKEN_BYTES, Layout
from components.activations.online.folder import OnlineFolder
from components.activations.online.production import cut
from components.activations.online.space import generation_space
from components.activations.settings import ActivationSettings
from components.interpretation.examples import BINS
from components.interpretation.token_shares import SAMPLED
from components.run.checks import without_evaluation
from components.run.specification import Specification
from components.training.settings import RankSettings


def estimate(run: Specification) -> dict[str, Any]:
    """What a run would do and what it would take, as plain JSON."""
    config, d_in, d_sae = run.config, run.d_in, run.d_sae
    tokens = run.token_manifest()
    online = config.activations.mode == "online"
    manifest = None if online else run.dataset_manifest()
    record, ranks = run.training_record(), config.execution.training
    stored = manifest.tokens if manifest else (tokens.splits["train"].tokens if tokens else config.corpus.train_tokens)
    held_out = tokens.splits["held_out"].tokens if tokens else config.corpus.held_out_tokens
    row_bytes = TOKEN_BYTES + sum(run.widths.values()) * DTYPES[config.activations.dtype].itemsize
    steps = config.training.steps
    sae_parameters = parameters(run)
    model_parameters = run.model.parameters
    share = max(column.depth for column in run.model.columns)
    evaluated = min(config.evaluation.tokens, held_out)
    settings = config.activations
    # chunks on their way to the disk beside the next one, then shards being shuffled at the same time
    chunk_bytes = min(stored, settings.sequences_per_chunk * config.corpus.context_length) * row_bytes
    shuffled_bytes = settings.shuffle_workers * (min(stored, settings.rows_per_shard) + 4 * settings.rows_per_group) * row_bytes
    logit_bytes = config.evaluation.batch_sequences * config.corpus.context_length * run.model.vocabulary * 4
    coder_bytes, window_bytes = training_memory(run, stored)
    interpreted = config.interpretation
    example_bytes = (3 * 24 * (8 * (interpreted.examples + interpreted.drawn) + SAMPLED) + 16 * BINS) * d_sae
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
            "peak_bytes": config.activations.disk_bytes or stored * 2 * row_bytes,
            "flops": 2 * model_parameters * share * (_trained_tokens(run) if online else stored),
            **({"online": online_outlook(run, stored, extraction_flops=2 * model_parameters * share)} if online else {}),
        },
        "sae": {
            "digest": run.sae_digest, "url": run.sae_url, "exists": record is not None,
            "architecture": config.sae.architecture, "d_in": d_in, "d_sae": d_sae, "parameters": sae_parameters,
        },
        "training": {
            "tokens": steps * config.training.batch_size, "epochs": steps * config.training.batch_size / stored,
            "steps": steps, "starts": run.start_said, "flops": dense_flops(run),
            **({} if ranks.size == 1 else {"processes": ranks.size, "torchrun": torchrun(ranks)}),
        },
        "evaluation": {
            "exists": run.evaluation_record() is not None, "impossible": without_evaluation(run), "tokens": evaluated,
            # one pass as it is, and three from the hook point on
            "flops": (1 + 3 * (1 - share)) * 2 * model_parameters * evaluated,
        },
        "memory_bytes": {
            "extraction": 4 * model_parameters + max(4 * chunk_bytes, shuffled_bytes),
            "training": coder_bytes + window_bytes,  # of one of its processes
            "evaluation": 4 * model_parameters + 2 * logit_bytes,
            # of each kept sequence some eight activations (see `Examples`); histograms of the text and of a span
            **({"interpretation": 4 * model_parameters + example_bytes} if interpreted.tokens else {}),
        },
        "registered_model": run.registered_model,
    }  # fmt: skip


def online_outlook(run: Specification, stored: int, extraction_flops: float) -> dict[str, Any]:
    """How generations come and go, and whether extraction keeps up with training: by what was measured of this very training,
    else by operations. extraction_flops: of a token."""
    settings, folder = run.config.activations, OnlineFolder(run.dataset_url)
    tokens, wanted, ledger = settings.generation_tokens or stored, folder.wanted(), folder.ledger()
    known = run.token_manifest()
    context = len(run.model.layout()) if run.of_images else run.config.corpus.context_length
    space = generation_space(settings, Layout(run.widths, settings.dtype), max(1, min(tokens, stored) // context), context)
    measured = [entry.tokens_per_second for entry in ledger.entries if entry.tokens_per_second] if ledger else []
    k = getattr(run.config.sae, "k", None)
    training_flops = dense_flops(run) if k is None or run.device.type != "cpu" else sparse_flops(run, k)
    if measured and wanted is not None and wanted.tokens_per_second is not None:
        rates = {
            "extraction_tokens_per_second": median(measured), "training_tokens_per_second": wanted.tokens_per_second,
            "waited": wanted.waited,
        }  # fmt: skip
        slower = wanted.tokens_per_second / median(measured)
    else:
        rates, slower = {}, extraction_flops * _trained_tokens(run) / training_flops
    return {
        "generations": -(-stored // tokens)
        if known is None
        else cut(known.splits["train"], known.context_length, tokens).count,
        "generation_tokens": tokens,
        "at_once": max(1, ((settings.disk_bytes or 0) - space.making) // space.kept),
        "extracted_tokens": _trained_tokens(run),
        "extraction_to_training": slower,
        "measured": bool(rates),
        **rates,
        # of its time, beside an extraction on a device as fast
        "training_waits": max(0.0, 1 - 1 / slower),
    }


def torchrun(ranks: RankSettings) -> str:
    """By which a machine starts them all by itself; `sae train` and the flow do the same."""
    return f"torchrun --standalone --nproc-per-node {ranks.size} --no-python sae train CONFIG"


def parameters(run: Specification) -> int:
    """Of the coder."""
    d_in, d_out = run.d_in, sum(column.width for column in run.written_columns)
    return (d_in + d_out) * run.d_sae + d_out + run.d_sae + d_in * d_out * run.config.sae.skip


def training_memory(run: Specification, stored: int) -> tuple[int, int]:
    """Bytes of a coder in training, in each of its processes, and of the reader that coders in lockstep share. stored: tokens
    of the dataset."""
    read_width = sum(run.widths[name] for name in {*run.reads, *run.writes})
    # weights, gradients and Adam's two moments; features and their gradients
    ranks = run.config.execution.training
    micro_batch = run.config.training.micro_batch
    coder = 16 * parameters(run) // ranks.feature_parallel + 12 * micro_batch * run.d_sae // ranks.size
    return coder, reader_bytes(run.config.activations, stored, read_width)


def reader_bytes(settings: ActivationSettings, stored: int, width: int) -> int:
    """Of the reader's four windows, and two in which generations are mixed, each of which is read in windows of its own.
    width: of what is read, all columns together."""
    mixed = settings.generations_mixed or 1
    groups = 4 * mixed * max(1, WINDOW_GROUPS // mixed) + 2 * WINDOW_GROUPS * (mixed > 1)
    return min(4 * stored, groups * settings.rows_per_group) * width * DTYPES[settings.dtype].itemsize


def dense_flops(run: Specification) -> int:
    """Of the training, every feature computed for every token: per weight and token 2 forward, and 2 for each gradient (of the
    activations none is needed)."""
    d_out = sum(column.width for column in run.written_columns)
    return (4 * run.d_in + 6 * d_out) * run.d_sae * _trained_tokens(run)


def sparse_flops(run: Specification, l0: float) -> int:
    """The same where only the encoder's forward pass is over all features, and all else over the l0 active ones of a token."""
    d_out = sum(column.width for column in run.written_columns)
    return round((2 * run.d_in * run.d_sae + l0 * (2 * run.d_in + 6 * d_out)) * _trained_tokens(run))


def _trained_tokens(run: Specification) -> int:
    return run.config.training.steps * run.config.training.batch_size
