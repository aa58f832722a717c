"""The plan of a run that does not fit here: what each part takes at some place and costs; a refusal where it cannot be.

Nothing is measured by planning. What was measured elsewhere is given by the user (`training_tokens_per_second`, ...); the rest
is the vendor's data sheet times an assumed share, and the plan says which is which.
"""

from __future__ import annotations

import math
from typing import Any

from components.activations.dataset.shard import LARGEST_PAGE
from components.activations.dataset.shuffle import MOST_READS
from components.planning.memory import Memory, rank_memory
from components.planning.place import Place
from components.planning.requests import Requests, requests, shards_of, shuffle_of
from components.planning.shape import Shape
from components.settings import Record, UserError

USABLE = 0.92
"""Share of a GPU's memory that is planned with: the allocator's rounding takes the rest."""
_MOST_RANKS = 1 << 20
_SECONDS = 3600.0


class Hours(Record):
    tokens_per_second: float
    """Of all that work at it together."""
    hours: float
    gpu_hours: float
    measured: bool
    """Given by the user; else the data sheet's peak times the assumed share."""


class Outlook(Record):
    name: str
    gpu: str
    gpu_bytes: int
    ranks: int
    ranks_needed: int
    """The fewest that hold the coder."""
    memory: Memory
    """Of a rank of the training."""
    gpus_per_worker: int
    """That hold the language model in an extraction."""
    dataset_bytes: int
    requests: Requests
    shards: int
    merges: int
    """Levels of merging between scatter and shuffle."""
    extraction: Hours
    training: Hours
    read_bytes_per_second: float
    """That the training reads, all ranks together."""
    stored_cost: dict[str, float] | None
    """None where no price is given; its parts, and their `total`."""
    online_cost: dict[str, float] | None
    """The same where the language model runs beside the training, once for each pass over the data, and
    `activations.disk_bytes`, or else two generations of a hundredth of the dataset, are on disk."""
    online_workers: int
    """Extraction workers that keep such a training busy."""
    said: tuple[str, ...]
    """What is measured, what is assumed, and what to look at."""


def plan(shape: Shape, place: Place) -> Outlook:
    """A UserError that names what to change where it cannot be."""
    _require_pages(shape)
    needed = ranks_needed(shape, place)
    ranks = place.ranks or (shape.feature_parallel if shape.feature_parallel > 1 else needed)
    memory = rank_memory(shape, True, ranks)
    if ranks < needed:
        raise UserError(_too_large(shape, place, ranks, memory.peak, needed))
    shuffle, asked = shuffle_of(shape), requests(shape, ranks * shape.data_parallel)
    online_bytes = shape.activations.disk_bytes
    if place.disk_tb is not None and online_bytes is not None and online_bytes > place.disk_tb * 1e12:
        raise UserError(
            f"disk_tb: {place.disk_tb:g} TB hold less than activations.disk_bytes ({_tb(online_bytes)}); lower that one"
        )
    if place.disk_tb is not None and online_bytes is None and asked.peak_bytes > place.disk_tb * 1e12:
        raise UserError(
            f"disk_tb: the activations take {_tb(shape.bytes)} and {_tb(asked.peak_bytes)} while they are shuffled, of "
            f"{place.disk_tb:g} TB: lower corpus.train_tokens ({shape.stored:,}) to at most "
            f"{int(place.disk_tb * 1e12 / asked.peak_bytes * shape.stored):,}, or store fewer of activations.hook_points"
        )
    per_worker = _gpus_per_worker(shape, place)
    extraction = _hours(
        shape.stored, shape.extraction_flops, place.extraction_tokens_per_second, place.extraction_workers,
        per_worker * place.extraction_workers, place.flops("bfloat16"),
    )  # fmt: skip
    training = _hours(
        shape.trained, shape.training_flops, place.training_tokens_per_second, 1, ranks * shape.data_parallel,
        place.flops(shape.autocast),
    )  # fmt: skip
    per_second = asked.trained_bytes / (training.hours * _SECONDS)
    one_worker = extraction.tokens_per_second / place.extraction_workers
    online_workers = math.ceil(training.tokens_per_second / one_worker)
    stored, online = _costs(shape, place, asked, extraction, training)
    return Outlook(
        name=shape.name,
        gpu=place.gpu,
        gpu_bytes=place.memory,
        ranks=ranks,
        ranks_needed=needed,
        memory=memory,
        gpus_per_worker=per_worker,
        dataset_bytes=shape.bytes,
        requests=asked,
        shards=shards_of(shape),
        merges=shuffle.levels,
        extraction=extraction,
        training=training,
        read_bytes_per_second=per_second,
        stored_cost=stored,
        online_cost=online,
        online_workers=online_workers,
        said=tuple(_said(shape, place, extraction, training, per_second, ranks, shuffle.reads)),
    )


