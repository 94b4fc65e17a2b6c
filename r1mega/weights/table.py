"""What a family's table is made of: one row per tensor, saying where Megatron keeps it and how it is split.

A table is data for one `Architecture`. Names in a row are relative to its layer; `{e}` stands for an expert
(its global number in the tensor's name, its local number in the parameter's).
"""

from dataclasses import dataclass
from enum import Enum


class Shard(Enum):
    """How tensor parallelism splits a tensor. Experts are split over etp, everything else over tp."""

    WHOLE = "every rank holds all of it"
    ROWS = "axis 0"
    COLUMNS = "axis 1"
    VOCABULARY = "axis 0, padded to a multiple of the parallel size"


class Storage(Enum):
    """How a Hugging Face checkpoint stores a tensor."""

    PLAIN = "the checkpoint's dtype"
    BLOCK_FP8 = "float8_e4m3fn with a `weight_scale_inv` in checkpoints that are block-quantised, otherwise the checkpoint's dtype"
    FLOAT32 = "float32 in every checkpoint"


@dataclass(frozen=True)
class Fused:
    """A tensor that is one of several parts of a parameter, all joined along axis 0.

    `parts` are the row counts of all parts, `index` says which one this is. The parts are cut into `groups`
    equal groups and the parameter is `[part 0 | part 1 | ..]` of group 0, then of group 1, and so on.
    None means one group per tensor-parallel rank.
    """

    index: int
    parts: tuple[int, ...]
    groups: int | None = None


@dataclass(frozen=True)
class Row:
    """One canonical tensor and the Megatron parameter that holds it."""

    tensor: str
    shape: tuple[int, ...]
    local: str
    te: str
    shard: Shard = Shard.WHOLE
    fused: Fused | None = None
    experts: int = 0
    storage: Storage = Storage.PLAIN
    buffer: bool = False


@dataclass(frozen=True)
class Mtp:
    """A multi-token-prediction layer: its own rows, and those of the transformer layer inside."""

    own: tuple[Row, ...]
    layer: tuple[Row, ...]


@dataclass(frozen=True)
class Table:
    """All rows of a model, by the place in the pipeline that holds them."""

    embedding: Row
    layers: tuple[tuple[Row, ...], ...]
    final_norm: Row
    head: Row | None
    """None when the output layer is the embedding (tied)."""
    mtp: tuple[Mtp, ...]
    mtp_copies: tuple[tuple[str, str], ...]
    """(name relative to an MTP layer, canonical tensor that the checkpoint repeats there)."""


def layer_prefix(index: int) -> str:
    """Prefix of a decoder layer's tensors; MTP layers are numbered after the last decoder layer."""
    return f"model.layers.{index}."
