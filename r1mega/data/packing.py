"""Sequences into packed micro-batches ("chunks") and per-token values back: flat tensors and `cu_seqlens`, no padding but what parallelism needs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from r1mega.errors import UserError


@dataclass(frozen=True)
class TokenSequence:
    """One training sequence of n tokens. Every tensor is [n] and aligned with `tokens`: element i says something about token i.

    `tokens` int64. `weights` float32, the loss weight of predicting token i; 0 for prompt tokens. `extras` float32, further values of token i, such as
    its advantage or its old log-prob; 0 where there is none. Nothing predicts token 0: its weight and extras are ignored.
    """

    tokens: Tensor
    weights: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch of T tokens: whole sequences side by side, each padded to a multiple of `pad_to`, then the tail padding, a segment of its own.

    Everything but `tokens` and `position_ids` is aligned with the prediction: element t belongs to the token that position t predicts, which is
    the next one of the same sequence. Padding holds 0 everywhere (position ids count on).
    """

    tokens: Tensor
    """[T] int64."""
    position_ids: Tensor
    """[T] int64, position inside the segment."""
    labels: Tensor
    """[T] int64, tokens[t + 1]; 0 at a sequence's last position."""
    loss_weights: Tensor
    """[T] float32, weight of predicting labels[t]; 0 at a sequence's last position."""
    mtp_labels: Tensor
    """[T] int64, tokens[t + 2], the target of the multi-token-prediction layer; 0 at a sequence's last two positions."""
    mtp_weights: Tensor
    """[T] float32, weight of predicting mtp_labels[t]: the loss weight of token t + 2; 0 at a sequence's last two positions."""
    cu_seqlens: Tensor
    """[n + 1] int32, boundaries of the padded segments, tail included."""
    lengths: tuple[int, ...]
    """n true lengths, without padding; 0 for the tail."""
    sequences: tuple[int, ...]
    """n indices into the caller's list; -1 for the tail."""
    extras: Mapping[str, Tensor]
    """[T] float32 each, the sequences' extras."""


def round_up(n: int, multiple: int) -> int:
    """Smallest multiple of `multiple` that is >= n."""
    return -(-n // multiple) * multiple


def plan_chunks(lengths: Sequence[int], capacity: int, ranks: int, pad_to: int, cost: Callable[[int], float]) -> list[list[list[int]]]:
    """Assign sequences to chunks and chunks to data-parallel ranks: plan[rank][chunk] is a list of indices into `lengths`."""
    raise NotImplementedError


def pack(sequences: Sequence[TokenSequence], indices: Sequence[int], pad_to: int, align: int) -> PackedBatch:
    """Lay sequences[i] for i in `indices` side by side in one chunk whose length is rounded up to a multiple of `align`."""
    raise NotImplementedError


def unpack(values: Sequence[Tensor], batches: Sequence[PackedBatch]) -> dict[int, Tensor]:
    """Inverse of `pack` for per-token values [T] aligned with labels: sequence index -> [n] values aligned with its tokens (element 0 is 0)."""
    raise NotImplementedError


def context_parallel_index(cu_seqlens: Tensor, cp: int, rank: int) -> Tensor:
    """Positions [T / cp] int64 of a packed chunk that context-parallel rank `rank` of `cp` holds, ascending within each segment."""
    raise NotImplementedError
