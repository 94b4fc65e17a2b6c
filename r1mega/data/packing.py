"""Sequences into packed micro-batches ("chunks") and per-token values back.

Flat tensors and `cu_seqlens`, with no padding but what parallelism needs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from r1mega.errors import UserError

ROUTING = "routing"
"""Name of the extra uint8 or int16 [n, sparse layers, top_k], the experts of the pass that predicts token i: those that token i - 1, which
is fed to it, went through."""

ROUTED = "routed"
"""Name of the extra bool [n]: whether that is known."""


@dataclass(frozen=True)
class TokenSequence:
    """One training sequence of n tokens. Every tensor is aligned with `tokens`: element i says something about token i.

    `tokens` int64 [n]. `weights` float32 [n], the loss weight of predicting token i; 0 for prompt tokens. `extras` [n, ...] of any dtype,
    further values of token i, such as its advantage or its old log-prob; 0 where there is none. Nothing predicts token 0: its weight and
    extras are ignored.
    """

    tokens: Tensor
    weights: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch of T tokens: n segments side by side.

    A segment is a sequence padded to a multiple of `pad_to`; the padding at the chunk's end, if there is any, is a segment of its own.
    Everything but `tokens` and `position_ids` is aligned with the prediction: element t belongs to the token that position t predicts,
    which is the next one of the same sequence. Padding holds 0 everywhere (position ids count on).
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
    """[T] float32, weight of predicting mtp_labels[t], that of token t + 2; 0 at a sequence's last two positions."""
    cu_seqlens: Tensor
    """[n + 1] int32, boundaries of the padded segments, tail included."""
    lengths: tuple[int, ...]
    """n true lengths, without padding; 0 for the tail."""
    sequences: tuple[int, ...]
    """n indices into the caller's list; -1 for the tail."""
    extras: Mapping[str, Tensor]
    """[T, ...] each, the sequences' extras in their dtype."""

    @property
    def ends(self) -> Tensor:
        """[T] int64, at the last token of a sequence its index in the caller's list, -1 elsewhere."""
        found = torch.full_like(self.tokens, -1)
        for start, length, index in zip(self.cu_seqlens.tolist(), self.lengths, self.sequences, strict=False):
            if length:
                found[start + length - 1] = index
        return found


