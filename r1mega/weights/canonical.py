"""The canonical coordinates: every tensor of a model's Hugging Face checkpoint."""

from collections.abc import Iterator
from dataclasses import dataclass

from r1mega.weights import families
from r1mega.weights.architecture import Architecture
from r1mega.weights.table import Row, Storage, Table, layer_prefix


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the Hugging Face checkpoint: the canonical coordinates.

    `copy_of` names the tensor this one repeats. Such a tensor is never held, moved or read: it is rebuilt on writing.
    """

    name: str
    shape: tuple[int, ...]
    storage: Storage
    copy_of: str | None = None


def canonical(arch: Architecture) -> tuple[Tensor, ...]:
    """Every tensor of the model's Hugging Face checkpoint, once dequantised, in the checkpoint's order."""
    return tuple(_tensors(arch, families.table(arch)))


def _tensors(arch: Architecture, table: Table) -> Iterator[Tensor]:
    yield from _expand("", table.embedding)
    for index, rows in enumerate(table.layers):
        for row in rows:
            yield from _expand(layer_prefix(index), row)
    for depth, mtp in enumerate(table.mtp):
        prefix = layer_prefix(arch.layers + depth)
        for row in (*mtp.own, *mtp.layer):
            yield from _expand(prefix, row)
        for name, source in table.mtp_copies:
            yield Tensor(prefix + name, table.embedding.shape, Storage.PLAIN, copy_of=source)
    yield from _expand("", table.final_norm)
    if table.head is not None:
        yield from _expand("", table.head)


def _expand(prefix: str, row: Row) -> Iterator[Tensor]:
    if not row.experts:
        yield Tensor(prefix + row.tensor, row.shape, row.storage)
    for expert in range(row.experts):
        yield Tensor(prefix + row.tensor.format(e=expert), row.shape, row.storage)
