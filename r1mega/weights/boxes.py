"""Axis-aligned boxes, and the piece: a box of a local parameter that is a box of a canonical tensor."""

from dataclasses import dataclass
from math import prod
from operator import add, lt, sub


@dataclass(frozen=True, slots=True)
class Box:
    """The half-open region `start <= index < stop` of a tensor, one entry per axis."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> "Box":
        """The box of a whole tensor."""
        return cls((0,) * len(shape), shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Extent along each axis."""
        return tuple(map(sub, self.stop, self.start))

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(map(sub, self.stop, self.start))

    @property
    def slices(self) -> tuple[slice, ...]:
        """The box as an index: `tensor[box.slices]`."""
        return tuple(map(slice, self.start, self.stop))

    def intersect(self, other: "Box") -> "Box | None":
        """The common region, or None when it is empty."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        return Box(start, stop) if all(map(lt, start, stop)) else None

    def shift(self, offset: tuple[int, ...]) -> "Box":
        """The same box with every index moved by `offset`."""
        return Box(tuple(map(add, self.start, offset)), tuple(map(add, self.stop, offset)))

    def within(self, outer: "Box") -> "Box":
        """This box in the coordinates of `outer`, whose start becomes the origin."""
        return Box(tuple(map(sub, self.start, outer.start)), tuple(map(sub, self.stop, outer.start)))


@dataclass(frozen=True, slots=True)
class Piece:
    """Region `box` of parameter `param` of model chunk `chunk` is region `source` of canonical tensor `tensor`.

    The two boxes have the same shape, so moving a piece is a copy. A parameter that fuses several tensors
    (gate and up, or q, k and v) is several pieces; elements that no piece covers are padding.
    """

    chunk: int
    param: str
    box: Box
    tensor: str
    source: Box
