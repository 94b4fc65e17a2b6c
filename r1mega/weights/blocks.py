"""The grid of DeepSeek's block FP8, without its values: one scale for every 128 x 128 block (arXiv 2412.19437, section 3.3)."""

from r1mega.weights.boxes import Box

BLOCK = 128
SCALE = "_scale_inv"
"""Ends the name of a block-quantised matrix's scales."""


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of a matrix of this shape; blocks at the right and bottom edge may be smaller."""
    return tuple(-(-extent // BLOCK) for extent in shape)


def scale_box(box: Box) -> Box:
    """The scales of exactly the blocks that a region touches."""
    return Box(tuple(start // BLOCK for start in box.start), tuple(-(-stop // BLOCK) for stop in box.stop))


def whole_blocks(box: Box, shape: tuple[int, ...]) -> bool:
    """Whether a region of a matrix cuts no block, so that it can be quantised without its neighbours."""
    starts = all(start % BLOCK == 0 for start in box.start)
    return starts and all(stop % BLOCK == 0 or stop == extent for stop, extent in zip(box.stop, shape, strict=True))
