"""Buckets of a weight sync, each gathered on one rank from exactly the ranks that hold it."""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from r1mega.weights.moving import Params
from r1mega.weights.shipping import Assembly, message
from r1mega.weights.source import Room
from r1mega.weights.sync import Bucket
from r1mega.weights.wire import Wire


def gathered(
    buckets: Iterable[Bucket], params: Params, wire: Wire, device: torch.device, on: int | None = None, room: Room | None = None
) -> Iterator[tuple[Bucket, Tensor | None]]:
    """Walk through buckets in step with all ranks.

    Args:
        buckets: the same on every rank.
        params: this rank's parameters and buffers, which may wait on the host.
        device: where the collectives are.
        on: the rank that all are gathered on, in place of their senders.
        room: where this rank puts its buckets together; None: in memory of their own.

    Yields:
        Each bucket, and its bytes (uint8 [bucket.nbytes], zero where nobody holds anything) on the rank that gathered it.
    """
    rank = dist.get_rank()
    scratch = torch.empty(0, dtype=torch.uint8, device=device)

    def messages(bucket: Bucket, other: int) -> Tensor:
        """Room for a message: the one before has been sent, or scattered. A page that was never touched costs more than a copy."""
        nonlocal scratch
        nbytes = bucket.message_bytes(other)
        if scratch.numel() < nbytes:
            scratch = torch.empty(nbytes, dtype=torch.uint8, device=device)
        return scratch[:nbytes]

    for bucket in buckets:
        target = bucket.sender if on is None else on
        if rank != target:
            if rank in bucket.messages:
                dist.send(message(params, bucket, rank, wire, messages(bucket, rank)), target)
            yield bucket, None
            continue
        whole = Assembly(bucket, wire, device, None if room is None else room(bucket.nbytes))
        for other in sorted(bucket.messages):
            if other == rank:
                whole.take_own(params, rank)
                continue
            received = messages(bucket, other)
            dist.recv(received, other)
            whole.take(other, received)
        yield bucket, whole.finish()
