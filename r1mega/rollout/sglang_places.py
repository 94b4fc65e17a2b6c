"""Which node's GPUs each part of each server has: plain arithmetic, for whoever starts servers and whoever asks a cluster for nodes."""

from collections.abc import Sequence
from dataclasses import dataclass

from r1mega.config.engine_layout import EngineLayout
from r1mega.config.rollout import Sglang
from r1mega.errors import UserError


@dataclass(frozen=True)
class Allocation:
    """The nodes of a job, and which of them this one is: first those of the trainer, then those that servers have to themselves."""

    node: int = 0
    trainers: int = 1
    engines: int = 0
    gpus: int = 0
    """GPUs of a node; 0: nobody has said, and there are enough."""

    @property
    def nodes(self) -> int:
        """All nodes."""
        return self.trainers + self.engines


ALONE = Allocation()


@dataclass(frozen=True)
class Gpus:
    """Some GPUs of one node."""

    node: int
    first: int
    count: int


def rooms(settings: Sglang, allocation: Allocation, ranks_per_node: int) -> list[Gpus]:
    """What servers may have: nodes of their own where there are some, or else, on every node of the trainer, GPUs beside or under ranks."""
    if allocation.engines:
        own = range(allocation.trainers, allocation.nodes)
        return [Gpus(node, 0, allocation.gpus or settings.layout.ranks) for node in own]
    first = settings.gpus_from(ranks_per_node)
    count = allocation.gpus - first if allocation.gpus else settings.layout.ranks
    return [Gpus(node, first, count) for node in range(allocation.trainers)] if count > 0 else []


def places(layout: EngineLayout, found: Sequence[Gpus]) -> list[list[Gpus]]:
    """The parts of every server in the order of their ranks, in rooms of equal size.

    Several servers share a room; one that is larger has several to itself, equally much of each, as SGLang wants it.

    Raises:
        UserError: there is no room for all of them.
    """
    if not found:
        raise UserError("rollout.sglang.placement: ranks leave no GPU of their nodes to servers; give these nodes of their own")
    size = found[0].count
    if rooms_needed(layout, size) > len(found):
        raise UserError(
            f"rollout.sglang.layout: servers={layout.servers} of tp={layout.tp} take {rooms_needed(layout, size)} nodes with {size} GPUs "
            f"for servers, and there are {len(found)}; make them smaller or fewer"
        )
    part = _part(layout, size)
    parts, each = layout.tp // part, size // part
    if parts > 1:
        return [[Gpus(room.node, room.first, part) for room in found[n * parts : (n + 1) * parts]] for n in range(layout.servers)]
    return [[Gpus(found[n // each].node, found[n // each].first + n % each * part, part)] for n in range(layout.servers)]


def rooms_needed(layout: EngineLayout, size: int) -> int:
    """How many rooms of `size` GPUs all servers take."""
    part = _part(layout, size)
    return layout.servers * (layout.tp // part) if part < layout.tp else -(-layout.servers // (size // part))


def _part(layout: EngineLayout, size: int) -> int:
    """GPUs of a part: as many as fit, and divide a server equally."""
    return next(count for count in range(min(size, layout.tp), 0, -1) if layout.tp % count == 0)


def own_nodes(settings: Sglang, trainers: int, ranks_per_node: int, gpus: int) -> int:
    """Nodes that servers need to themselves: none where they fit on the trainer's.

    Args:
        trainers: nodes of the trainer.
        gpus: of a node.

    Raises:
        UserError: servers that belong on the trainer's nodes, by `placement` or `first_gpu`, do not fit there.
    """
    beside = rooms(settings, Allocation(0, trainers, 0, gpus), ranks_per_node)
    if beside and rooms_needed(settings.layout, beside[0].count) <= len(beside):
        return 0
    if settings.placement == "colocated" or settings.first_gpu is not None:
        places(settings.layout, beside)
    return rooms_needed(settings.layout, gpus)
