"""What a trainer and the engine that drew the tokens make of the same tokens: measures of the gap, and corrections for it.

Legend: T tokens of one micro-batch; N sequences of one update; d_t = log pi_trainer(o_t) - log pi_rollout(o_t), in nats, of tokens that the
rollout drew, the trainer having the weights that the rollout was drawn for.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from r1mega.config.training import Mismatch

_LOWEST, _HIGHEST, _PER_OCTAVE = -24, 8, 32
_BINS = (_HIGHEST - _LOWEST) * _PER_OCTAVE + 2
_SUMS = 5
"""Tokens, d, |d|, exp d, exp d - 1 - d."""
_QUANTILES = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}


@dataclass(frozen=True)
class Gap:
    """The gap over some tokens of an update, as numbers that can be put together over micro-batches and ranks.

    Percentiles come from a histogram of |d| in log-space, 32 bins to the octave from 2^-24 to 2^8: a percentile is the upper edge of its
    bin, at most 2.2 % above the true value and never below it; below 2^-24, where float32 itself ends, it reads 0. All else is exact.
    """

    added: Tensor
    """float64 [5 + bins + 3 N], to be added up: sums over tokens, the histogram, then tokens, sum of d and sum of |d| of every sequence."""
    highest: Tensor
    """float64 [2], of which the largest is to be kept: d and -d."""

    @classmethod
    def nothing(cls, sequences: int, device: torch.device | None = None) -> "Gap":
        """The gap over no tokens, of an update of `sequences` sequences."""
        added = torch.zeros(_SUMS + _BINS + 3 * sequences, dtype=torch.float64, device=device)
        return cls(added, torch.full((2,), -math.inf, dtype=torch.float64, device=device))

    @classmethod
    def of(cls, trainer: Tensor, rollout: Tensor, mask: Tensor, owners: Tensor, sequences: int) -> "Gap":
        """The gap of one micro-batch.

        Args:
            trainer, rollout: [T] log-probs of the drawn tokens; any finite values outside the mask.
            mask: bool [T], tokens that count.
            owners: int64 [T], for each token its sequence, of `sequences`.
        """
        found = cls.nothing(sequences, trainer.device)
        d, owner = (trainer - rollout)[mask].double(), owners[mask]
        if not len(d):
            return found
        sums, histogram, rows = found.added.split((_SUMS, _BINS, 3 * sequences))
        sums.copy_(torch.stack([torch.ones_like(d), d, d.abs(), d.exp(), torch.expm1(d) - d]).sum(dim=1))
        histogram.add_(torch.bincount(_bins(d.abs()), minlength=_BINS))
        rows.view(sequences, 3).index_add_(0, owner, torch.stack([torch.ones_like(d), d, d.abs()], dim=1))
        return cls(found.added, torch.stack([d.max(), -d.min()]))

    def __add__(self, other: "Gap") -> "Gap":
        """Both together; of the same update."""
        return Gap(self.added + other.added, torch.maximum(self.highest, other.highest))

    @staticmethod
    def joined(parts: Sequence["Gap"]) -> "Gap":
        """The gap of several updates together, the sequences of one after those of the other."""
        cut = _SUMS + _BINS
        tokens, rows = torch.stack([part.added[:cut] for part in parts]).sum(dim=0), [part.added[cut:] for part in parts]
        return Gap(torch.cat([tokens, *rows]), torch.stack([part.highest for part in parts]).amax(dim=0))

    @property
    def sequences(self) -> Tensor:
        """float64 [N, 3]: of each sequence its tokens, sum of d, and sum of |d|."""
        return self.added[_SUMS + _BINS :].view(-1, 3)

    def measures(self) -> dict[str, float]:
        """What there is to say of the gap, by the names of a metrics row; nothing of no tokens.

        - `rollout_gap/*`: |d|, its mean, maximum and percentiles
        - `rollout_ratio/*`: exp d, the token-level ratio pi_trainer / pi_rollout, whose mean is 1 where the rollout drew what it says
        - `rollout_kl/k1`, `/k3`: estimates of KL(pi_rollout || pi_trainer), the means of -d and of exp d - 1 - d (Schulman,
          "Approximating KL divergence", 2020); both unbiased, k3 never negative
        - `rollout_sequence/*`: the sum of d over a sequence, its log ratio
        """
        tokens, d, absolute, ratio, k3 = self.added[:_SUMS].tolist()
        if not tokens:
            return {}
        above, below = self.highest.tolist()
        largest = max(above, below)
        rows = self.sequences[self.sequences[:, 0] > 0]
        return {
            "rollout_gap/mean": absolute / tokens,
            "rollout_gap/max": largest,
            **{f"rollout_gap/{name}": min(self._quantile(share), largest) for name, share in _QUANTILES.items()},
            "rollout_ratio/mean": ratio / tokens,
            "rollout_ratio/min": math.exp(min(-below, 700.0)),
            "rollout_ratio/max": math.exp(min(above, 700.0)),
            "rollout_kl/k1": -d / tokens,
            "rollout_kl/k3": k3 / tokens,
            "rollout_sequence/mean": rows[:, 1].mean().item(),
            "rollout_sequence/min": rows[:, 1].min().item(),
            "rollout_sequence/max": rows[:, 1].max().item(),
        }

    def _quantile(self, share: float) -> float:
        counts = self.added[_SUMS : _SUMS + _BINS].cumsum(0)
        place = int(torch.searchsorted(counts, counts[-1] * share))
        return 0.0 if place == 0 else 2.0 ** (_LOWEST + place / _PER_OCTAVE) if place < _BINS - 1 else math.inf


def _bins(gaps: Tensor) -> Tensor:
    """The bin of each gap: 0 below the lowest edge, the last from the highest on."""
    places = (gaps.log2() - _LOWEST) * _PER_OCTAVE
    return (places.floor() + 1).clamp(0, _BINS - 1).long()


def importance_weights(log_ratio: Tensor, mismatch: Mismatch) -> Tensor:
    """Weights [T] of the policy's loss that make up for tokens drawn by another distribution; `log_ratio` [T] is d, without gradient.

    With r = exp d, and C, C_min, C_max from `mismatch`:

    - "tis": min(r, C), truncated importance sampling (Ionides 2008; for this gap Yao et al., "Your efficient RL framework secretly brings
      you off-policy RL training", 2025)
    - "icepop": r where C_min <= r <= C_max, else 0 (Ling Team, "Every step evolves", arXiv 2510.18855; elsewhere masked importance
      sampling, MIS)
    - "none": 1
    """
    ratio = log_ratio.exp()
    if mismatch.weights == "tis":
        return ratio.clamp(max=mismatch.cap)
    if mismatch.weights == "icepop":
        return torch.where((ratio >= mismatch.low) & (ratio <= mismatch.high), ratio, 0.0)
    return torch.ones_like(ratio)


def off_policy_sequences(
    log_ratio: Tensor,
    advantages: Tensor,
    mask: Tensor,
    owners: Tensor,
    sequences: int,
    delta: float,
    add_up: Callable[[Tensor], Tensor] = lambda parts: parts,
) -> Tensor:
    """Bool [T], tokens whose policy loss is left out: those of bad answers that the policy has moved away from (DeepSeek-V3.2,
    arXiv 2512.02556, section 3.1).

    A sequence is left out where its advantage is negative and (1 / |o|) sum_t log(pi_old(o_t) / pi(o_t)) > delta. pi_old is the
    distribution that the tokens were drawn from, so the updates since and the gap between engine and trainer count alike.

    Args:
        log_ratio: [T] log pi - log pi_old, without gradient.
        advantages: [T], the same for all tokens of a sequence.
        mask: bool [T], tokens that are trained on.
        owners: int64 [T], for each token its sequence, of `sequences`.
        delta: in nats a token.
        add_up: adds up float64 [sequences, 2] over the ranks that sequences are cut over (context parallelism).
    """
    ratios = torch.where(mask, log_ratio, 0.0).double()
    rows = ratios.new_zeros(sequences, 2).index_add_(0, owners, torch.stack([ratios, mask.double()], dim=1))
    drift, length = add_up(rows).unbind(dim=1)
    return mask & (advantages < 0) & ((-drift / length.clamp(min=1))[owners] > delta)
