"""Axis-aligned boxes, and the piece: a box of a local parameter that is a box of a canonical tensor."""

from dataclasses import dataclass
from math import prod


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
        return tuple(stop - start for start, stop in zip(self.start, self.stop, strict=True))

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The box as an index: `tensor[box.slices]`."""
        return tuple(map(slice, self.start, self.stop))

    def intersect(self, other: "Box") -> "Box | None":
        """The common region, or None when it is empty."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        return Box(start, stop) if all(a < b for a, b in zip(start, stop, strict=True)) else None

    def shift(self, offset: tuple[int, ...]) -> "Box":
        """The same box with every index moved by `offset`."""
        return Box(
            tuple(a + d for a, d in zip(self.start, offset, strict=True)),
            tuple(b + d for b, d in zip(self.stop, offset, strict=True)),
        )

    def within(self, outer: "Box") -> "Box":
        """This box in the coordinates of `outer`, whose start becomes the origin."""
        return self.shift(tuple(-a for a in outer.start))


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