def round_up(n: int, multiple: int) -> int:
    """Smallest multiple of `multiple` that is >= n."""
    return -(-n // multiple) * multiple


def plan_chunks(
    lengths: Sequence[int], capacity: int, ranks: int, pad_to: int, cost: Callable[[int], float], rounds_of: int = 1
) -> list[list[list[int]]]:
    """Assign sequences to chunks and chunks to data-parallel ranks: plan[rank][chunk] is an ascending list of indices into `lengths`.

    Every chunk holds at most `capacity` tokens, sequences padded to a multiple of `pad_to`. All ranks get the same number of chunks,
    which pipeline schedules and expert-parallel collectives need, and as few as the greedy packing finds; that number is a multiple of
    `rounds_of`. Chunks are empty only where there are fewer sequences than chunks. `cost` maps a padded length to the estimated work of
    that sequence, in any unit; it must not fall with the length. Work is balanced over the ranks and, because expert-parallel ranks meet
    in every micro-batch, over the chunks that run together. Deterministic. UserError when a sequence does not fit into a chunk.
    """
    padded = np.array([round_up(length, pad_to) for length in lengths], dtype=np.int64)
    if (padded > capacity).any():
        longest = int(padded.argmax())
        padding = f" (padded to {padded[longest]})" if padded[longest] != lengths[longest] else ""
        raise UserError(
            f"a sequence of {lengths[longest]} tokens{padding} does not fit into a chunk of {capacity}: raise train.chunk_tokens"
        )
    costs = np.array([cost(int(length)) for length in padded], dtype=np.float64)
    order = np.lexsort((-padded, -costs))
    least = -(-int(padded.sum()) // (ranks * capacity))
    count = ranks * round_up(max(1, least), rounds_of)
    while (bins := _assign(order, padded, costs, capacity, count)) is None:
        count += ranks * rounds_of
    return _deal(bins, costs, ranks)


def _assign(order: np.ndarray, padded: np.ndarray, costs: np.ndarray, capacity: int, count: int) -> list[list[int]] | None:
    """Sequences into `count` bins in the given order, largest first; None when one fits nowhere.

    First try: each into the bin with the least work that has room (longest processing time first: balanced).
    Second try: each into the fullest bin that has room (best fit decreasing: tighter).
    """
    for tightest in (False, True):
        used, work = np.zeros(count, dtype=np.int64), np.zeros(count)
        bins: list[list[int]] = [[] for _ in range(count)]
        for i in order:
            fits = used + padded[i] <= capacity
            chosen = int(np.where(fits, -used if tightest else work, np.inf).argmin())
            if not fits[chosen]:
                break
            bins[chosen].append(int(i))
            used[chosen] += padded[i]
            work[chosen] += costs[i]
        else:
            return bins
    return None


def _deal(bins: list[list[int]], costs: np.ndarray, ranks: int) -> list[list[list[int]]]:
    """Bins to ranks, in rounds of like cost that run at the same time; a round's costliest bin goes to the idlest rank so far."""
    work = [float(costs[chunk].sum()) for chunk in bins]
    order = sorted(range(len(bins)), key=lambda b: -work[b])
    plan: list[list[list[int]]] = [[] for _ in range(ranks)]
    totals = [0.0] * ranks
    for start in range(0, len(order), ranks):
        idlest_first = sorted(range(ranks), key=totals.__getitem__)
        for rank, b in zip(idlest_first, order[start : start + ranks], strict=True):
            plan[rank].append(sorted(bins[b]))
            totals[rank] += work[b]
    return plan


def pack(sequences: Sequence[TokenSequence], indices: Sequence[int], pad_to: int, align: int) -> PackedBatch:
    """Lay sequences[i] for i in `indices` side by side in one chunk.

    Each sequence is padded to a multiple of `pad_to` (2 x cp, or 1 without context parallelism) and the chunk to a multiple of `align`,
    itself a multiple of `pad_to` (what sequence parallelism and FP8 need). No indices make a filler chunk of `align` tokens whose
    weights are all 0, with the same extras as any other chunk of `sequences`.
    """
    if align % pad_to:
        raise ValueError(f"align={align} is not a multiple of pad_to={pad_to}")
    chosen = [sequences[i] for i in indices]
    lengths = np.array([len(s.tokens) for s in chosen], dtype=np.int64)
    cu_seqlens = np.concatenate([[0], np.cumsum(-(-lengths // pad_to) * pad_to)])
    content = int(cu_seqlens[-1])
    total = max(round_up(content, align), align)
    has_tail = total > content
    if has_tail:
        cu_seqlens = np.append(cu_seqlens, total)

    offsets = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    inside = torch.from_numpy(offsets)  # position of each token inside its sequence
    slots = torch.from_numpy(offsets + np.repeat(cu_seqlens[: len(lengths)], lengths))  # position of each token inside the chunk

    def place(values: list[Tensor], shift: int, dtype: torch.dtype, each: tuple[int, ...] = ()) -> Tensor:
        """Values of all tokens, each `shift` positions before its token; the first `shift` of a sequence are left out."""
        out = torch.zeros(total, *each, dtype=dtype)
        if values:
            kept = inside >= shift
            out[slots[kept] - shift] = torch.cat(values)[kept].to(dtype)
        return out

    tokens, weights = [s.tokens for s in chosen], [s.weights for s in chosen]
    kinds = {name: (values.dtype, values.shape[1:]) for name, values in sequences[0].extras.items()} if sequences else {}
    return PackedBatch(
        tokens=place(tokens, 0, torch.int64),
        position_ids=torch.from_numpy(np.arange(total) - np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))),
        labels=place(tokens, 1, torch.int64),
        loss_weights=place(weights, 1, torch.float32),
        mtp_labels=place(tokens, 2, torch.int64),
        mtp_weights=place(weights, 2, torch.float32),
        cu_seqlens=torch.from_numpy(cu_seqlens).int(),
        lengths=(*lengths.tolist(), *([0] if has_tail else [])),
        sequences=(*indices, *([-1] if has_tail else [])),
        extras={name: place([s.extras[name] for s in chosen], 1, dtype, each) for name, (dtype, each) in kinds.items()},
    )


def unpack(values: Sequence[Tensor], batches: Sequence[PackedBatch]) -> dict[int, Tensor]:
    """Inverse of `pack` for per-token values: one tensor [T] a batch, aligned with its labels.

    Returns, by ascending sequence index, [n] values aligned with the sequence's tokens as in `TokenSequence`; element 0 is 0.
    """
    found: dict[int, Tensor] = {}
    for flat, batch in zip(values, batches, strict=True):
        for start, length, index in zip(batch.cu_seqlens.tolist(), batch.lengths, batch.sequences, strict=False):
            if index >= 0:
                found[index] = torch.cat([flat.new_zeros(1), flat[start : start + length - 1]])
    return dict(sorted(found.items()))


def context_parallel_index(cu_seqlens: Tensor, cp: int, rank: int) -> Tensor:
    """Positions [T / cp] int64 of a packed chunk that context-parallel rank `rank` of `cp` holds.

    Each segment is cut into 2 x cp equal slices and the rank takes slices `rank` and 2 x cp - 1 - `rank`, in this order: causal attention
    then costs all ranks the same (Megatron-Core's and Transformer Engine's order). ValueError unless segments are multiples of 2 x cp.
    """
    bounds = cu_seqlens.long()
    segments = bounds.diff()
    if (segments % (2 * cp)).any():
        raise ValueError(f"segments of {segments.tolist()} tokens are not all multiples of 2 x cp = {2 * cp}")
    slices = torch.repeat_interleave(segments // (2 * cp), segments)
    inside = torch.arange(int(bounds[-1])) - torch.repeat_interleave(bounds[:-1], segments)
    which = inside // slices
    return torch.nonzero((which == rank) | (which == 2 * cp - 1 - rank)).squeeze(1)
