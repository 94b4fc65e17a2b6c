"""The plan that carries a trainer's shards to an engine: which ranks send which regions to whom, bucket by bucket.

Pure arithmetic on placements, the same on every rank. Two paths share one unit, the bucket:

- `full_plan`: a bucket holds canonical tensors, one rank gathers it and hands it to every engine rank, whose own loader cuts it.
- `direct_plan` (module `direct`): a bucket holds parameters of one engine rank in that rank's own layout.

`shipping` executes both with torch.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from r1mega.config.layout import Layout
from r1mega.errors import UserError
from r1mega.weights.architecture import Architecture
from r1mega.weights.blocks import scale_box, whole_blocks
from r1mega.weights.boxes import Box, Piece
from r1mega.weights.canonical import Tensor, canonical
from r1mega.weights.placement import Spelling, holders
from r1mega.weights.plan import held_pieces
from r1mega.weights.table import layer_prefix
from r1mega.weights.wire import ITEMSIZE, DType, Sent, Wire

Form = Literal["values", "codes", "scales"]
"""What a segment carries: plain values, or the codes or the scales of values that the rank has quantised itself."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a bucket as the engine is told of it, and where it lies among the bucket's bytes.

    `quantised`: these are codes that the sender makes of gathered values, because some rank's region cuts a block;
    they travel to it in the wire's dtype. The scales, which it makes too, are the bucket's entry of the same name with `_scale_inv`.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    quantised: bool = False


@dataclass(frozen=True, slots=True)
class Segment:
    """Region `piece.box` of one rank's parameter, which becomes region `box` of entry `entry`.

    `box` counts in the entry as a matrix (leading axes folded into the rows). `offset` and `nbytes` place it in the rank's message.
    """

    piece: Piece
    form: Form
    entry: int
    box: Box
    dtype: DType
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Bucket:
    """Bytes that are handed to the engine at once.

    `entries` lie one behind the other without gaps, wide dtypes first, so each is aligned; `messages[r]` are the segments of rank r,
    which travel as one message to `sender`, where they are scattered over the entries. The sender's own are never sent.
    """

    sender: int
    entries: tuple[Entry, ...]
    messages: Mapping[int, tuple[Segment, ...]]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return sum(entry.nbytes for entry in self.entries)

    def message_bytes(self, rank: int) -> int:
        """Bytes of a rank's message; 0 for a rank that holds nothing of this bucket."""
        return sum(segment.nbytes for segment in self.messages.get(rank, ()))


