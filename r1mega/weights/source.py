"""Where an engine's weights come from: the shards of a trainer, a folder, tensors in memory."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from r1mega.weights.architecture import Architecture
from r1mega.weights.canonical import canonical
from r1mega.weights.sync import Bucket, Entry
from r1mega.weights.wire import Wire


class WeightSource(Protocol):
    """Weights of a model. Every rank has a source, calls it alike, and walks to the end what it gives."""

    @property
    def arch(self) -> Architecture:
        """The model that the weights are of. It may lack the MTP layers that the checkpoint has."""

    def tensors(self, dtype: torch.dtype) -> Iterable[tuple[str, Tensor]]:
        """Every canonical tensor, whole, on every rank; in `dtype` where the source has to make them, else as they are."""

    def buckets(self, wire: Wire, limit: int, senders: Sequence[int] | None) -> Iterator[tuple[Bucket, Tensor | None]]:
        """The same tensors bucket by bucket, in such pieces that no rank needs room for more than a few buckets.

        Args:
            wire: dtypes and names as the engine is sent them.
            limit: bytes of a bucket.
            senders: ranks that buckets may be gathered on; None: any.

        Yields:
            Each bucket, and its bytes (uint8 [bucket.nbytes]) on the rank `bucket.sender`, valid until the next one is asked for.
        """


@dataclass(frozen=True)
class Mapped:
    """Tensors that every rank has whole.

    `rounded`: the engine is given the values that they have in this dtype, which is that of the files they will be written to.
    """

    arch: Architecture
    weights: Mapping[str, Tensor]
    rounded: torch.dtype | None = None

    def tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        return ((name, self._read(name)) for name in self.weights)

    def buckets(self, wire: Wire, limit: int, senders: Sequence[int] | None) -> Iterator[tuple[Bucket, Tensor | None]]:
        return whole_buckets(self.arch, self._read, wire, limit)

    def _read(self, name: str) -> Tensor:
        return self.weights[name] if self.rounded is None else self.weights[name].to(self.rounded)


def whole_buckets(arch: Architecture, read: Callable[[str], Tensor], wire: Wire, limit: int) -> Iterator[tuple[Bucket, Tensor | None]]:
    """Buckets of tensors that rank 0 reads whole, one after the other."""
    import torch.distributed as dist

    for bucket in _simple(arch, wire, limit):
        yield bucket, _filled(bucket, read) if dist.get_rank() == 0 else None


def _filled(bucket: Bucket, read: Callable[[str], Tensor]) -> Tensor:
    flat = torch.empty(bucket.nbytes, dtype=torch.uint8)
    for entry in bucket.entries:
        place = flat[entry.offset : entry.offset + entry.nbytes].view(getattr(torch, entry.dtype)).view(entry.shape)
        place.copy_(read(entry.name))
    return flat


def _simple(arch, wire, limit):
    group, size, seen = [], 0, []
    out = []
    units = {}
    for t in canonical(arch):
        if t.copy_of is not None or t.name.startswith(tuple(f"model.layers.{arch.layers + d}." for d in range(arch.mtp_layers))):
            continue
        key = t.name.replace("kv_a_proj_with_mqa", "q_a_proj")
        units.setdefault(key, []).extend(wire.of(t))

    def flush():
        nonlocal group, size
        if not group:
            return
        entries = []
        off = 0
        for sent in sorted(group, key=lambda x: x.dtype != "float32"):
            entries.append(Entry(sent.name, sent.dtype, sent.shape, off, sent.nbytes))
            off += sent.nbytes
        out.append(Bucket(0, tuple(entries), {}))
        group, size = [], 0

    for unit in units.values():
        n = sum(x.nbytes for x in unit)
        if size + n > limit:
            flush()
        group += unit
        size += n
    flush()
    return out
