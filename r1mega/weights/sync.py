"""The plan that carries a trainer's shards to an engine: which ranks send which regions to whom, bucket by bucket.

Pure arithmetic on placements, the same on every rank. Two paths share one unit, the bucket:

- `full_plan`: a bucket holds canonical tensors, one rank gathers it and hands it to every engine rank, whose own loader cuts it.
- `direct_plan` (module `direct`): a bucket holds parameters of one engine rank in that rank's own layout.

`shipping` executes both with torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from r1mega.config.layout import Layout
from r1mega.weights.architecture import Architecture
from r1mega.weights.boxes import Box, Piece
from r1mega.weights.placement import Spelling
from r1mega.weights.wire import DType, Wire

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


@dataclass(frozen=True)
class FullPlan:
    """Buckets of canonical tensors, in the order in which they are sent. Neighbours have different senders where there are two.

    So one rank can gather the next bucket while another still sends the last, and none holds more than one.
    """

    wire: Wire
    buckets: tuple[Bucket, ...]


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

    Args:
        limit: bytes of a bucket as sent, scales included.
        senders: trainer ranks that may hand a bucket to the engine (each needs a process group with it); all when left out.
        mtp: whether the engine drafts with the MTP layer; without, its loader would drop those tensors.

    Raises:
        UserError: the layout does not fit the model.
    """
    raise NotImplementedError
