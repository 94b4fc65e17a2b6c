"""The ranks of a layout by what they hold: a thousand ranks are a handful of classes."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from r1mega.config.layout import Layout
from r1mega.weights.architecture import Architecture
from r1mega.weights.placement import LocalParam, Spelling, holders

Held = frozenset[tuple[int, str, tuple[int, ...], bool]]
"""(chunk, name, shape, whether it is a buffer) of every parameter of a rank."""


@dataclass(frozen=True)
class RankClass:
    """Ranks whose parameters have the same names and shapes.

    `parameters`, `values`: of the parameters; `buffers`: values of persistent buffers, the expert biases, which are float32.
    """

    ranks: tuple[int, ...]
    parameters: int
    values: int
    buffers: int

    @property
    def bytes_in_bf16(self) -> int:
        """Bytes of the weights alone: parameters in bfloat16, buffers in float32."""
        return 2 * self.values + 4 * self.buffers


def rank_classes(arch: Architecture, layout: Layout, world_size: int, spelling: Spelling) -> list[RankClass]:
    """The classes of all ranks, by their lowest rank.

    UserError when the layout does not fit the model, ValueError when it does not divide the world.
    """
    parts: dict[int, list[Held]] = defaultdict(list)
    for group in holders(arch, layout, world_size, spelling):
        held = _held(group.params)
        for rank in group.ranks:
            parts[rank].append(held)
    ranks: dict[Held, list[int]] = defaultdict(list)
    # Ranks of one stage share their parts, as objects; joining each combination once keeps this linear in the model.
    joined: dict[tuple[int, ...], Held] = {}
    for rank in range(world_size):
        key = tuple(map(id, parts[rank]))
        if key not in joined:
            joined[key] = frozenset().union(*parts[rank])
        ranks[joined[key]].append(rank)
    return [_summed(held, members) for held, members in ranks.items()]


def _held(params: Iterable[LocalParam]) -> Held:
    return frozenset((param.chunk, param.name, param.shape, param.is_buffer) for param in params)


def _summed(held: Held, ranks: list[int]) -> RankClass:
    sizes = [(prod(shape), buffer) for _, _, shape, buffer in held]
    return RankClass(
        ranks=tuple(ranks),
        parameters=sum(not buffer for _, buffer in sizes),
        values=sum(size for size, buffer in sizes if not buffer),
        buffers=sum(size for size, buffer in sizes if buffer),
    )
