"""A run at internet scale, planned and played: `python benchmarks/simulate.py [--tokens 1e11 --workers 1000 --ranks 64 ...]`.

What is planned is planned by the project's own code: the shape and its requests, the shuffle, the shares of a flow's tasks and
how often they are tried again, the order in which a worker goes through merged files, the manifest's entries, checkpoints, and
how often a flow run may be started. Clocks, machines and the store are simulated: machines are lost at a rate and come back;
the store gives so many requests and bytes a second. It says how long each phase takes, what is wasted, and what breaks first.
"""

from __future__ import annotations

import argparse
import heapq
import random
from dataclasses import dataclass, field

from components.activations.dataset.manifest import RowGroup, Shard
from components.planning.memory import rank_memory
from components.planning.place import ModelOnPaper, Place
from components.planning.plan import plan, ranks_needed
from components.planning.requests import chunks_of, requests, shards_of, shuffle_of
from components.planning.shape import Shape, shape_on_paper
from components.run.config import parse_config
from components.settings import UserError
from flows.mapping import RETRIED, shares
from flows.runs import STARTS

LARGEST_OBJECT = 5 * 10**12
PARTS, PART = 10_000, 50 * 2**20
"""Of an object on S3, and of a multipart upload by s3fs."""
LATENCY = 0.03
"""Seconds of a request."""
AT_ONCE = 16
"""Ranged reads that a worker has under way."""
ATTEMPTS = 1 + int(RETRIED["retries"])


@dataclass
class World:
    loss_per_hour: float
    """Of one machine."""
    replaced_seconds: float
    gets: float
    puts: float
    """Requests per second that the store gives to one prefix."""
    bandwidth: float
    """Bytes per second of one machine."""
    random: random.Random = field(default_factory=lambda: random.Random(0))
    breaks: list[tuple[float, str]] = field(default_factory=list)
    """Hour, and what."""

    def lost_after(self) -> float:
        """Seconds until a machine is lost."""
        return self.random.expovariate(self.loss_per_hour / 3600) if self.loss_per_hour > 0 else float("inf")


@dataclass(frozen=True)
class Phase:
    name: str
    hours: float
    losses: int
    wasted: float
    """Share of the work that was done for nothing."""
    starts: int = 1


