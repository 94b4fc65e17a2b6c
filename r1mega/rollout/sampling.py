"""Which token comes next: random numbers that depend on a request's seed and position alone, and the draw itself."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from r1mega.rollout.engine import SamplingParams

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators")."""
    x = (x ^ (x >> np.uint64(30))) * _M1
    x = (x ^ (x >> np.uint64(27))) * _M2
    return x ^ (x >> np.uint64(31))


def uniforms(seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), element by element from seed and position: the SplitMix64 stream that starts at the mixed seed."""
    state = _mix(seeds + _GOLDEN) + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN
    return (_mix(state) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw(logits: Tensor, uniform: Tensor, sampling: SamplingParams) -> tuple[Tensor, Tensor]:
    """Tokens [n] and their log-probabilities [n] (float32) from logits [n, vocab] and one uniform number [n] (float64) a row.

    Log-probabilities are of the tempered, full softmax; greedy decoding reports them at temperature 1.
    The draw inverts the cumulative distribution in vocabulary order, in float64: a uniform number picks the same token
    unless rounding of the logits moves a boundary across it.
    """
    scaled = logits.float()
    if sampling.temperature not in (0.0, 1.0):
        scaled = scaled / sampling.temperature
    logprobs = scaled.log_softmax(-1)
    if sampling.temperature == 0.0:
        tokens = logprobs.argmax(-1)
    else:
        probs = logprobs.exp()
        if sampling.top_p < 1.0:
            probs = _nucleus(probs, sampling.top_p)
        cdf = probs.cumsum(-1, dtype=torch.float64)
        tokens = torch.searchsorted(cdf, cdf[:, -1:] * uniform[:, None], right=True).squeeze(1)
    return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """`probs` [n, vocab] with 0 outside the smallest set of most probable tokens that holds at least `top_p`."""
    ordered, index = torch.sort(probs, dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1, dtype=torch.float64) - ordered
    return torch.zeros_like(probs).scatter_(1, index, ordered.masked_fill_(before >= top_p, 0.0))
