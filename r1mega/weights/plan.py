"""Who sends what: one owner for every element of a replicated model, and transfers between two layouts.

Pure arithmetic on placements, the same on every rank, so no rank has to tell another what it will send.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from r1mega.config.layout import Layout
from r1mega.weights.architecture import Architecture
from r1mega.weights.boxes import Box, Piece
from r1mega.weights.canonical import Tensor, canonical
from r1mega.weights.placement import Holders, Spelling, holders
from r1mega.weights.table import Storage

Held = dict[str, list[tuple[Piece, tuple[int, ...]]]]
"""By canonical tensor, the pieces that make it up, each with all ranks that hold it in the same place."""


def held_pieces(groups: Iterable[Holders]) -> Held:
    """Every element once. Of a tensor that two stages hold (the embedding) only the first stage's ranks are named."""
    found: dict[str, dict[Box, tuple[Piece, set[int]]]] = defaultdict(dict)
    for group in groups:
        for piece in _pieces(group):
            first, ranks = found[piece.tensor].setdefault(piece.source, (piece, set()))
            if piece == first:
                ranks.update(group.ranks)
    together: dict[frozenset[int], tuple[int, ...]] = {}

    def shared(ranks: set[int]) -> tuple[int, ...]:
        return together.setdefault(frozenset(ranks), tuple(sorted(ranks)))

    return {name: [(piece, shared(ranks)) for piece, ranks in pieces.values()] for name, pieces in found.items()}


