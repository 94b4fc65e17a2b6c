"""Where Megatron keeps every canonical tensor: the parameters of a rank, their shapes, and the pieces they are made of.

Pure arithmetic on the family's table; nothing here imports Megatron or torch.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Literal

from r1mega.config.layout import Coordinates, Layout
from r1mega.errors import UserError
from r1mega.weights import families
from r1mega.weights.architecture import Architecture
from r1mega.weights.boxes import Box, Piece
from r1mega.weights.pipeline import Stage, stages
from r1mega.weights.table import Fused, Row, Shard, layer_prefix

Axis = Literal["tp", "cp", "dp", "pp", "edp"]
Kind = Literal["all", "dense", "experts"]


@dataclass(frozen=True)
class Spelling:
    """How one build of Megatron names parameters.

    `spec`: "local" (norms stand alone, one module per expert) or "te" (Transformer Engine: fused norms, grouped experts).
    `mtp_layer`: the attribute of an MTP layer that holds its transformer layer; 0.16 and 0.19 differ.
    """

    spec: Literal["local", "te"] = "local"
    mtp_layer: Literal["transformer_layer", "mtp_model_layer"] = "transformer_layer"


@dataclass(frozen=True, slots=True)
class LocalParam:
    """A parameter or buffer of one rank.

    `name` is its name in model chunk `chunk` (`named_parameters()`), `shape` its local shape.
    `replicated` are the axes along which other ranks hold the same elements; expert parameters live in
    (etp, ep, edp, pp) coordinates, all others in (tp, cp, dp, pp). "pp" marks the copy of the embedding
    that another stage also holds.
    """

    name: str
    chunk: int
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    replicated: tuple[Axis, ...]
    is_buffer: bool = False
    is_expert: bool = False


def placement(arch: Architecture, layout: Layout, world_size: int, rank: int, spelling: Spelling) -> list[LocalParam]:
    """Every parameter and persistent buffer of a rank, chunk by chunk.

    UserError when the layout does not divide the model, ValueError when it does not divide the world.
    """
    check_layout(arch, layout)
    at = layout.coordinates(rank, world_size)
    return [param for stage in stages(arch, layout)[at.pp] for param in stage_params(arch, layout, stage, at, spelling)]


def check_layout(arch: Architecture, layout: Layout) -> None:
    """UserError when a parallel size does not divide what it splits."""
    checks = [
        ("tp", layout.tp, arch.heads, "attention heads"),
        ("tp", layout.tp, arch.intermediate_size, "columns of the dense MLP"),
    ]
    if arch.mla is None:
        checks.append(("tp", layout.tp, arch.kv_heads, "key-value heads"))
    if arch.mtp_layers:
        checks.append(("tp", layout.tp, arch.hidden, "rows of the MTP projection (hidden size)"))
    if arch.moe is not None:
        checks.append(("ep", layout.ep, arch.moe.experts, "experts"))
        checks.append(("etp", layout.etp, arch.moe.intermediate_size, "columns of an expert"))
        checks.append(("tp", layout.tp, arch.moe.shared_experts * arch.moe.intermediate_size, "columns of the shared experts"))
    elif layout.ep > 1 or layout.etp > 1:
        raise UserError(f"layout: ep={layout.ep} and etp={layout.etp} need a model with experts")
    for name, size, what, unit in checks:
        if what % size:
            near = min((divisor for divisor in range(1, what + 1) if what % divisor == 0), key=lambda divisor: abs(divisor - size))
            raise UserError(f"layout: {name}={size} does not divide the model's {what} {unit}; {near} does")


def padded_vocab(arch: Architecture, tp: int) -> int:
    """Rows of the embedding and the output layer over all tp ranks."""
    return -(-arch.vocab // tp) * tp


@dataclass(frozen=True)
class Holders:
    """Ranks that hold the same elements, and the parameters they hold alike: all dense ones, or all expert ones, of their stage.

    `params` can be walked through again and again; an engine's make them on the way.
    """

    ranks: tuple[int, ...]
    params: Iterable[LocalParam]


def holders(arch: Architecture, layout: Layout, world_size: int, spelling: Spelling) -> list[Holders]:
    """The placement of all ranks at once. A rank appears twice: among its dense replicas and among its expert replicas.

    Work and memory grow with the model and its parallel sizes, not with data parallelism.
    """
    check_layout(arch, layout)
    by_pp = stages(arch, layout)
    groups: dict[tuple[bool, int, int, int], list[int]] = {}
    example: dict[tuple[bool, int, int, int], Coordinates] = {}
    for rank, at in enumerate(layout.all_coordinates(world_size)):
        for key in ((False, at.pp, at.tp, 0), (True, at.pp, at.etp, at.ep)):
            groups.setdefault(key, []).append(rank)
            example.setdefault(key, at)
    result = []
    for key, ranks in groups.items():
        experts, pp = key[:2]
        kind: Kind = "experts" if experts else "dense"
        params = (param for stage in by_pp[pp] for param in stage_params(arch, layout, stage, example[key], spelling, kind))
        result.append(Holders(tuple(ranks), tuple(params)))
    return [group for group in result if group.params]


def stage_params(
    arch: Architecture, layout: Layout, stage: Stage, at: Coordinates, spelling: Spelling, kind: Kind = "all"
) -> Iterator[LocalParam]:
    """Parameters of one model chunk at the given coordinates (of which pp is ignored: the stage says it)."""
    split = _Split(layout, at, stage.chunk, spelling.spec, kind)
    for group in stage_rows(arch, layout, stage, spelling):
        yield from split.params(group.prefix, group.param_prefix, group.rows, group.copies)


@dataclass(frozen=True, slots=True)
class Rows:
    """Consecutive rows of a model chunk: the prefixes of their tensors and parameters, and the axes along which other ranks copy them."""

    prefix: str
    param_prefix: str
    rows: tuple[Row, ...]
    copies: tuple[Axis, ...] = ()


def stage_rows(arch: Architecture, layout: Layout, stage: Stage, spelling: Spelling) -> Iterator[Rows]:
    """The rows of one model chunk, whatever the rank's share of them."""
    table = families.table(arch)
    if stage.embedding or stage.mtp:
        tied_head = table.head is None and not (stage.embedding and stage.loss)
        copies: tuple[Axis, ...] = ("pp",) if layout.pp > 1 and (arch.mtp_layers or tied_head) else ()
        yield Rows("", "", (table.embedding,), copies)
    for index in stage.layers:
        yield Rows(layer_prefix(index), f"decoder.layers.{index - stage.layers.start}.", table.layers[index])
    # With MTP the final norm follows the last decoder layer, which may stand before the stage of the loss.
    if (arch.layers - 1 in stage.layers) if arch.mtp_layers else stage.loss:
        yield Rows("", "", (table.final_norm,))
    for depth in stage.mtp:
        prefix, own = layer_prefix(arch.layers + depth), f"mtp.layers.{depth - stage.mtp.start}."
        yield Rows(prefix, own, table.mtp[depth].own)
        yield Rows(prefix, f"{own}{spelling.mtp_layer}.", table.mtp[depth].layer)
    if stage.loss:
        if table.head is not None:
            yield Rows("", "", (table.head,))
        elif not (stage.embedding or stage.mtp):
            yield Rows("", "", (_tied_head(table.embedding),), ("pp",))