def scatter(shape: Shape, world: World, workers: int, tokens_per_second: float) -> Phase:
    """Each task goes through the chunks of its share; a lost machine takes the chunk that it was at along, and the task is
    tried again elsewhere. A task that was lost too often fails, and the flow with it, once all have ended."""
    seconds = shape.activations.sequences_per_chunk * shape.context_length / tokens_per_second
    left = {number: len(share) for number, share in enumerate(shares(chunks_of(shape), workers))}
    now, losses, repeated, done, starts = 0.0, 0, 0.0, 0.0, 0
    while left and starts < STARTS:
        starts += 1
        ends = [now]
        for worker, chunks in list(left.items()):
            at, attempts, lost = now, 1, world.lost_after()
            while chunks:
                if lost < seconds:
                    losses, repeated = losses + 1, repeated + lost
                    at += lost + world.replaced_seconds
                    attempts, lost = attempts + 1, world.lost_after()
                    if attempts > ATTEMPTS:
                        break
                    at += float(RETRIED["retry_delay_seconds"])
                    continue
                whole = chunks if lost == float("inf") else min(chunks, int(lost // seconds))
                at, lost, chunks, done = at + whole * seconds, lost - whole * seconds, chunks - whole, done + whole * seconds
            left[worker] = chunks
            ends.append(at)
        left = {worker: chunks for worker, chunks in left.items() if chunks}
        now = max(ends)
    if left:
        world.breaks.append((now / 3600, f"scatter: {len(left)} tasks were lost {ATTEMPTS} times in each of {STARTS} starts"))
    return Phase("scatter", now / 3600, losses, repeated / max(done, 1.0), starts)


def merge(shape: Shape, world: World, workers: int) -> Phase:
    """Every worker goes through all merged files in an order of its own, passes over those that are there, and merges the
    others; two that meet at one file do the same work. (Parts of a file that are merged first are counted with it.)"""
    shuffle = shuffle_of(shape)
    files = shuffle.files(shuffle.levels)
    if not shuffle.levels:
        return Phase("merge", 0.0, 0, 0.0)
    size = shape.bytes / files
    seconds = shuffle.levels * 2 * size / world.bandwidth
    largest = min(LARGEST_OBJECT, PARTS * PART)
    if shuffle.largest > largest:
        world.breaks.append(
            (0.0, f"merge: a merged file of {shuffle.largest / 1e12:.3g} TB; an upload holds {largest / 1e12:.3g} TB")
        )
    there, begun, losses = set[int](), 0, 0
    orders = [iter(world.random.sample(range(files), files)) for _ in range(workers)]
    events = [(0.0, worker, -1) for worker in range(workers)]
    heapq.heapify(events)
    now = 0.0
    while events:
        now, worker, ended = heapq.heappop(events)
        if ended >= 0:
            there.add(ended)
        if (following := next((index for index in orders[worker] if index not in there), None)) is None:
            continue
        begun, lost = begun + 1, world.lost_after()
        if lost < seconds:  # another machine takes the task up; the file is another's or its own, later
            losses += 1
            orders[worker] = iter([following, *orders[worker]])
            heapq.heappush(events, (now + lost + world.replaced_seconds, worker, -1))
        else:
            heapq.heappush(events, (now + seconds, worker, following))
    return Phase("merge", now / 3600, losses, (begun - files) / begun)


def shuffle_shards(shape: Shape, world: World, workers: int) -> Phase:
    """Each task reads the parts of its shards from every merged file, and writes the shards."""
    shuffle, shards = shuffle_of(shape), shards_of(shape)
    parts = shuffle.files(shuffle.levels)
    size = shape.bytes / shards
    seconds = 2 * size / world.bandwidth + parts * LATENCY / AT_ONCE
    asked = workers * parts / seconds
    slowed = max(1.0, asked / world.gets)
    if slowed > 1:
        world.breaks.append((0.0, f"shuffle: {asked:,.0f} reads/s are asked for, and one prefix gives {world.gets:,.0f}"))
    longest, losses, repeated, starts = 0.0, 0, 0.0, 1
    for share in shares(shards, workers):
        at, lost, attempts = 0.0, world.lost_after(), 1
        left, each = len(share), seconds * slowed
        while left:
            whole = left if lost == float("inf") else min(left, int(lost // each))
            at, lost, left = at + whole * each, lost - whole * each, left - whole
            if left:
                losses, repeated, attempts = losses + 1, repeated + lost, attempts + 1
                at, lost = at + lost + world.replaced_seconds, world.lost_after()
        starts = max(starts, -(-attempts // ATTEMPTS))
        longest = max(longest, at)
    if starts > STARTS:
        world.breaks.append((longest / 3600, f"shuffle: its flow would be started {starts} times, of {STARTS}"))
    return Phase("shuffle", longest / 3600, losses, repeated / (shards * seconds * slowed), starts)


def commit(shape: Shape, world: World) -> Phase:
    """One process reads the record of every shard, one after the other, and puts all of them into one manifest."""
    shards = shards_of(shape)
    manifest = shards * entry_bytes(shape)
    if manifest > 2 * 10**9:
        world.breaks.append(
            (
                0.0,
                f"manifest: {manifest / 1e9:.3g} GB of JSON that every reader parses, {shards:,} shards; raise rows_per_shard",
            )
        )
    return Phase("commit", (shards * LATENCY + manifest / world.bandwidth) / 3600, 0, 0.0)


def entry_bytes(shape: Shape) -> int:
    """Of a shard in the manifest."""
    settings = shape.activations
    group = RowGroup(offset=10**9, bytes=10**8, xxh3="0123456789abcdef")
    groups = -(-settings.rows_per_shard // settings.rows_per_group)
    columns = dict.fromkeys(shape.layout.column_bytes, (group,) * groups)
    known = {"name": "shard-00000.parquet", "rows": settings.rows_per_shard, "bytes": 10**9, "groups": columns}
    return len(Shard.model_construct(**known).model_dump_json()) + 80  # its checksum and what else it says


def train(shape: Shape, world: World, ranks: int, gpus_per_machine: int, tokens_per_second: float) -> Phase:
    """All ranks stop where one is lost, and go on from the last whole checkpoint; a save waits for the one before it."""
    machines = -(-ranks // gpus_per_machine)
    between = shape.checkpoint_tokens / tokens_per_second
    state = rank_memory(shape, True, ranks).checkpoint * gpus_per_machine
    write = state / world.bandwidth
    if write > between:
        world.breaks.append(
            (
                0.0,
                f"checkpoints: {state / 1e9:,.3g} GB of a machine take {write:,.0f} s, and one is due every {between:,.0f} s",
            )
        )
        between = write
    read = requests(shape, ranks).trained_bytes / (shape.trained / tokens_per_second) / machines
    slowed = max(1.0, read / world.bandwidth)
    if slowed > 1:
        world.breaks.append((0.0, f"training: waits for data, {read / 1e9:.3g} GB/s a machine are more than its network gives"))
    left, now, losses, repeated = shape.trained / tokens_per_second * slowed, 0.0, 0, 0.0
    whole = left
    while left > 0:
        lost = min((world.lost_after() for _ in range(machines)), default=float("inf"))
        if lost >= left:
            now, left = now + left, 0.0
            break
        kept = max(0.0, (lost - write) // between * between)
        losses, repeated = losses + 1, repeated + lost - kept
        now, left = now + lost + world.replaced_seconds, left - kept
        if losses >= ATTEMPTS * STARTS:
            world.breaks.append(
                (now / 3600, f"training: {losses} losses are all that {STARTS} starts of {ATTEMPTS} attempts each bear")
            )
            break
    return Phase("train", now / 3600, losses, repeated / whole, -(-(losses + 1) // ATTEMPTS))


def simulate(shape: Shape, place: Place, world: World, ranks: int) -> list[Phase]:
    rate = place.flops("bfloat16")
    worker = rate / (2 * shape.parameters * shape.depth)  # tokens per second
    phases = [scatter(shape, world, place.extraction_workers, worker)]
    phases += [merge(shape, world, place.extraction_workers), shuffle_shards(shape, world, place.extraction_workers)]
    phases.append(commit(shape, world))
    needed = ranks_needed(shape, place)
    if ranks < needed:
        world.breaks.append((0.0, f"training: {ranks} ranks do not hold the coder; {needed} do"))
    per_token = shape.training_flops / shape.trained
    trained = place.flops(shape.autocast) * ranks / per_token
    phases.append(train(shape, world, ranks, place.gpus_per_machine, trained))
    before, late = 0.0, []
    for phase in phases:  # hours count from the start of the run
        late += [(before + at, text) for at, text in world.breaks if text.startswith(_PREFIX[phase.name])]
        before += phase.hours
    world.breaks = sorted(late)
    return phases


_PREFIX = {
    "scatter": ("scatter",), "merge": ("merge",), "shuffle": ("shuffle",), "commit": ("manifest",),
    "train": ("training", "checkpoints"),
}  # fmt: skip


def shape_for(tokens: int, features: int, chunk: int, shard: int, checkpoint: int) -> Shape:
    tree = {
        "name": "internet",
        "corpus": {"source": "files", "paths": ["s3://corpus/*.parquet"], "train_tokens": tokens, "context_length": 2048},
        "language_model": {"name": "an-8b", "dtype": "bfloat16"},
        "activations": {"hook_points": ["resid_post.16"], "sequences_per_chunk": chunk, "rows_per_shard": shard},
        "sae": {"architecture": "batchtopk", "d_sae": features, "k": 64},
        "training": {
            "tokens": tokens, "batch_size": 16_384, "autocast": "bfloat16", "checkpoint_tokens": checkpoint,
        },
    }  # fmt: skip
    return shape_on_paper(parse_config(tree), ModelOnPaper(parameters=8 * 10**9, layers=32, width=4096))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, text in (
        ("tokens", 1e11, "tokens, extracted once and trained on once"),
        ("workers", 1_000, "of the extraction, a GPU each"),
        ("ranks", 64, "of the training"),
        ("features", 1_048_576, "of the coder"),
        ("chunk", 256, "activations.sequences_per_chunk"),
        ("shard", 131_072, "activations.rows_per_shard"),
        ("checkpoint", 500_000, "training.checkpoint_tokens"),
        ("loss", 1e-3, "machines lost per machine and hour"),
        ("replaced", 600, "seconds until a lost machine has another in its place"),
        ("gets", 5_500, "reading requests per second of one prefix"),
        ("puts", 3_500, "writing requests per second of one prefix"),
        ("gbit", 100, "network of a machine"),
    ):
        parser.add_argument(f"--{name}", type=float, default=default, help=f"{text} ({default:g})")
    given = parser.parse_args()
    sizes = (int(number) for number in (given.tokens, given.features, given.chunk, given.shard, given.checkpoint))
    shape = shape_for(*sizes)
    place = Place(
        extraction_workers=int(given.workers), gpu_hour=2.5, gb_month=0.023, put_1000=0.005, get_1000=0.0004,
    )  # fmt: skip
    world = World(given.loss, given.replaced, given.gets, given.puts, given.gbit / 8 * 1e9)
    try:
        found = plan(shape, place.model_copy(update={"ranks": int(given.ranks)}))
        print(f"planned: {shape.bytes / 1e12:,.0f} TB, {found.shards:,} shards, {found.merges} levels of merging,", end=" ")
        print(f"{found.requests.puts:,} writing and {found.requests.gets:,} reading requests, cost {found.stored_cost}")
    except UserError as error:
        print(f"refused by the plan: {error}")
    phases = simulate(shape, place, world, int(given.ranks))
    print("\n| phase | hours | machines lost | done for nothing | starts of the flow |\n|---|---|---|---|---|")
    for phase in phases:
        print(f"| {phase.name} | {phase.hours:,.1f} | {phase.losses:,} | {phase.wasted:.1%} | {phase.starts} |")
    print("\nbreaks, earliest first:" if world.breaks else "\nnothing breaks")
    for at, text in world.breaks:
        print(f"  hour {at:,.1f}: {text}")


if __name__ == "__main__":
    main()