# ---------------------------------------------------------------- filling a bucket


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank gives to a tensor: its piece, and the region of the tensor as a matrix that the piece fills."""

    rank: int
    piece: Piece
    box: Box


@dataclass(frozen=True)
class Wanted:
    """A tensor to be sent: what the engine is told of it (itself, or codes and scales), and who gives which part.

    `whole_blocks` says whether no share cuts a block, so that every rank can quantise its own.
    """

    sent: tuple[Sent, ...]
    values: DType
    shares: tuple[Share, ...]
    whole_blocks: bool


def fill(sender: int, wanted: Sequence[Wanted]) -> Bucket:
    """The bucket of some tensors."""
    order = sorted(((sent, tensor) for tensor in wanted for sent in tensor.sent), key=lambda item: -ITEMSIZE[item[0].dtype])
    entries: list[Entry] = []
    segments: dict[int, list[Segment]] = defaultdict(list)
    offset = 0
    for sent, tensor in order:
        form = _form(sent, tensor)
        quantised = len(tensor.sent) > 1 and not tensor.whole_blocks
        for share in tensor.shares if form else ():
            assert form is not None
            box = scale_box(share.box) if form == "scales" else share.box
            dtype = tensor.values if quantised else sent.dtype
            segments[share.rank].append(Segment(share.piece, form, len(entries), box, dtype, 0, box.size * ITEMSIZE[dtype]))
        entries.append(Entry(sent.name, sent.dtype, sent.shape, offset, sent.nbytes, quantised and sent is tensor.sent[0]))
        offset += sent.nbytes
    return Bucket(sender, tuple(entries), {rank: tuple(_message(found)) for rank, found in segments.items()})


def _form(sent: Sent, tensor: Wanted) -> Form | None:
    """What ranks send of an entry; None for scales that the sender makes itself."""
    if len(tensor.sent) == 1:
        return "values"
    if not tensor.whole_blocks:
        return "values" if sent is tensor.sent[0] else None
    return "codes" if sent is tensor.sent[0] else "scales"


def _message(segments: Iterable[Segment]) -> Iterator[Segment]:
    """Segments one behind the other, wide dtypes first, so that each is aligned."""
    offset = 0
    for segment in sorted(segments, key=lambda segment: -ITEMSIZE[segment.dtype]):
        yield replace(segment, offset=offset)
        offset += segment.nbytes


# ---------------------------------------------------------------- full tensors


@dataclass(frozen=True)
class FullPlan:
    """Buckets of canonical tensors, in the order in which they are sent.

    A sender differs from the last one, unless no other holds any of the bucket: one gathers while the other still sends.
    """

    wire: Wire
    buckets: tuple[Bucket, ...]

    @cached_property
    def nbytes(self) -> int:
        """Bytes that every engine rank receives."""
        return sum(bucket.nbytes for bucket in self.buckets)

    def gathered(self) -> Counter[tuple[int, int]]:
        """Bytes between trainer ranks, by (rank, sender)."""
        links: Counter[tuple[int, int]] = Counter()
        for bucket in self.buckets:
            for rank in bucket.messages:
                if rank != bucket.sender:
                    links[rank, bucket.sender] += bucket.message_bytes(rank)
        return links

    def handed_over(self) -> Counter[int]:
        """Bytes that each sender hands to the engine, once, however many ranks listen."""
        return Counter({rank: sum(b.nbytes for b in self.buckets if b.sender == rank) for rank in {b.sender for b in self.buckets}})

    def held(self, rank: int) -> int:
        """Most bytes that a rank holds beside its shards, when a sender takes one message at a time and hands over before it gathers again.

        A sender holds its bucket, the matrices of it that it must quantise itself, and the message in hand; others their own message.
        """
        return max((_held(bucket, rank) for bucket in self.buckets), default=0)


def _held(bucket: Bucket, rank: int) -> int:
    if rank != bucket.sender:
        return bucket.message_bytes(rank)
    staged = {segment.entry: segment for found in bucket.messages.values() for segment in found if bucket.entries[segment.entry].quantised}
    matrices = sum(bucket.entries[entry].nbytes * ITEMSIZE[segment.dtype] for entry, segment in staged.items())
    others = (bucket.message_bytes(other) for other in bucket.messages if other != rank)
    return bucket.nbytes + matrices + max(others, default=0)


def full_plan(
    arch: Architecture,
    layout: Layout,
    world_size: int,
    spelling: Spelling,
    wire: Wire,
    limit: int,
    senders: Sequence[int] | None = None,
    mtp: bool = False,
) -> FullPlan:
    """Every canonical tensor in buckets of at most `limit` bytes; tensors that must arrive together, or are larger, exceed it.

    A bucket holds tensors of one home: the ranks that hold any of them. So an expert that one rank holds whole is gathered from nobody,
    and the buckets of different homes take turns.

    Args:
        limit: bytes of a bucket as sent, scales included.
        senders: trainer ranks that may hand a bucket to the engine (each needs a process group with it); all when left out.
        mtp: whether the engine drafts with the MTP layer; without, its loader would drop those tensors.

    Raises:
        UserError: the layout does not fit the model, nobody may send, or the engine could not load what is sent.
    """
    wire.check(arch)
    allowed = frozenset(range(world_size) if senders is None else senders)
    if not allowed or not allowed <= set(range(world_size)):
        raise UserError(f"weight sync: senders {sorted(allowed)} are not among the {world_size} ranks of the trainer")
    held = held_pieces(holders(arch, layout, world_size, spelling))
    homes: dict[frozenset[int], list[tuple[Tensor, ...]]] = defaultdict(list)
    for unit in _units(arch, mtp):
        homes[frozenset(rank for tensor in unit for _, ranks in held[tensor.name] for rank in ranks)].append(unit)
    turns = []
    for home, units in homes.items():
        packed = _packed(units, wire, limit)
        turns += [((index + 0.5) / len(packed), home, tensors) for index, tensors in enumerate(packed)]
    buckets: list[Bucket] = []
    load: Counter[int] = Counter()
    for _, home, tensors in sorted(turns, key=lambda turn: turn[0]):
        last = buckets[-1].sender if buckets else -1
        sender = min(home & allowed or allowed, key=lambda rank: (rank == last, load[rank], rank))
        buckets.append(fill(sender, [_wanted(tensor, held[tensor.name], sender, wire, load) for tensor in tensors]))
        load[sender] += buckets[-1].nbytes
    return FullPlan(wire, tuple(buckets))


def _units(arch: Architecture, mtp: bool) -> Iterator[tuple[Tensor, ...]]:
    """Canonical tensors that the engine must get in one call, in the checkpoint's order.

    SGLang keeps q_a_proj and kv_a_proj_with_mqa in one parameter, and its loader forgets the one when the other is not in the same call.
    """
    dropped = () if mtp else tuple(layer_prefix(arch.layers + depth) for depth in range(arch.mtp_layers))
    tensors = {t.name: t for t in canonical(arch) if t.copy_of is None and not t.name.startswith(dropped)}
    for name, tensor in tensors.items():
        if name.endswith(_KV_A) and name.replace(_KV_A, _Q_A) in tensors:
            continue
        partner = tensors.get(name.replace(_Q_A, _KV_A)) if name.endswith(_Q_A) else None
        yield (tensor, partner) if partner else (tensor,)


_Q_A, _KV_A = "self_attn.q_a_proj.weight", "self_attn.kv_a_proj_with_mqa.weight"


def _packed(units: Iterable[tuple[Tensor, ...]], wire: Wire, limit: int) -> list[list[Tensor]]:
    """Units in order, in groups of at most `limit` bytes or one unit."""
    packed: list[list[Tensor]] = []
    room = 0
    for unit in units:
        nbytes = sum(sent.nbytes for tensor in unit for sent in wire.of(tensor))
        if nbytes > room:
            packed.append([])
            room = limit
        packed[-1] += unit
        room -= nbytes
    return packed


def _wanted(tensor: Tensor, pieces: Sequence[tuple[Piece, tuple[int, ...]]], sender: int, wire: Wire, load: Counter[int]) -> Wanted:
    """Who gives which part of a tensor: the sender what it holds, otherwise the replica that has sent least so far."""
    aligned = all(whole_blocks(piece.source, tensor.shape) for piece, _ in pieces)
    shares = []
    for piece, ranks in pieces:
        rank = sender if sender in ranks else min(ranks, key=lambda rank: (load[rank], rank))
        if rank != sender:
            load[rank] += piece.source.size * ITEMSIZE[wire.dtype_of(tensor.storage)]
        shares.append(Share(rank, piece, piece.source))
    return Wanted(wire.of(tensor), wire.dtype_of(tensor.storage), tuple(shares), aligned)