def ranks_needed(shape: Shape, place: Place) -> int:
    """The fewest that hold the coder. A UserError where no number does: what every rank holds whole is too much."""
    limit = USABLE * place.memory
    if rank_memory(shape, True, min(_MOST_RANKS, shape.d_sae)).peak > limit:
        whole = rank_memory(shape, True, min(_MOST_RANKS, shape.d_sae))
        raise UserError(
            f"training.batch_size: {shape.batch_size:,} tokens of width {shape.d_in:,} take {_gb(whole.peak)} on every rank, "
            f"however many share the features, of {_gb(limit)} that a {place.gpu} gives; make it smaller"
        )
    low, high = 1, 1
    while rank_memory(shape, True, high).peak > limit:
        low, high = high, 2 * high
    while low < high:
        middle = (low + high) // 2
        if rank_memory(shape, True, middle).peak > limit:
            low = middle + 1
        else:
            high = middle
    return high


def _too_large(shape: Shape, place: Place, ranks: int, peak: int, needed: int) -> str:
    limit = USABLE * place.memory
    fits = int(shape.d_sae * ranks // needed)
    smaller = shape.batch_size
    while smaller > 1 and rank_memory(shape.model_copy(update={"batch_size": smaller}), True, ranks).peak > limit:
        smaller //= 2
    parts = shape.batch_size // smaller * shape.gradient_accumulation_steps
    batch = f", or training.gradient_accumulation_steps {parts:,}, or training.batch_size {smaller:,}" if smaller > 1 else ""
    return (
        f"ranks: a rank of {ranks} would take {_gb(peak)}, of {_gb(limit)} that a {place.gpu} gives: use at least {needed:,} "
        f"ranks, or sae.d_sae of about {fits:,} (it is {shape.d_sae:,}){batch}"
    )


def _require_pages(shape: Shape) -> None:
    for name, width in shape.widths.items():
        largest = LARGEST_PAGE // shape.layout.column_bytes[name]
        if shape.activations.rows_per_group > largest:
            raise UserError(
                f"activations.rows_per_group: {shape.activations.rows_per_group:,} rows of {name} ({width:,} wide) are more "
                f"than a Parquet page holds; at most {largest:,} are accepted"
            )


def _gpus_per_worker(shape: Shape, place: Place) -> int:
    """Weights up to the last hook point would do, but the whole model is loaded; a tenth more for what passes through it."""
    return max(1, math.ceil(1.1 * shape.model_bytes / (USABLE * place.memory)))


def _hours(tokens: int, flops: float, measured: float | None, workers: int, gpus: int, flops_per_gpu: float) -> Hours:
    rate = measured * workers if measured is not None else tokens / (flops / (flops_per_gpu * gpus))
    hours = tokens / rate / _SECONDS
    return Hours(tokens_per_second=rate, hours=hours, gpu_hours=hours * gpus, measured=measured is not None)


def _costs(
    shape: Shape, place: Place, asked: Requests, extraction: Hours, training: Hours
) -> tuple[dict[str, float] | None, dict[str, float] | None]:
    prices = (place.gpu_hour, place.gb_month, place.put_1000, place.get_1000)
    if all(price is None for price in prices):
        return None, None
    gpu, month, put, get = (price or 0.0 for price in prices)
    passes = max(1.0, shape.trained / shape.stored)
    stored = {
        "extraction": gpu * extraction.gpu_hours,
        "training": gpu * training.gpu_hours,
        "storage": month * place.months * shape.bytes / 1e9,
        "requests": (put * asked.puts + get * (asked.gets + asked.trained_gets)) / 1e3,
    }
    written = passes * (put * asked.puts + get * asked.gets) / 1e3
    online = {
        "extraction": gpu * extraction.gpu_hours * passes,
        "training": gpu * training.gpu_hours,
        "storage": month * training.hours / 730 * (shape.activations.disk_bytes or 2 * shape.bytes / 100) / 1e9,
        "requests": written + get * asked.trained_gets / 1e3,
    }
    return tuple({**part, "total": sum(part.values())} for part in (stored, online))  # type: ignore[return-value]


def _said(
    shape: Shape, place: Place, extraction: Hours, training: Hours, per_second: float, ranks: int, reads: int
) -> list[str]:
    said = []
    peak, low = place.flops("none") / place.utilisation, place.flops("bfloat16") / place.utilisation
    for what, hours, flops in (
        ("extraction", extraction, low),
        ("training", training, peak if shape.autocast == "none" else low),
    ):
        if hours.measured:
            said.append(f"{what}: {hours.tokens_per_second:,.0f} tokens/s as you measured them")
        else:
            said.append(
                f"{what}: assumed, {place.utilisation:.0%} of {flops / 1e12:g} TFLOP/s of a {place.gpu} by its data sheet; "
                "nothing of this project has been measured there"
            )
    said.append("memory: of a rank by formulas that are within 10% of what was measured on a CPU; on a GPU not measured")
    host = rank_memory(shape, True, ranks).host
    if host > 2 * 10**12:
        said.append(
            f"at its end the first process puts the whole coder together in {_tb(host)} of its machine's memory, which few "
            "machines have: make sae.d_sae smaller"
        )
    if not shape.exact:
        said.append(f"tokens: {shape.stored:,} are asked for, and the corpus has not been counted")
    if shape.autocast == "none":
        said.append(f"training.autocast bfloat16 would raise the assumed rate {low / peak:.1f} times")
    machines = math.ceil(ranks / place.gpus_per_machine)
    if place.network_gbit is not None and per_second / machines * 8 > place.network_gbit * 1e9:
        said.append(
            f"network: {per_second / machines * 8 / 1e9:,.1f} Gbit/s would be read on each of {machines} machines, of "
            f"{place.network_gbit:g}: the training waits for data, {per_second / machines * 8 / 1e9 / place.network_gbit:.1f} "
            "times as long; set storage.cache, or a larger d_sae for the same data"
        )
    if shape.activations.mode == "online":
        given, taken = extraction.tokens_per_second, training.tokens_per_second
        keeps = f"online: extraction gives {given:,.0f} tokens/s, and training takes {taken:,.0f}"
        if given < taken:
            workers = math.ceil(taken / given * place.extraction_workers)
            said.append(
                f"{keeps}: it would wait {1 - given / taken:.0%} of its time; {workers:,} extraction workers keep it busy"
            )
        else:
            said.append(f"{keeps}, which never waits")
    if reads > MOST_READS:
        said.append(
            f"shuffle: {reads:,} ranged reads, over the {MOST_READS:,} that are aimed at (an S3 prefix gives 5,500 a second): "
            f"raise activations.rows_per_shard ({shape.activations.rows_per_shard:,}), which is what a worker holds in memory"
        )
    return said


def _gb(size: float) -> str:
    return f"{size / 1e9:,.3g} GB" if size < 1e12 else _tb(size)


def _tb(size: float) -> str:
    return f"{size / 1e12:,.3g} TB"


def plain(found: Outlook) -> dict[str, Any]:
    """As JSON, with the sums that are properties."""
    tree = found.model_dump(mode="json")
    tree["memory"] |= {"step": found.memory.step, "peak": found.memory.peak, "host": found.memory.host}
    return tree