def owned_pieces(groups: list[Holders], world_size: int) -> list[list[Piece]]:
    """By rank, the pieces it answers for. Together they cover every canonical element exactly once.

    Pieces go, largest first, to the replica with the fewest elements so far. A piece larger than a rank's fair share is cut
    along its rows first, so that no rank answers for much more than the others when replicas leave the choice.
    """
    pieces = [(piece, np.array(ranks)) for found in held_pieces(groups).values() for piece, ranks in found]
    fair_share = -(-sum(piece.source.size for piece, _ in pieces) // world_size)
    parts = [(part, ranks) for piece, ranks in pieces for part in _cut(piece, min(len(ranks), -(-piece.source.size // fair_share)))]
    load = np.zeros(world_size, dtype=np.int64)
    owned: list[list[Piece]] = [[] for _ in range(world_size)]
    # Pieces that only one rank holds are no choice, so they are counted before any choice is made.
    for part, ranks in sorted(parts, key=lambda item: (len(item[1]) > 1, -item[0].source.size)):
        rank = int(ranks[load[ranks].argmin()])
        load[rank] += part.source.size
        owned[rank].append(part)
    return owned


def _cut(piece: Piece, count: int) -> Iterator[Piece]:
    """The piece in `count` parts of nearly equal rows (fewer when it has fewer rows)."""
    if count == 1:
        yield piece
        return
    rows = piece.source.shape[0]
    edges = sorted({rows * i // count for i in range(count + 1)})
    for first, last in pairwise(edges):
        yield Piece(piece.chunk, piece.param, _rows(piece.box, first, last), piece.tensor, _rows(piece.source, first, last))


def _rows(box: Box, first: int, last: int) -> Box:
    start = box.start[0]
    return Box((start + first, *box.start[1:]), (start + last, *box.stop[1:]))


@dataclass(frozen=True, slots=True)
class Send:
    """An owned piece: its shape and size, its offset in elements in its section of the owner's send buffer, and which section."""

    piece: Piece
    shape: tuple[int, ...]
    size: int
    offset: int
    float32: bool


@dataclass(frozen=True)
class ExportPlan:
    """How all ranks together rebuild the Hugging Face tensors by one all-gather of equally large byte buffers.

    A buffer has two sections: `float32_elements` of tensors that are float32 in every checkpoint, then, at the next
    multiple of 16 bytes, `weight_elements` in the dtype of the export. `sends[r]` lists what rank r puts where.
    """

    tensors: tuple[Tensor, ...]
    sends: tuple[tuple[Send, ...], ...]
    float32_elements: int
    weight_elements: int

    @property
    def weight_offset(self) -> int:
        """Bytes before the weight section."""
        return -(-4 * self.float32_elements // 16) * 16

    def nbytes(self, itemsize: int) -> int:
        """Bytes of one rank's buffer when weights take `itemsize` bytes each; a multiple of 16."""
        return self.weight_offset + -(-itemsize * self.weight_elements // 16) * 16


def export_plan(arch: Architecture, layout: Layout, world_size: int, spelling: Spelling) -> ExportPlan:
    """The plan by which every rank gets every canonical tensor. Tensors with `copy_of` are not among them."""
    tensors = tuple(tensor for tensor in canonical(arch) if tensor.copy_of is None)
    float32 = {tensor.name for tensor in tensors if tensor.storage is Storage.FLOAT32}
    sends, floats, weights = [], 0, 0
    for pieces in owned_pieces(holders(arch, layout, world_size, spelling), world_size):
        offsets = {True: 0, False: 0}
        row = []
        for piece in pieces:
            section, size = piece.tensor in float32, piece.source.size
            row.append(Send(piece, piece.source.shape, size, offsets[section], section))
            offsets[section] += size
        sends.append(tuple(row))
        floats, weights = max(floats, offsets[True]), max(weights, offsets[False])
    return ExportPlan(tensors, tuple(sends), floats, weights)


@dataclass(frozen=True, slots=True)
class Transfer:
    """One rectangular copy from a rank's parameter to another's; `sent.box` and `received.box` have the same shape."""

    source_rank: int
    target_rank: int
    sent: Piece
    received: Piece


@dataclass(frozen=True)
class Route:
    """What every rank of one group of replicas takes from one rank of another group: (sent, received) pairs."""

    source: tuple[int, ...]
    target: tuple[int, ...]
    copies: tuple[tuple[Piece, Piece], ...]
    turn: int

    def sender(self, target_rank: int) -> int:
        """The rank itself when it holds the elements already, otherwise the replicas take turns."""
        if target_rank in self._source_set:
            return target_rank
        return self.source[(self._position[target_rank] + self.turn) % len(self.source)]

    @cached_property
    def _source_set(self) -> frozenset[int]:
        return frozenset(self.source)

    @cached_property
    def _position(self) -> dict[int, int]:
        return {rank: index for index, rank in enumerate(self.target)}


@dataclass(frozen=True)
class TransferPlan:
    """Everything that moves from one layout to another, kept by groups of replicas so that it stays small for any world."""

    routes: tuple[Route, ...]

    def to(self, rank: int) -> Iterator[Transfer]:
        """What a rank of the target layout receives; the sender may be the rank itself. Covers its pieces exactly once."""
        for route in self.routes:
            if rank in route._position:
                sender = route.sender(rank)
                yield from (Transfer(sender, rank, sent, received) for sent, received in route.copies)

    def of(self, rank: int) -> Iterator[Transfer]:
        """What a rank of the source layout sends."""
        for route in self.routes:
            if rank in route._source_set:
                for target in route.target:
                    if route.sender(target) == rank:
                        yield from (Transfer(rank, target, sent, received) for sent, received in route.copies)


def transfer_plan(source: list[Holders], target: list[Holders]) -> TransferPlan:
    """The copies that turn a model held as `source` into the same model held as `target`.

    Both come from `placement.holders`, of the same architecture. Padding is not transferred.
    """
    held: dict[str, list[tuple[int, Piece]]] = defaultdict(list)
    seen = set()
    for index, group in enumerate(source):
        for piece in _pieces(group):
            if (piece.tensor, piece.source) not in seen:
                seen.add((piece.tensor, piece.source))
                held[piece.tensor].append((index, piece))
    routes: list[Route] = []
    for group in target:
        copies: dict[int, list[tuple[Piece, Piece]]] = defaultdict(list)
        for wanted in _pieces(group):
            for index, piece in held[wanted.tensor]:
                common = overlap(piece, wanted)
                if common is not None:
                    copies[index].append(common)
        routes += [Route(source[index].ranks, group.ranks, tuple(pairs), len(routes) + index) for index, pairs in copies.items()]
    return TransferPlan(tuple(routes))


def _pieces(group: Holders) -> Iterator[Piece]:
    return (piece for param in group.params for piece in param.pieces)


def overlap(held: Piece, wanted: Piece) -> tuple[Piece, Piece] | None:
    """The parts of two pieces of one tensor that are the same elements; None when there are none."""
    common = held.source.intersect(wanted.source)
    return None if common is None else (_part(held, common), _part(wanted, common))


def _part(piece: Piece, source: Box) -> Piece:
    if source == piece.source:
        return piece
    return Piece(piece.chunk, piece.param, source.within(piece.source).shift(piece.box.start), piece.tensor, source)
