"""Values that ranks hold, from the tables that conversion uses (`weights.families`), without naming every parameter.

Equal to `weights.ranks.rank_classes` for every layout, which `tests/test_planner_memory.py` holds it to; a thousand times faster.
"""

from dataclasses import dataclass

from r1mega.config.layout import Layout
from r1mega.weights.architecture import Architecture
from r1mega.weights.pipeline import stages
from r1mega.weights.placement import Spelling, local_values, stage_rows
from r1mega.weights.table import Row


@dataclass(frozen=True)
class Values:
    """Values of one rank. `dense` are held alike by dp x cp ranks, `expert` by edp ranks; `buffers` are float32 and not trained."""

    dense: int = 0
    expert: int = 0
    buffers: int = 0

    def __add__(self, other: "Values") -> "Values":
        return Values(self.dense + other.dense, self.expert + other.expert, self.buffers + other.buffers)

    @property
    def trained(self) -> int:
        """Values with a gradient."""
        return self.dense + self.expert


def stage_values(arch: Architecture, layout: Layout) -> tuple[Values, ...]:
    """What a rank of each pipeline stage holds, all of its model chunks together; all ranks of a stage hold as much.

    Raises:
        UserError: the layout does not fit the model.
    """
    known: dict[int, Values] = {}

    def counted(rows: tuple[Row, ...]) -> Values:
        # A model's layers share their rows as objects (`families.table` is cached), so each kind of layer is counted once.
        if id(rows) not in known:
            known[id(rows)] = sum((_row(row, layout) for row in rows), Values())
            keep.append(rows)
        return known[id(rows)]

    keep: list[tuple[Row, ...]] = []
    return tuple(
        sum((counted(group.rows) for stage in chunks for group in stage_rows(arch, layout, stage, Spelling())), Values())
        for chunks in stages(arch, layout)
    )


def _row(row: Row, layout: Layout) -> Values:
    values = local_values(row, layout)
    if row.buffer:
        return Values(buffers=values)
    return Values(expert=values) if row.experts else Values(dense=values)
