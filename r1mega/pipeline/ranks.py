"""Small Python objects between the ranks of a run. Tensors travel by their own collectives."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def number() -> int:
    """This rank's."""
    return dist.get_rank()


def count() -> int:
    """How many there are."""
    return dist.get_world_size()


def shared(make: Callable[[], T]) -> T:
    """What `make` returns on rank 0, on every rank. An exception of rank 0 is its own; the launcher then ends the others."""
    box: list[T | None] = [make() if dist.get_rank() == 0 else None]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def dealt(items: Sequence[T]) -> list[T]:
    """This rank's items of a list that every rank has: every world_size-th."""
    return list(items[dist.get_rank() :: dist.get_world_size()])


def collected(mine: Sequence[T]) -> list[T]:
    """The list of which every rank holds its `dealt` items, on every rank."""
    world = dist.get_world_size()
    if world == 1:
        return list(mine)
    parts: list[list[T]] = [[] for _ in range(world)]
    dist.all_gather_object(parts, list(mine))
    whole: list[T] = []
    for index in range(max(map(len, parts))):
        whole += [part[index] for part in parts if index < len(part)]
    return whole


def on_first(make: Callable[[], T]) -> T | None:
    """What `make` returns on rank 0, which keeps it; None on the others."""
    return make() if dist.get_rank() == 0 else None


def gathered(item: T) -> list[T]:
    """Every rank's item, in the order of the ranks."""
    found: list[T] = [item] * dist.get_world_size()
    if dist.get_world_size() > 1:
        dist.all_gather_object(found, item)
    return found


def to_first(item: T) -> list[T] | None:
    """Every rank's item, in the order of the ranks, on rank 0, whose own is not copied; None on the others."""
    if dist.get_rank() != 0:
        dist.gather_object(item, dst=0)
        return None
    found: list[T | None] = [None] * dist.get_world_size()
    if len(found) > 1:
        dist.gather_object(None, found, dst=0)
    found[0] = item
    return found  # type: ignore[return-value]


def first(item: T | None) -> T | None:
    """The item of the first rank that has one, on every rank; None where none has."""
    return next((one for one in gathered(item) if one is not None), None)


def every(flag: bool) -> bool:
    """Whether a flag is set on every rank."""
    return all(gathered(flag))
