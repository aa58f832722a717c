"""Which source gives the next document, and how many of its tokens are taken.

Every source has a quota in each split: its share of the split's budget. The next document comes from the source that is
furthest behind its share, so that the shares hold in any stretch of a split and not only in the whole. Where a source ends,
what it leaves open is divided among the others in the proportion of their shares. A document that meets a full quota is
passed over and does not come back, not even when the quota grows later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import ceil


class Quotas:
    """Counts of tokens by source and split. The shares are exact to a token for each source as long as none ends, and a
    budget is never exceeded."""

    def __init__(self, shares: Sequence[float], budgets: Mapping[str, int]) -> None:
        self.shares = list(shares)
        self.budgets = dict(budgets)
        self.tokens = [dict.fromkeys(budgets, 0) for _ in shares]
        self.documents = [dict.fromkeys(budgets, 0) for _ in shares]
        self.ended = [False] * len(shares)
        self._total = dict.fromkeys(budgets, 0)
        self._quota = [dict.fromkeys(budgets, 0) for _ in shares]
        self._divide()

    def room(self, source: int, split: str) -> int:
        """Tokens that the source may still give to the split."""
        quota = self._quota[source][split] - self.tokens[source][split]
        return max(0, min(quota, self.budgets[split] - self._total[split]))

    def next_source(self) -> int | None:
        """The source to read from, None where every budget is reached or every source has ended."""
        behind = [
            (sum(self.tokens[source].values()) / self.shares[source], source)
            for source in range(len(self.shares))
            if any(self.room(source, split) for split in self.budgets)
        ]
        return min(behind)[1] if behind else None

    def take(self, source: int, split: str, tokens: int) -> None:
        self.tokens[source][split] += tokens
        self.documents[source][split] += 1
        self._total[split] += tokens

    def end(self, source: int) -> None:
        """The source has no more documents: what it leaves open goes to the others."""
        self.ended[source] = True
        self._divide()

    def _divide(self) -> None:
        remaining = [source for source, ended in enumerate(self.ended) if not ended]
        # Exact, so that a quota never shrinks below what was taken by a rounding.
        shares = sum((Fraction(self.shares[source]) for source in remaining), Fraction(0))
        for split, budget in self.budgets.items():
            left = budget - sum(self.tokens[source][split] for source, ended in enumerate(self.ended) if ended)
            for source, ended in enumerate(self.ended):
                quota = self.tokens[source][split] if ended else ceil(left * Fraction(self.shares[source]) / shares)
                self._quota[source][split] = quota
