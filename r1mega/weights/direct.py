"""The second path: every engine rank is sent its own shard, in the layout that it keeps (SGLang's load format "direct").

No rank sees a full tensor. Copies are worked out when they are asked for: those of all ranks at once would not fit into memory.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from r1mega.config.engine_layout import EngineLayout
from r1mega.config.layout import Layout
from r1mega.weights.architecture import Architecture
from r1mega.weights.blocks import SCALE, scale_box, scale_shape, whole_blocks
from r1mega.weights.boxes import Box
from r1mega.weights.canonical import canonical
from r1mega.weights.engine import EngineParam, check_block_fp8, engine_group, engine_holders, engine_params
from r1mega.weights.placement import Holders, Spelling, holders
from r1mega.weights.plan import Held, held_pieces, overlap
from r1mega.weights.sync import Bucket, Share, Wanted, fill
from r1mega.weights.wire import ITEMSIZE, Sent, Wire

Ranks = tuple[int, ...]


@dataclass(frozen=True)
class DirectPlan:
    """Who sends what to which engine rank; both sides are groups of replicas.

    `nbytes[ranks, h]` is what each rank of target group h takes from the replicas `ranks`, and `senders[ranks, h]` names for each of them
    the one replica that serves it: the rank itself where it holds the elements, otherwise the one with the least to send.
    `quantised_late` counts parameters, once per group, that are quantised where their regions come together, as some trainer rank's
    region cuts a block.
    """

    wire: Wire
    target: tuple[Holders, ...]
    nbytes: Mapping[tuple[Ranks, int], int]
    senders: Mapping[tuple[Ranks, int], Ranks]
    held: Held
    shapes: Mapping[str, tuple[int, ...]]
    quantised_late: int

    def links(self) -> Counter[tuple[int, int]]:
        """Bytes by (trainer rank, engine rank), without what stays where it is."""
        found: Counter[tuple[int, int]] = Counter()
        for (ranks, h), nbytes in self.nbytes.items():
            for rank, sender in zip(self.target[h].ranks, self.senders[ranks, h], strict=True):
                if sender != rank:
                    found[sender, rank] += nbytes
        return found

    def buckets(self, rank: int, limit: int, draft: bool = False, only: int | None = None) -> Iterator[Bucket]:
        """What an engine rank is handed, in buckets of at most `limit` bytes or one parameter, which a load needs whole.

        Ranks of a server have buckets of the same number, sizes and names.

        Args:
            rank: numbered as in `engine_holders`; it is the bucket's `sender`: messages come together beside it.
            draft: of the model made of the MTP layer, which is loaded apart.
            only: leave out the messages of all other ranks, for a trainer rank that asks what it has to send.
        """
        wanted: list[Wanted] = []
        room = limit
        for param, h, position in self._params(rank):
            if param.chunk != draft:
                continue
            sent = self._sent(param)
            nbytes = sum(one.nbytes for one in sent)
            if wanted and nbytes > room:
                yield fill(rank, wanted)
                wanted, room = [], limit
            shares = tuple(self._shares(param, h, position, only))
            wanted.append(Wanted(sent, self.wire.dtype_of(param.storage), shares, len(sent) == 1 or self._whole(param)))
            room -= nbytes
        if wanted:
            yield fill(rank, wanted)

    def _params(self, rank: int) -> Iterator[tuple[EngineParam, int, int]]:
        """A rank's parameters, the group each belongs to, and the rank's position there."""
        for h, group in enumerate(self.target):
            position = self._positions[h].get(rank)
            if position is not None:
                yield from ((param, h, position) for param in engine_group(group))

    def _shares(self, param: EngineParam, h: int, position: int, only: int | None) -> Iterator[Share]:
        for wanted in param.pieces:
            for piece, ranks in self.held[wanted.tensor]:
                senders = self.senders.get((ranks, h))
                if senders is None or only not in (None, senders[position]):
                    continue
                found = overlap(piece, wanted)
                if found is not None:
                    yield Share(senders[position], found[0], found[1].box)

    def _whole(self, param: EngineParam) -> bool:
        return all(whole for _, _, _, whole in _regions(param, self.held, self.shapes))

    @cached_property
    def _positions(self) -> list[dict[int, int]]:
        return [{rank: index for index, rank in enumerate(group.ranks)} for group in self.target]

    def _sent(self, param: EngineParam) -> tuple[Sent, ...]:
        shape = param.tensor_shape
        if not self.wire.quantises(param.storage):
            return (Sent(param.name, self.wire.dtype_of(param.storage), shape),)
        return Sent(param.name, "float8_e4m3fn", shape), Sent(param.name + SCALE, "float32", (*shape[:-2], *scale_shape(shape[-2:])))


def direct_plan(
    arch: Architecture,
    layout: Layout,
    world_size: int,
    spelling: Spelling,
    engine: EngineLayout,
    wire: Wire,
    first: int = 0,
    mtp: bool = False,
) -> DirectPlan:
    """The plan from a trainer's layout to an engine's.

    Args:
        first: number of the engine's first rank: 0 when both share their GPUs, `world_size` when they do not.
        mtp: whether the engine drafts with the MTP layer.

    Raises:
        UserError: a layout does not fit the model, or the engine's cuts blocks that are to be quantised.
    """
    wire.check(arch)
    target = tuple(engine_holders(arch, engine, first, mtp))
    shapes = {tensor.name: tensor.shape for tensor in canonical(arch)}
    for param in engine_params(arch, engine, 0, mtp):
        if wire.quantises(param.storage):
            check_block_fp8(param, shapes)
    held = held_pieces(holders(arch, layout, world_size, spelling))
    nbytes: Counter[tuple[Ranks, int]] = Counter()
    late = 0
    for h, group in enumerate(target):
        for param in engine_group(group):
            regions = list(_regions(param, held, shapes))
            quantised = wire.quantises(param.storage)
            coded = quantised and all(whole for _, _, _, whole in regions)
            late += quantised and not coded
            itemsize = ITEMSIZE["float8_e4m3fn" if coded else wire.dtype_of(param.storage)]
            for ranks, size, blocks, _ in regions:
                nbytes[ranks, h] += size * itemsize + (blocks * ITEMSIZE["float32"] if coded else 0)
    return DirectPlan(wire, target, nbytes, _senders(target, nbytes), held, shapes, late)


def _regions(param: EngineParam, held: Held, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[Ranks, int, int, bool]]:
    """What a parameter takes from others: (who holds it, elements, blocks touched, whether no block is cut), region by region."""
    for wanted in param.pieces:
        for piece, ranks in held[wanted.tensor]:
            found = _measured(piece.source, wanted.source, shapes[wanted.tensor])
            if found is not None:
                yield ranks, *found


@lru_cache(maxsize=2**16)
def _measured(held: Box, wanted: Box, shape: tuple[int, ...]) -> tuple[int, int, bool] | None:
    """(elements, blocks, no block cut) of a common region. Layers and experts are alike, so few are not known already."""
    common = held.intersect(wanted)
    return None if common is None else (common.size, scale_box(common).size, whole_blocks(common, shape))


def _senders(target: tuple[Holders, ...], nbytes: Mapping[tuple[Ranks, int], int]) -> dict[tuple[Ranks, int], Ranks]:
    """The replica that serves each rank: elements without a choice are counted first, then the largest."""
    load = np.zeros(1 + max(max(ranks) for ranks, _ in nbytes), dtype=np.int64)
    senders: dict[tuple[Ranks, int], Ranks] = {}
    for (ranks, h), size in sorted(nbytes.items(), key=lambda item: (len(item[0][0]) > 1, -item[1])):
        choice, own = np.array(ranks), frozenset(ranks)
        chosen = []
        for rank in target[h].ranks:
            sender = rank if rank in own else int(choice[load[choice].argmin()])
            load[sender] += size if sender != rank else 0
            chosen.append(sender)
        senders[ranks, h] = tuple(chosen)
    return senders
