"""What an object store is asked for: objects, bytes and requests, by the plan of the shuffle that an extraction follows."""

from __future__ import annotations

from components.activations.dataset.shuffle import ShufflePlan, plan_shuffle
from components.planning.shape import Shape
from components.settings import Record

_PART = 50 * 2**20
"""s3fs uploads larger files in parts of so many bytes."""


class Requests(Record):
    puts: int
    """Writing requests of the extraction, parts of multipart uploads included."""
    gets: int
    """Reading ones: of the shuffle, of each chunk that is looked for, and of tokens."""
    trained_gets: int
    """Of the training, all ranks together: a rank reads every row group of every column that it needs."""
    trained_bytes: int
    objects: int
    """That stay."""
    peak_bytes: int
    """Scattered chunks and finished shards stand side by side until the commit."""


def shuffle_of(shape: Shape) -> ShufflePlan:
    """As `Extraction.shuffle`, of a dataset that there is not yet."""
    settings = shape.activations
    rows = settings.sequences_per_chunk * shape.context_length
    return plan_shuffle(chunks_of(shape), shards_of(shape), rows * shape.layout.row_bytes)


def chunks_of(shape: Shape) -> int:
    return -(-shape.sequences // shape.activations.sequences_per_chunk)


def shards_of(shape: Shape) -> int:
    return max(1, round(shape.stored / shape.activations.rows_per_shard))


def requests(shape: Shape, ranks: int = 1, passes: float | None = None) -> Requests:
    """passes: over the dataset, in training; those of the configuration where it is not given."""
    plan, chunks, shards = shuffle_of(shape), chunks_of(shape), shards_of(shape)
    chunk_bytes = shape.bytes // chunks
    shard_bytes = shape.bytes // shards
    puts = chunks * _puts(chunk_bytes)
    for level in range(1, plan.levels + 1):
        puts += plan.files(level) * _puts(min(chunks, plan.width**level) * chunk_bytes)
    puts += shards * (_puts(shard_bytes) + 1) + 1  # each with its record, and the manifest
    groups = shards * -(-min(shape.activations.rows_per_shard, shape.stored) // shape.activations.rows_per_group)
    passes = shape.trained / shape.stored if passes is None else passes
    columns = max(1, round((shape.d_in + (shape.d_out if shape.d_out != shape.d_in else 0)) / max(shape.widths.values())))
    read = shape.layout.column_bytes
    width = max(read[name] for name in shape.widths)
    return Requests(
        puts=puts,
        gets=plan.reads + 3 * chunks + 2 * shards,
        trained_gets=int(groups * columns * passes * ranks),
        trained_bytes=int(shape.trained * columns * width * ranks),
        objects=shards + 1,
        peak_bytes=2 * shape.bytes + plan.largest,
    )


def _puts(size: int) -> int:
    """Requests by which a file is uploaded."""
    return 1 if size < 2 * _PART else -(-size // _PART) + 2
