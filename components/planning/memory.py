"""Memory of one rank of a training, part by part: of its features alone, where they are sharded over ranks.

A training is largest at one of three moments: in a step; at a checkpoint, for which weights and moments are copied before they
are written; and at its end, where the coder is folded in float64. On a CPU all three are in one memory, which holds the process
and the reader's windows as well; with a GPU only the step is on the device.
"""

from __future__ import annotations

from components.planning.shape import Shape
from components.settings import Record

PROCESS = 336_000_000
"""Bytes of a process that trains, without a coder (measured: Python 3.11, torch 2.13 for CPUs)."""
GROUP = 30_000_000
"""More in each of several that exchange tensors (measured: gloo)."""
CONTEXT = 800_000_000
"""Bytes that CUDA's context and libraries take on a GPU before any tensor (assumed)."""
TILE_ENTRIES = 1 << 24
"""Of the sparse paths' tiles, see `components.sae.kernels.cpu`."""
TILES = 1.4
"""Alive at once (measured)."""
AUXK_COPIES = 2.4
"""Tensors `[batch, dead features]` of AuxK (measured)."""
SPARSE = ("topk", "batchtopk", "matryoshka")
"""That compute few features of a token where they run on a CPU."""
DENSE_COPIES = {"relu": 7.5, "jumprelu": 19.0, "gated": 15.0, "topk": 6.0, "batchtopk": 7.0, "matryoshka": 7.0}
"""Tensors `[batch, features]` of 4 bytes that are alive at once in a step, where nothing is sparse (measured on a CPU; of the
last three estimated, as nothing of this has run on a GPU)."""
ENTRY = 60
"""Bytes for each chosen feature of a token on the sparse paths: values, places, their order, gradients."""


class Memory(Record):
    """Bytes of one rank."""

    on_gpu: bool
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    """Of a step: features and their gradients, and what is read and written."""
    tiles: int
    """What the sparse paths hold besides: tiles of products, and the encoder as they want it."""
    auxk: int
    """More in a step where every feature is dead and learns by AuxK; what is computed sparsely is dense for those."""
    checkpoint: int
    """A copy of weights and moments, on their way to the disk."""
    artifact: int
    """The coder in float64 and what is written of it, at the end; of several ranks, of the first, that folds the whole."""
    reader: int
    process: int

    @property
    def step(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.tiles

    @property
    def host(self) -> int:
        """In the machine's memory, beside a GPU."""
        return self.process + self.reader + max(self.checkpoint, self.artifact)

    @property
    def peak(self) -> int:
        """Of the device: the GPU's memory, or the machine's."""
        if self.on_gpu:
            return CONTEXT + self.step
        kept = self.parameters + self.optimizer
        # what a step has freed stays with the process
        return self.process + self.reader + max(self.step, kept + self.tiles + max(self.checkpoint, self.artifact))


def rank_memory(shape: Shape, on_gpu: bool, ranks: int = 1) -> Memory:
    """Of a rank that has its share of the features, and its share of each batch where several share those."""
    whole = -(-shape.batch_size // shape.data_parallel)
    batch = -(-whole // shape.gradient_accumulation_steps)
    n = -(-shape.d_sae // ranks)
    own = (shape.d_in + shape.d_out + 1) * n + shape.shared
    sparse = shape.architecture in SPARSE and not on_gpu
    # of what is read and written the whole batch is there, of what is computed from it a micro-batch
    tokens = 4 * (whole * (shape.d_in + shape.d_out) + batch * (shape.d_in + 3 * shape.d_out))
    if sparse:
        features = ENTRY * batch * min(shape.k or 0, n)
        # the encoder beside its bias, as one operand; a tile of products
        tiles = 4 * n * (shape.d_in + 16) + int(4 * TILES * min(TILE_ENTRIES, batch * n))
    else:
        features = int(4 * batch * n * DENSE_COPIES.get(shape.architecture, 10.0))
        tiles = 0
    return Memory(
        on_gpu=on_gpu,
        parameters=4 * own,
        gradients=4 * own,
        optimizer=8 * own,
        activations=tokens + features,
        tiles=tiles,
        auxk=int(4 * AUXK_COPIES * batch * n) if sparse else 0,
        checkpoint=12 * own,
        # the first rank reads the last checkpoint of all, and folds the whole
        artifact=24 * own if ranks == 1 else 48 * shape.coder_parameters,
        reader=shape.reader,
        process=PROCESS + GROUP * (ranks > 1),
    )
