"""Buckets of a weight sync, each gathered on one rank from exactly the ranks that hold it."""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from r1mega.weights.moving import Params
from r1mega.weights.shipping import pack, unpack
from r1mega.weights.sync import Bucket


def gathered(buckets: Iterable[Bucket], params: Params, on: int | None = None) -> Iterator[tuple[Bucket, Tensor | None]]:
    """Walk through buckets in step with all ranks.

    Args:
        buckets: the same on every rank, or on each rank those messages alone that are its own or come to it.
        params: this rank's parameters and buffers.
        on: the rank that all are gathered on, in place of their senders.

    Yields:
        Each bucket, and its bytes (uint8 [bucket.nbytes], zero where nobody holds anything) on the rank that gathered it.
    """
    rank = dist.get_rank()
    for bucket in buckets:
        target = bucket.sender if on is None else on
        own = bucket.messages.get(rank, ())
        if rank != target:
            if own:
                dist.send(pack(params, own), target)
            yield bucket, None
            continue
        device = next(iter(params.values())).device
        flat = torch.zeros(bucket.nbytes, dtype=torch.uint8, device=device)
        if own:
            unpack(pack(params, own), own, bucket, flat)
        for other in sorted(bucket.messages):
            if other != rank:
                message = torch.empty(bucket.message_bytes(other), dtype=torch.uint8, device=device)
                dist.recv(message, other)
                unpack(message, bucket.messages[other], bucket, flat)
        yield bucket, flat
