"""Do our coders find features that are known to be there? `python benchmarks/synthetic.py --help`.

Activations are sums of true features. Some fire far more often than others, a few hidden causes make many of them fire
together, and a part of them are trees in which a child fires only with its parent and never with a sibling: what real features
are taken to be, and what plain dictionaries are known to get wrong (as in arXiv 2602.14687). All architectures read the same
batches, in lockstep. Prints one JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from components.hardware import keep_freed_memory
from components.interop.formats import given_sae
from components.sae.architectures import architectures
from components.sae.coder import Coder, Column
from components.training.beginning import begin
from components.training.job import Training
from components.training.settings import TrainingSettings
from components.training.step import CoderInTraining, new_coder, take_step

CHILDREN, CHILD_PROBABILITY = 4, 0.2
"""Of every inner node of a tree; that of each child, given its parent, where the tree decides it."""


@dataclass(frozen=True)
class World:
    """True features and how they fire. Trees are laid out as roots, then their children, then theirs; the rest stand alone."""

    d_in: int = 256
    features: int = 1_024
    trees: int = 32
    mean_l0: float = 12.0
    """Features that fire on a token, on average."""
    zipf: float = 0.5
    """The i-th feature fires with a probability in proportion to `i^-zipf`."""
    deep: bool = False
    """Trees of three levels, whose children fire with `CHILD_PROBABILITY` of their parent's: below a root it falls with every
    level, whatever Zipf's law says. Else of two levels, in which a child is as frequent as Zipf's law has some feature."""
    causes: int = 25
    """Rank of the correlation of what makes features fire."""
    cause_share: float = 0.1
    """Part of the variance of a feature's latent that the causes make."""
    offset: float = 0.5
    """Norm of the mean that every token has, over that of the rest."""
    seed: int = 1_000_000
    """Of the truth: far from those of coders, whose decoder rows would else start as the true features."""
    directions: Tensor = field(init=False)
    """Unit rows, `[features, d_in]`."""
    probability: Tensor = field(init=False)
    """With which each fires on a token, `[features]`."""
    _chances: tuple[Tensor, ...] = field(init=False)
    """Per inner level those of children, given their parents, `[nodes, CHILDREN]`, cumulative over siblings."""
    _loadings: Tensor = field(init=False)
    _cuts: Tensor = field(init=False)
    _mean: Tensor = field(init=False)
    scale: float = field(init=False)
    """What activations are multiplied by, so that the mean of `||x||^2` is `d_in`."""

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        found = torch.nn.functional.normalize(torch.randn(self.features, self.d_in, generator=generator), dim=1)
        levels = (self._deep_trees if self.deep else self._trees)(generator)
        chances = tuple(below.reshape(-1, CHILDREN) / above[:, None] for above, below in pairwise(levels[:-1]))
        probability = torch.cat(levels)
        probability *= self.mean_l0 / probability.sum()
        loadings = torch.nn.functional.normalize(torch.randn(self.features, self.causes, generator=generator), dim=1)
        mean = torch.nn.functional.normalize(torch.randn(self.d_in, generator=generator), dim=0)
        for name, value in {
            "directions": found,
            "probability": probability.float(),
            "_chances": tuple(given.cumsum(dim=1).float() for given in chances),
            "_loadings": math.sqrt(self.cause_share) * loadings,
            "_cuts": torch.special.ndtri(probability).float(),
            "_mean": mean * self.offset * math.sqrt(self.mean_l0),
            "scale": 1.0,
        }.items():
            object.__setattr__(self, name, value)
        x = self.sample(torch.Generator().manual_seed(self.seed + 1))
        object.__setattr__(self, "scale", math.sqrt(self.d_in / x.square().sum(dim=1).mean().item()))

    def _trees(self, generator: torch.Generator) -> list[Tensor]:
        """Odds of roots, of their children, and of the rest: all of Zipf's law, dealt out."""
        odds = torch.arange(1, self.features + 1, dtype=torch.float64) ** -self.zipf
        possible = (odds >= (CHILDREN + 1) * odds[-1]).nonzero().flatten()  # so frequent that others are children of it
        roots = possible[torch.randperm(len(possible), generator=generator)[: self.trees]].sort().values
        free, children = torch.ones(self.features, dtype=torch.bool).index_fill(0, roots, False), []
        for root in roots.flip(0):  # of the rarest root the fewest can be children
            rare = (free & (odds <= odds[root] / (CHILDREN + 1))).nonzero().flatten()
            children.insert(0, rare[torch.randperm(len(rare), generator=generator)[:CHILDREN]])
            free[children[0]] = False
        return [odds[roots], odds[torch.cat(children)], odds[free]]

    def _deep_trees(self, generator: torch.Generator) -> list[Tensor]:
        """The same of roots, children, grandchildren, and the rest."""
        alone = self.features - self.trees * (CHILDREN + CHILDREN**2)  # roots among them
        odds = torch.arange(1, alone + 1, dtype=torch.float64) ** -self.zipf
        odds = odds[torch.randperm(alone, generator=generator)]
        # Roots are drawn from the more frequent half, so that their grandchildren fire at all.
        frequent = odds.argsort(descending=True)[: alone // 2]
        roots = frequent[torch.randperm(len(frequent), generator=generator)[: self.trees]]
        others = torch.ones(alone, dtype=torch.bool).index_fill(0, roots, False)
        children = (CHILD_PROBABILITY * odds[roots]).repeat_interleave(CHILDREN)
        return [odds[roots], children, (CHILD_PROBABILITY * children).repeat_interleave(CHILDREN), odds[others]]

    def tokens(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Activations `[count, d_in]`, scaled, and what each true feature adds to them in that unit, `[count, features]`."""
        causes = torch.randn(count, self.causes, generator=generator)
        own = torch.randn(count, self.features, generator=generator) * math.sqrt(1 - self.cause_share)
        fires = own.addmm_(causes, self._loadings.T) < self._cuts
        start = 0
        for last in self._chances:  # one of the siblings, or none, where the parent fires
            parents = fires[:, start : start + len(last), None]
            drawn, first = torch.rand(*parents.shape, generator=generator), torch.nn.functional.pad(last, (1, 0))[:, :-1]
            start += len(last)
            fires[:, start : start + last.numel()] = (parents & (drawn >= first) & (drawn < last)).flatten(1)
        strength = fires * (1 + 0.3 * torch.randn(count, self.features, generator=generator)).clamp_min(0.1)
        strength *= self.scale
        return strength @ self.directions + self.scale * self._mean, strength

    def sample(self, generator: torch.Generator) -> Tensor:
        """16,384 activations, made in parts: of the large world, what adds to them is 1 GiB for each tensor of it."""
        part = min(16_384, 2**24 // self.features)
        return torch.cat([self.tokens(part, generator)[0] for _ in range(16_384 // part)])


_FEW_DEAD = {"auxk": 8}
"""Dead features that take part in AuxK on a token: of half of `d_in`, nearly all dead ones learn the same."""
RECIPES: dict[str, tuple[dict[str, Any], float]] = {
    "relu": ({"sparsity_coefficient": 3.0, "auxk_coefficient": 1 / 32, **_FEW_DEAD}, 4e-3),
    "gated": ({"sparsity_coefficient": 3.0}, 4e-3),
    "jumprelu": ({"sparsity_coefficient": 2.0}, 4e-3),
    "topk": (_FEW_DEAD, 2e-3),
    "batchtopk": ({"decoder_init_norm": 0.3, **_FEW_DEAD}, 2e-3),
    "matryoshka": (_FEW_DEAD, 2e-3),
}
"""Settings that are not the architecture's defaults, and the learning rate. Where there is a k, it is the true L0."""

PEERS: dict[str, dict[str, Any]] = {
    "standard": {"l1_coefficient": 3.0},
    "topk": {},
    "batchtopk": {"topk_threshold_lr": 0.1},
}
"""Of SAELens: the same, at the learning rate and batch size of ours."""


def train(world: World, names: list[str], arguments: argparse.Namespace) -> dict[str, tuple[CoderInTraining, float]]:
    """Each coder after the same tokens, and the CPU seconds that its own steps took."""
    column, members, seconds = (Column("x", world.d_in),), {}, dict.fromkeys(names, 0.0)
    for name in names:
        options, rate = RECIPES[name]
        kind = architectures()[name].Settings
        options = {"k": round(world.mean_l0)} | options if "k" in kind.model_fields else options
        options = options | {key: value for key, value in arguments.set if key in kind.model_fields}
        settings = TrainingSettings(
            tokens=arguments.tokens, batch_size=arguments.batch, learning_rate=arguments.learning_rate or rate,
            learning_rate_warmup=0.02, dead_after_tokens=arguments.dead_after,
        )  # fmt: skip
        job = Training(
            url="", digest="", identity={}, settings=settings, coder=kind(d_sae=world.features, **options), dataset_url="",
            reads=("x",), writes=("x",), seed=arguments.seed, metadata={},
        )  # fmt: skip
        members[name] = (new_coder(job, column, column, torch.device("cpu")), settings)
    generator, mean = torch.Generator().manual_seed(arguments.seed + 2), torch.zeros(world.d_in)
    first = world.sample(torch.Generator().manual_seed(arguments.seed + 4))
    for member, _ in members.values():
        begin(member.coder, arguments.seed, lambda: (first, first), (first.mean(dim=0), first.mean(dim=0)))
    for _ in range(-(-arguments.tokens // arguments.batch)):
        x, _ = world.tokens(arguments.batch, generator)
        for name, (member, settings) in members.items():
            started = time.process_time()
            take_step(member, settings, x, x, mean, measured=False)
            seconds[name] += time.process_time() - started
    return {name: (member, seconds[name]) for name, (member, _) in members.items()}


def by_saelens(world: World, name: str, arguments: argparse.Namespace) -> tuple[Coder, float]:
    """An SAE by SAELens from the same tokens, as one of ours, and the CPU seconds that it took with making them."""
    import quality_peers

    class Drawn:
        d_in = world.d_in

        def __iter__(self) -> Iterator[Tensor]:
            generator = torch.Generator().manual_seed(arguments.seed + 2)
            while True:
                yield world.tokens(arguments.batch, generator)[0]

    options = PEERS[name] if name == "standard" else {"k": round(world.mean_l0), **PEERS[name]}
    work = {
        "architecture": name, "options": options, "d_sae": world.features, "batch_size": arguments.batch, "warmup": 0.02,
        "learning_rate": arguments.learning_rate or RECIPES["relu" if name == "standard" else name][1],
    }  # fmt: skip
    torch.manual_seed(arguments.seed)
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        made = quality_peers.by_saelens(work, Drawn(), -(-arguments.tokens // arguments.batch), Path(folder) / "made")
        sae = given_sae(made, str(made)).load(torch.device("cpu"))
    assert isinstance(sae, Coder)
    return sae, time.process_time() - started


@torch.no_grad()
def measure(world: World, coder: Coder, tokens: int, seed: int) -> dict[str, Any]:
    """What of the truth a coder has found, on tokens that it was not trained on.

    `mean_max_cosine`: mean over true features of the largest cosine with a decoder row. `mcc`: the same under the best
    one-to-one assignment. `f1`: of "the assigned feature fires" against "the true one fires", mean over true features, by
    frequency quarters too. `shrinkage`: 1 - what the assigned feature writes over what the true one does, where both fire.
    """
    norms = coder.W_dec.norm(dim=1)
    cosine = world.directions @ torch.nn.functional.normalize(coder.W_dec, dim=1).T
    best = cosine.amax(dim=1)
    # In place, as that copies to float64: 2 GiB of the large world.
    truth, found = (torch.from_numpy(side) for side in linear_sum_assignment(cosine.neg_().numpy()))
    assigned = torch.empty(world.features, dtype=torch.long).index_copy_(0, truth, found)
    generator = torch.Generator().manual_seed(seed)
    both, ours, theirs, written, added = torch.zeros(5, world.features, dtype=torch.float64)
    fired = torch.zeros(coder.d_sae, dtype=torch.long)
    errors, total, square, active, left = 0.0, torch.zeros(world.d_in, dtype=torch.float64), 0.0, 0, tokens
    while left > 0:
        count = min(left, 2**22 // world.features)
        x, strength = world.tokens(count, generator)
        features, y = coder.reconstruct(x)
        values = features.dense()
        fired += features.fired()
        active += int(features.active().sum())
        errors += (x - y).double().square().sum().item()
        total += x.double().sum(dim=0)
        square += x.double().square().sum().item()
        mine = values[:, assigned] * norms[assigned]
        on, true = mine > 0, strength > 0
        both += (on & true).sum(dim=0)
        ours += on.sum(dim=0)
        theirs += true.sum(dim=0)
        written += (mine * true).sum(dim=0)
        added += (strength * on).sum(dim=0)
        left -= count
    f1 = 2 * both / (ours + theirs).clamp_min(1)
    quarters = world.probability.argsort(descending=True).chunk(4)
    hit = f1 > 0.5
    return {
        "mean_max_cosine": best.mean().item(),
        "mean_max_cosine_by_frequency": [round(best[part].mean().item(), 3) for part in quarters],
        "mean_max_cosine_weighted": ((best * world.probability).sum() / world.probability.sum()).item(),
        "mcc": -cosine[truth, found].mean().item(),
        "f1": f1.mean().item(),
        "f1_by_frequency": [round(f1[part].mean().item(), 3) for part in quarters],
        "shrinkage": (1 - written[hit].sum() / added[hit].sum()).item() if bool(hit.any()) else None,
        "dead_fraction": (fired == 0).double().mean().item(),
        "l0": active / tokens,
        "explained_variance": 1 - errors / (square - total.square().sum().item() / tokens),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("architectures", nargs="*", default=[])
    parser.add_argument("--large", action="store_true", help="16,384 features in 768 dimensions, L0 34: slow")
    parser.add_argument("--deep", action="store_true", help="trees of three levels, at the end of which features are rare")
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--measured", type=int, default=50_000, help="tokens, of those that nothing was trained on")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--peers", type=Path, help="folder that pip has installed SAELens in: its own on the same data, too")
    parser.add_argument("--dead-after", type=int, default=10_000, help="tokens without firing after which a feature is dead")
    parser.add_argument("--set", action="append", default=[], type=setting, metavar="FIELD=JSON")
    arguments = parser.parse_args()
    keep_freed_memory()
    size = {"d_in": 768, "features": 16_384, "trees": 128, "mean_l0": 34.0} if arguments.large else {}
    world = World(**(size | ({"deep": True, "trees": 128 if arguments.large else 16} if arguments.deep else {})))
    names = arguments.architectures or list(RECIPES)
    for name, (trained, seconds) in train(world, names, arguments).items():
        show(name, measure(world, trained.coder, arguments.measured, seed=arguments.seed + 3), seconds)
    if arguments.peers:
        sys.path.append(str(arguments.peers))
        for name in PEERS:
            if ("relu" if name == "standard" else name) in names:
                coder, seconds = by_saelens(world, name, arguments)
                show(f"saelens {name}", measure(world, coder, arguments.measured, seed=arguments.seed + 3), seconds)


def show(name: str, found: dict[str, Any], seconds: float) -> None:
    shown = {key: round(value, 4) if isinstance(value, float) else value for key, value in found.items()}
    print(json.dumps({"architecture": name, **shown, "cpu_seconds": round(seconds, 1)}), flush=True)


def setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, json.loads(value)


if __name__ == "__main__":
    main()
