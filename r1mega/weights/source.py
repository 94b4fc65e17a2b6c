"""Where an engine's weights come from: the shards of a trainer, a folder, tensors in memory."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from r1mega.config.engine_layout import EngineLayout
from r1mega.config.layout import Layout
from r1mega.weights.architecture import Architecture
from r1mega.weights.boxes import Box
from r1mega.weights.direct import direct_plan
from r1mega.weights.engine import engine_params
from r1mega.weights.moving import Read, reader_of
from r1mega.weights.placement import Spelling
from r1mega.weights.shipping import tensors
from r1mega.weights.sync import Bucket, FullPlan, full_plan
from r1mega.weights.wire import Wire

Filled = Iterator[tuple[Bucket, Tensor | None]]
"""Buckets, and the bytes of each (uint8 [bucket.nbytes]) on the one rank that has it."""


class WeightSource(Protocol):
    """Weights of a model. Every rank has a source, calls it alike, and walks to the end what it gives."""

    @property
    def arch(self) -> Architecture:
        """The model that the weights are of. It may lack the MTP layers that the checkpoint has."""

    def tensors(self, dtype: torch.dtype) -> Iterable[tuple[str, Tensor]]:
        """Every canonical tensor, whole, on every rank; in `dtype` where the source has to make them, else as they are."""

    def buckets(self, wire: Wire, limit: int, senders: Sequence[int] | None, rank: int) -> Filled:
        """The same tensors in buckets, of which no rank holds more than two at a time.

        Args:
            wire: dtypes and names as the engine is sent them.
            limit: bytes of a bucket.
            senders: ranks that buckets may be gathered on; None: any.
            rank: this one.
        """

    def params(self, engine: EngineLayout, engine_rank: int, wire: Wire, limit: int, on: int, rank: int) -> Filled:
        """The parameters of one rank of a server as it keeps them, gathered on rank `on`. What nobody holds, padding, is zero."""


@dataclass(frozen=True)
class Whole:
    """Weights that every rank can read whole. Rank 0 alone sends them."""

    arch: Architecture
    read: Read

    def buckets(self, wire: Wire, limit: int, rank: int) -> Filled:
        """See `WeightSource.buckets`."""
        for bucket in _whole_plan(self.arch, wire, limit).buckets:
            yield bucket, self._filled(bucket) if rank == bucket.sender else None

    def params(self, engine: EngineLayout, engine_rank: int, wire: Wire, limit: int, on: int, rank: int) -> Filled:
        """See `WeightSource.params`."""
        placed = {param.name: param for param in engine_params(self.arch, engine, engine_rank)}
        plan = direct_plan(self.arch, Layout(), 1, Spelling(), engine, wire, first=1)
        for bucket in plan.buckets(1 + engine_rank, limit):
            flat = None
            if rank == on:
                flat = torch.zeros(bucket.nbytes, dtype=torch.uint8)
                for name, value in tensors(bucket, flat):
                    values = value.view(placed[name].shape)
                    for piece in placed[name].pieces:
                        values[piece.box.slices].copy_(self.read(piece.tensor, piece.source))
            yield bucket, flat

    def _filled(self, bucket: Bucket) -> Tensor:
        flat = torch.empty(bucket.nbytes, dtype=torch.uint8)
        for name, value in tensors(bucket, flat):
            value.copy_(self.read(name, Box.whole(tuple(value.shape))))
        return flat


@dataclass(frozen=True)
class Mapped:
    """Tensors that every rank has whole.

    `rounded`: the engine is given the values that they have in this dtype, which is that of the files they will be written to.
    """

    arch: Architecture
    weights: Mapping[str, Tensor]
    rounded: torch.dtype | None = None

    def tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """See `WeightSource.tensors`."""
        return ((name, self._rounded(weight)) for name, weight in self.weights.items())

    def buckets(self, wire: Wire, limit: int, senders: Sequence[int] | None, rank: int) -> Filled:
        """See `WeightSource.buckets`."""
        return self._whole.buckets(wire, limit, rank)

    def params(self, engine: EngineLayout, engine_rank: int, wire: Wire, limit: int, on: int, rank: int) -> Filled:
        """See `WeightSource.params`."""
        return self._whole.params(engine, engine_rank, wire, limit, on, rank)

    @property
    def _whole(self) -> Whole:
        read = reader_of(self.weights)
        return Whole(self.arch, lambda name, box: self._rounded(read(name, box)))

    def _rounded(self, weight: Tensor) -> Tensor:
        return weight if self.rounded is None else weight.to(self.rounded)


@lru_cache(maxsize=4)
def _whole_plan(arch: Architecture, wire: Wire, limit: int) -> FullPlan:
    return full_plan(arch, Layout(), 1, Spelling(), wire, limit)
