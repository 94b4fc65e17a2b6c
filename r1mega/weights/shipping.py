"""Buckets filled: a rank's parameters to its message, messages to the bytes that an engine is handed."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from r1mega.weights import fp8
from r1mega.weights.blocks import SCALE
from r1mega.weights.boxes import Box, Piece
from r1mega.weights.moving import Params
from r1mega.weights.sync import Bucket, Segment
from r1mega.weights.wire import DType, Wire


def message(params: Params, bucket: Bucket, rank: int, wire: Wire, out: Tensor | None = None) -> Tensor:
    """What a rank sends to the bucket's sender.

    Args:
        out: where to write it; made when left out.

    Returns:
        uint8 [bucket.message_bytes(rank)], on the parameters' device.
    """
    segments = bucket.messages[rank]
    out = torch.empty(bucket.message_bytes(rank), dtype=torch.uint8, device=_device(params)) if out is None else out
    for segment, values in _read(params, segments, wire):
        _segment_of(out, segment).copy_(values)
    return out


class Patch(NamedTuple):
    """Region start..stop of entry `entry` as a matrix, and where its values lie in a message."""

    entry: int
    start: tuple[int, ...]
    stop: tuple[int, ...]
    dtype: DType
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Parcel:
    """What one rank gives to a bucket that is put together elsewhere: a message, uint8, and where its parts belong."""

    patches: tuple[Patch, ...]
    message: Tensor


def parcel(params: Params, bucket: Bucket, rank: int, wire: Wire, device: torch.device) -> Parcel:
    """A rank's message to a bucket none of whose entries is `quantised`, on a device."""
    patches = tuple(
        Patch(found.entry, found.box.start, found.box.stop, found.dtype, found.offset, found.nbytes) for found in bucket.messages[rank]
    )
    out = torch.empty(bucket.message_bytes(rank), dtype=torch.uint8, device=device)
    return Parcel(patches, message(params, bucket, rank, wire, out))


def whole_parcel(bucket: Bucket, flat: Tensor) -> Parcel:
    """All of a bucket, uint8 [bucket.nbytes], as the gift of one rank."""
    patches = []
    for index, entry in enumerate(bucket.entries):
        box = Box.whole((prod(entry.shape[:-1]), entry.shape[-1]) if len(entry.shape) > 2 else entry.shape)
        patches.append(Patch(index, box.start, box.stop, entry.dtype, entry.offset, entry.nbytes))
    return Parcel(tuple(patches), flat)


class Assembly:
    """A bucket on its way to be whole, at its sender. `take` the messages of the others in any order, one in memory at a time."""

    def __init__(self, bucket: Bucket, wire: Wire, device: torch.device | str = "cpu", out: Tensor | None = None) -> None:
        """`out`: uint8 [bucket.nbytes] to fill; made when left out."""
        self.bucket = bucket
        self._flat = torch.empty(bucket.nbytes, dtype=torch.uint8, device=device) if out is None else out
        self._views = dict(tensors(bucket, self._flat))
        # What covers an entry only in part leaves padding, which engines keep at zero.
        covered = [0] * len(bucket.entries)
        for found in bucket.messages.values():
            for segment in found:
                covered[segment.entry] += segment.box.size
        for entry, size in zip(bucket.entries, covered, strict=True):
            if size < self._views[entry.name].numel():
                self._views[entry.name].view(torch.uint8).zero_()
        dtype = torch_dtype(wire.dtype)
        self._whole = {
            entry.name: torch.zeros(self._matrix(index).shape, dtype=dtype, device=device)
            for index, entry in enumerate(bucket.entries)
            if entry.quantised
        }
        self._wire = wire

    def take(self, rank: int, received: Tensor) -> None:
        """Scatter a rank's message, uint8 [bucket.message_bytes(rank)]."""
        for segment in self.bucket.messages[rank]:
            self._place(segment, _segment_of(received, segment))

    def take_own(self, params: Params, rank: int) -> None:
        """What the rank that gathers gives itself, without a message."""
        for segment, values in _read(params, self.bucket.messages.get(rank, ()), self._wire):
            self._place(segment, values)

    def finish(self) -> Tensor:
        """uint8 [bucket.nbytes], once everything was taken: matrices whose blocks some rank's region cuts are quantised now."""
        for name, whole in self._whole.items():
            codes, scales = fp8.quantise(whole)
            self._views[name].view(codes.shape).copy_(codes)
            self._views[name + SCALE].view(scales.shape).copy_(scales)
        return self._flat

    def _place(self, segment: Segment, values: Tensor) -> None:
        entry = self.bucket.entries[segment.entry]
        target = self._whole[entry.name] if entry.quantised else self._matrix(segment.entry)
        target[segment.box.slices] = values

    def _matrix(self, entry: int) -> Tensor:
        """An entry with its leading axes folded into the rows."""
        view = self._views[self.bucket.entries[entry].name]
        return view.flatten(0, -2) if view.ndim > 2 else view


def tensors(bucket: Bucket, flat: Tensor) -> list[tuple[str, Tensor]]:
    """The bucket's tensors as views of its bytes, in their order there."""
    return [
        (entry.name, flat[entry.offset : entry.offset + entry.nbytes].view(torch_dtype(entry.dtype)).view(entry.shape))
        for entry in bucket.entries
    ]


def torch_dtype(name: DType) -> torch.dtype:
    """The dtype of that name."""
    return {
        "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float8_e4m3fn": torch.float8_e4m3fn,
    }[name]  # fmt: skip


def _read(params: Params, segments: Sequence[Segment], wire: Wire) -> Iterator[tuple[Segment, Tensor]]:
    """(segment, its values in the shape of its box); the codes and scales of one region come from one quantisation."""
    by_piece: dict[Piece, list[Segment]] = defaultdict(list)
    for segment in segments:
        by_piece[segment.piece].append(segment)
    for piece, found in by_piece.items():
        values = params[piece.chunk, piece.param].detach()[piece.box.slices]
        if found[0].form == "values":
            yield from ((segment, values.to(torch_dtype(segment.dtype))) for segment in found)
            continue
        # Rounded first, so that a layout in which the sender quantises gives the same codes.
        codes, scales = fp8.quantise(values.to(torch_dtype(wire.dtype)))
        yield from ((segment, codes if segment.form == "codes" else scales) for segment in found)


def _segment_of(flat: Tensor, segment: Segment) -> Tensor:
    """A segment of a message, in the shape of its box."""
    return flat[segment.offset : segment.offset + segment.nbytes].view(torch_dtype(segment.dtype)).view(segment.box.shape)


def _device(params: Params) -> torch.device:
    return next(iter(params.values())).device
