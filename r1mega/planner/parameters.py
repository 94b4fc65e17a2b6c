"""Values that ranks hold, from the tables that conversion uses (`weights.families`), without naming every parameter.

Equal to `weights.ranks.rank_classes` for every layout, which `tests/test_planner_memory.py` holds it to; a thousand times faster.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from r1mega.config.layout import Layout
from r1mega.weights.architecture import Architecture
from r1mega.weights.pipeline import Stage, stages
from r1mega.weights.placement import Spelling, local_values, stage_rows
from r1mega.weights.table import Row, Storage


@dataclass(frozen=True)
class Values:
    """Values of one rank. `dense` are held alike by dp x cp ranks, `expert` by edp ranks; `buffers` are float32 and not trained.

    `linear`: of the trained ones those that an FP8 recipe quantises.
    """

    dense: int = 0
    expert: int = 0
    buffers: int = 0
    linear: int = 0

    def __add__(self, other: "Values") -> "Values":
        return Values(self.dense + other.dense, self.expert + other.expert, self.buffers + other.buffers, self.linear + other.linear)

    def __mul__(self, count: int) -> "Values":
        return Values(self.dense * count, self.expert * count, self.buffers * count, self.linear * count)

    @property
    def trained(self) -> int:
        """Values with a gradient."""
        return self.dense + self.expert


def cut(arch: Architecture, layout: Layout) -> tuple[tuple[Stage, ...], ...]:
    """`weights.pipeline.stages`, remembered: a search asks for the same cut under many sizes of everything else.

    Raises:
        UserError: the layout does not fit the model.
    """
    return _cut(arch, layout.pp, layout.vpp, layout.pipeline)


@lru_cache(maxsize=4096)
def _cut(arch: Architecture, pp: int, vpp: int, pipeline: str | None) -> tuple[tuple[Stage, ...], ...]:
    return stages(arch, Layout(pp=pp, vpp=vpp, pipeline=pipeline))


def kinds(arch: Architecture, layout: Layout) -> tuple[tuple[int, int], ...]:
    """(first, how many) of the pipeline stages that are alike: the same layers, dense or not, embedding, MTP and loss in every chunk."""
    return _kinds(arch, layout.pp, layout.vpp, layout.pipeline)


@lru_cache(maxsize=4096)
def _kinds(arch: Architecture, pp: int, vpp: int, pipeline: str | None) -> tuple[tuple[int, int], ...]:
    first_moe = arch.layers if arch.moe is None else arch.moe.first_dense_layers
    found: dict[Any, list[int]] = {}
    for stage, chunks in enumerate(_cut(arch, pp, vpp, pipeline)):
        content = tuple(
            (chunk.embedding, sum(layer < first_moe for layer in chunk.layers), len(chunk.layers), len(chunk.mtp), chunk.loss,
             arch.layers - 1 in chunk.layers)
            for chunk in chunks
        )  # fmt: skip
        found.setdefault(content, []).append(stage)
    return tuple((members[0], len(members)) for members in found.values())


def stage_values(arch: Architecture, layout: Layout) -> tuple[Values, ...]:
    """What a rank of each pipeline stage holds, all of its model chunks together; all ranks of a stage hold as much.

    Raises:
        UserError: the layout does not fit the model.
    """
    return _stage_values(arch, layout.tp, layout.ep, layout.etp, layout.pp, layout.vpp, layout.pipeline)


@lru_cache(maxsize=65536)
def _stage_values(arch: Architecture, tp: int, ep: int, etp: int, pp: int, vpp: int, pipeline: str | None) -> tuple[Values, ...]:
    layout = Layout(tp=tp, ep=ep, etp=etp)
    by_stage = _composition(arch, pp, vpp, pipeline)
    # Layers of a kind share their rows as objects (`families.table` is cached), so each kind is counted once.
    kinds = {id(rows): rows for stage in by_stage for rows, _ in stage}
    each = {key: sum((_row(row, layout) for row in rows), Values()) for key, rows in kinds.items()}
    return tuple(sum((each[id(rows)] * count for rows, count in stage), Values()) for stage in by_stage)


@lru_cache(maxsize=4096)
def _composition(arch: Architecture, pp: int, vpp: int, pipeline: str | None) -> tuple[tuple[tuple[tuple[Row, ...], int], ...], ...]:
    """By pipeline stage: groups of rows, and how often they stand there."""
    layout = Layout(pp=pp, vpp=vpp, pipeline=pipeline)
    found = []
    for chunks in _cut(arch, pp, vpp, pipeline):
        groups: dict[int, tuple[tuple[Row, ...], int]] = {}
        for group in (group for stage in chunks for group in stage_rows(arch, layout, stage, Spelling())):
            groups[id(group.rows)] = group.rows, groups.get(id(group.rows), (group.rows, 0))[1] + 1
        found.append(tuple(groups.values()))
    return tuple(found)


def _row(row: Row, layout: Layout) -> Values:
    values = local_values(row, layout)
    if row.buffer:
        return Values(buffers=values)
    linear = values if row.storage is Storage.BLOCK_FP8 else 0
    return Values(expert=values, linear=linear) if row.experts else Values(dense=values, linear=linear)