def local_values(row: Row, layout: Layout) -> int:
    """Values of a row that each rank holds, padding included: of experts, those of all its experts together."""
    if row.fused is not None and row.fused.index > 0:
        return 0  # counted with the first part of its parameter
    shape, _ = _Split(layout, _ORIGIN, 0, "local", "all")._regions(row)
    return prod(shape) * (row.experts // layout.ep if row.experts else 1)


def _tied_head(embedding: Row) -> Row:
    """The output layer of a later stage holds a copy of a tied embedding."""
    return Row(embedding.tensor, embedding.shape, "output_layer.weight", "output_layer.weight", embedding.shard)


_ORIGIN = Coordinates(tp=0, cp=0, dp=0, pp=0, etp=0, ep=0, edp=0)


@dataclass(frozen=True)
class _Split:
    """Rows to parameters, at one rank's coordinates."""

    layout: Layout
    at: Coordinates
    chunk: int
    spec: Literal["local", "te"]
    kind: Kind

    def params(self, prefix: str, param_prefix: str, rows: Iterable[Row], copies: tuple[Axis, ...] = ()) -> Iterator[LocalParam]:
        """Parameters of consecutive rows; rows that name the same parameter are fused into one."""
        found: dict[str, _Growing] = {}
        for row in rows:
            if self.kind != "all" and (self.kind == "experts") != (row.experts > 0):
                continue
            shape, regions = self._regions(row)
            param_name = row.te if self.spec == "te" else row.local
            for tensor, param in self._names(row.tensor, param_name, row.experts):
                name = param_prefix + param
                target = found.setdefault(name, _Growing(shape, row))
                target.pieces.extend(Piece(self.chunk, name, box, prefix + tensor, source) for box, source in regions)
        for name, target in found.items():
            yield LocalParam(
                name=name,
                chunk=self.chunk,
                shape=target.shape,
                pieces=tuple(target.pieces),
                replicated=_replicated(target.row) + copies,
                is_buffer=target.row.buffer,
                is_expert=target.row.experts > 0,
            )

    def _names(self, tensor: str, param: str, experts: int) -> Iterator[tuple[str, str]]:
        if not experts:
            yield tensor, param
            return
        local = experts // self.layout.ep
        for index in range(local):
            yield tensor.format(e=self.at.ep * local + index), param.format(e=index)

    def _regions(self, row: Row) -> tuple[tuple[int, ...], list[tuple[Box, Box]]]:
        """(shape of the local parameter, [(box of the parameter, box of the tensor)])."""
        part, parts = (self.at.etp, self.layout.etp) if row.experts else (self.at.tp, self.layout.tp)
        if row.shard is Shard.WHOLE:
            return row.shape, [(Box.whole(row.shape), Box.whole(row.shape))]
        if row.fused is not None:
            return _fused(row.shape, row.fused, part, parts)
        axis = 1 if row.shard is Shard.COLUMNS else 0
        extent = row.shape[axis]
        width = -(-extent // parts)
        first, last = min(part * width, extent), min((part + 1) * width, extent)
        shape = _with(row.shape, axis, width)
        if first == last:  # a rank whose share of the vocabulary is padding only
            return shape, []
        source = Box(_with((0,) * len(shape), axis, first), _with(row.shape, axis, last))
        return shape, [(source.shift(_with((0,) * len(shape), axis, -first)), source)]


@dataclass
class _Growing:
    shape: tuple[int, ...]
    row: Row
    pieces: list[Piece] = field(default_factory=list)


def _fused(shape: tuple[int, ...], fused: Fused, part: int, parts: int) -> tuple[tuple[int, ...], list[tuple[Box, Box]]]:
    groups = fused.groups or parts
    widths = [rows // groups for rows in fused.parts]
    offset, width, group_width = sum(widths[: fused.index]), widths[fused.index], sum(widths)
    local = groups // parts
    zeros, rest = (0,) * (len(shape) - 1), shape[1:]
    regions = []
    for group in range(local):
        to, origin = group * group_width + offset, (part * local + group) * width
        regions.append((Box((to, *zeros), (to + width, *rest)), Box((origin, *zeros), (origin + width, *rest))))
    return (local * group_width, *rest), regions


def _with(values: tuple[int, ...], axis: int, value: int) -> tuple[int, ...]:
    return (*values[:axis], value, *values[axis + 1 :])


def _replicated(row: Row) -> tuple[Axis, ...]:
    if row.experts:
        return ("edp",)
    return ("tp", "cp", "dp") if row.shard is Shard.WHOLE else ("cp", "dp")
