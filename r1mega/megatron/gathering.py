"""Buckets of a weight sync, each gathered on one rank from exactly the ranks that hold it."""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from r1mega.weights.moving import Params
from r1mega.weights.shipping import Assembly, message
from r1mega.weights.sync import Bucket
from r1mega.weights.wire import Wire


def gathered(
    buckets: Iterable[Bucket], params: Params, wire: Wire, device: torch.device, on: int | None = None
) -> Iterator[tuple[Bucket, Tensor | None]]:
    """Walk through buckets in step with all ranks.

    Args:
        buckets: the same on every rank.
        params: this rank's parameters and buffers, which may wait on the host.
        device: where the collectives are.
        on: the rank that all are gathered on, in place of their senders.

    Yields:
        Each bucket, and its bytes (uint8 [bucket.nbytes], zero where nobody holds anything) on the rank that gathered it.
    """
    rank = dist.get_rank()
    for bucket in buckets:
        target = bucket.sender if on is None else on
        if rank != target:
            if rank in bucket.messages:
                dist.send(message(params, bucket, rank, wire).to(device), target)
            yield bucket, None
            continue
        whole = Assembly(bucket, wire, device)
        for other in sorted(bucket.messages):
            if other == rank:
                received = message(params, bucket, rank, wire).to(device)
            else:
                received = torch.empty(bucket.message_bytes(other), dtype=torch.uint8, device=device)
                dist.recv(received, other)
            whole.take(other, received)
        yield bucket, whole.finish()
