"""Which prompts a rollout asks, when there are several kinds of them."""

from collections.abc import Mapping
from functools import lru_cache

import torch

from r1mega.config.base import Schedule, at


class Mixture:
    """Prompts drawn from several sets by their shares, each set in epochs of random order.

    What is drawn is a function of the seed and of the draws before: a run that goes on draws (and forgets) what it has drawn already.
    Shares are kept by smooth weighted round robin, so any stretch of prompts has them as nearly as whole prompts allow, a small
    share included.
    """

    def __init__(self, sizes: Mapping[str, int], shares: Mapping[str, Schedule], seed: int) -> None:
        self._sizes, self._shares, self._seed = dict(sizes), dict(shares), seed
        self._credit = dict.fromkeys(sizes, 0.0)
        self._drawn = dict.fromkeys(sizes, 0)

    def draw(self, count: int, update: int) -> list[tuple[str, int]]:
        """The next prompts by the shares of an update: (name of the set, place in it). ValueError where all shares are 0."""
        shares = {name: at(share, update) for name, share in self._shares.items()}
        total = sum(shares.values())
        if total <= 0:
            raise ValueError(f"every set of prompts has the share 0 at update {update}")
        chosen = []
        for _ in range(count):
            for name, share in shares.items():
                self._credit[name] += share / total
            # A set whose share has become 0 may be owed something from before.
            name = max((name for name in shares if shares[name] > 0), key=self._credit.__getitem__)
            self._credit[name] -= 1.0
            epoch, index = divmod(self._drawn[name], self._sizes[name])
            chosen.append((name, shuffled(self._sizes[name], self._seed, epoch)[index]))
            self._drawn[name] += 1
        return chosen


@lru_cache(maxsize=8)
def shuffled(size: int, seed: int, epoch: int) -> list[int]:
    """A permutation of `size` places, a function of the seed and the epoch."""
    order: list[int] = torch.randperm(size, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
    return order
