"""Executing the plans of `sync` and `direct` with torch: messages are packed, and unpacked into buckets."""

from collections.abc import Sequence

import torch
from torch import Tensor

from r1mega.weights.moving import Params
from r1mega.weights.sync import Bucket, Segment


def pack(params: Params, segments: Sequence[Segment]) -> Tensor:
    """A rank's message: uint8 [sum of the segments' nbytes]."""
    device = params[segments[0].piece.chunk, segments[0].piece.param].device
    message = torch.empty(sum(segment.nbytes for segment in segments), dtype=torch.uint8, device=device)
    for segment in segments:
        value = params[segment.piece.chunk, segment.piece.param].detach()
        _part(message, segment).copy_(value[segment.piece.box.slices].reshape(-1))
    return message


def unpack(message: Tensor, segments: Sequence[Segment], bucket: Bucket, flat: Tensor) -> None:
    """Copy a message into its places among the bucket's bytes (`flat`, uint8 [bucket.nbytes])."""
    for segment in segments:
        entry = bucket.entries[segment.entry]
        values = flat[entry.offset : entry.offset + entry.nbytes].view(getattr(torch, entry.dtype))
        if len(segment.box.start) > 1:
            values = values.view(-1, entry.shape[-1])
        values[segment.box.slices].copy_(_part(message, segment).view(segment.box.shape))


def _part(message: Tensor, segment: Segment) -> Tensor:
    return message[segment.offset : segment.offset + segment.nbytes].view(getattr(torch, segment.dtype))
