"""Where an engine's weights come from: the shards of a trainer, a folder, tensors in memory."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from r1mega.config.engine_layout import EngineLayout
from r1mega.config.layout import Layout
from r1mega.weights import fp8
from r1mega.weights.architecture import Architecture
from r1mega.weights.blocks import SCALE, scale_box
from r1mega.weights.boxes import Box
from r1mega.weights.direct import DirectPlan, direct_plan
from r1mega.weights.engine import engine_params
from r1mega.weights.moving import Read, reader_of
from r1mega.weights.placement import Spelling
from r1mega.weights.shipping import Parcel, tensors, torch_dtype, whole_parcel
from r1mega.weights.sync import Bucket, FullPlan, full_plan
from r1mega.weights.wire import Wire

Filled = Iterator[tuple[Bucket, Tensor | None]]
"""Buckets, and the bytes of each (uint8 [bucket.nbytes]) on the one rank that has it."""

Parcels = Iterator[tuple[Bucket, Parcel | None]]
"""Buckets, and what this rank gives to each."""

Room = Callable[[int], Tensor]
"""Where a bucket is put together: uint8 [nbytes], asked for on the rank that gathers it, and written over."""

Region = tuple[Box, str, Box]
"""A box of what is sent, as a matrix, and which box of which canonical tensor stands there."""


class WeightSource(Protocol):
    """Weights of a model. Every rank has a source, calls it alike, and walks to the end what it gives."""

    @property
    def arch(self) -> Architecture:
        """The model that the weights are of. It may lack the MTP layers that the checkpoint has."""

    def tensors(self, dtype: torch.dtype) -> Iterable[tuple[str, Tensor]]:
        """Every canonical tensor, whole, on every rank; in `dtype` where the source has to make them, else as they are."""

    def buckets(self, wire: Wire, limit: int, senders: Sequence[int] | None, rank: int, room: Room | None = None) -> Filled:
        """The same tensors in buckets, of which no rank holds more than two at a time.

        Args:
            wire: dtypes and names as the engine is sent them.
            limit: bytes of a bucket.
            senders: ranks that buckets may be gathered on; None: any.
            rank: this one.
            room: where buckets are put together; None: in memory of their own.
        """

    def params(
        self, engine: EngineLayout, engine_rank: int, wire: Wire, limit: int, on: int, rank: int, room: Room | None = None
    ) -> Filled:
        """The parameters of one rank of a server as it keeps them, gathered on rank `on`. What nobody holds, padding, is zero."""

    def parcels(self, engine: EngineLayout, engine_rank: int, wire: Wire, limit: int, rank: int) -> Parcels:
        """The parameters of one rank of all servers (0 <= `engine_rank` < `engine.ranks`), gathered nowhere: what this rank gives to each.

        UserError where ranks cannot quantise alone.
        """


@dataclass(frozen=True)
class Whole:
    """Weights that every rank can read whole. Rank 0 alone sends them."""

    arch: Architecture
    read: Read

    def buckets(self, wire: Wire, limit: int, rank: int, room: Room | None = None) -> Filled:
        """See `WeightSource.buckets`."""
        for bucket in _whole_plan(self.arch, wire, limit).buckets:
            shapes = {entry.name: entry.shape for entry in bucket.entries}

            def whole(name: str, shapes: Mapping[str, tuple[int, ...]] = shapes) -> Iterable[Region]:
                return [(Box.whole(shapes[name]), name, Box.whole(shapes[name]))]

            yield bucket, self._filled(bucket, wire, whole, room) if rank == bucket.sender else None

    def params(
        self, engine: EngineLayout, engine_rank: int, wire: Wire, limit: int, on: int, rank: int, room: Room | None = None
    ) -> Filled:
        """See `WeightSource.params`."""
        placed = {param.name: param for param in engine_params(self.arch, engine, engine_rank)}

        def pieces(name: str) -> Iterable[Region]:
            return ((piece.box, piece.tensor, piece.source) for piece in placed[name].pieces)

        for bucket in _whole_direct_plan(self.arch, engine, wire).buckets(engine_rank, limit):
            yield bucket, self._filled(bucket, wire, pieces, room) if rank == on else None

    def parcels(self, engine: EngineLayout, engine_rank: int, wire: Wire, limit: int, rank: int) -> Parcels:
        """See `WeightSource.parcels`."""
        one = engine.model_copy(update={"servers": 1})
        for bucket, flat in self.params(one, engine_rank % engine.tp, wire, limit, 0, rank):
            yield bucket, None if flat is None else whole_parcel(bucket, flat)

    def _filled(self, bucket: Bucket, wire: Wire, regions: Callable[[str], Iterable[Region]], room: Room | None) -> Tensor:
        flat = torch.empty(bucket.nbytes, dtype=torch.uint8) if room is None else room(bucket.nbytes)
        flat.zero_()
        views = dict(tensors(bucket, flat))
        for name, value in views.items():
            if name.endswith(SCALE):
                continue
            scales = views.get(name + SCALE)
            for box, tensor, source in regions(name):
                read = self.read(tensor, source)
                if scales is not None:
                    # No region cuts a block: engines that would are refused.
                    read, found = fp8.quantise(read.to(torch_dtype(wire.dtype)))
                    _matrix(scales)[scale_box(box).slices] = found
                _matrix(value)[box.slices] = read
        return flat


def _matrix(value: Tensor) -> Tensor:
    """With the leading axes folded into the rows."""
    return value.flatten(0, -2) if value.ndim > 2 else value


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

    def buckets(self, wire: Wire, limit: int, senders: Sequence[int] | None, rank: int, room: Room | None = None) -> Filled:
        """See `WeightSource.buckets`."""
        return self._whole.buckets(wire, limit, rank, room)

    def params(
        self, engine: EngineLayout, engine_rank: int, wire: Wire, limit: int, on: int, rank: int, room: Room | None = None
    ) -> Filled:
        """See `WeightSource.params`."""
        return self._whole.params(engine, engine_rank, wire, limit, on, rank, room)

    def parcels(self, engine: EngineLayout, engine_rank: int, wire: Wire, limit: int, rank: int) -> Parcels:
        """See `WeightSource.parcels`."""
        return self._whole.parcels(engine, engine_rank, wire, limit, rank)

    @property
    def _whole(self) -> Whole:
        read = reader_of(self.weights)
        return Whole(self.arch, lambda name, box: self._rounded(read(name, box)))

    def _rounded(self, weight: Tensor) -> Tensor:
        return weight if self.rounded is None else weight.to(self.rounded)


@lru_cache(maxsize=4)
def _whole_plan(arch: Architecture, wire: Wire, limit: int) -> FullPlan:
    return full_plan(arch, Layout(), 1, Spelling(), wire, limit)


@lru_cache(maxsize=4)
def _whole_direct_plan(arch: Architecture, engine: EngineLayout, wire: Wire) -> DirectPlan:
    return direct_plan(arch, Layout(), 1, Spelling(), engine, wire)
