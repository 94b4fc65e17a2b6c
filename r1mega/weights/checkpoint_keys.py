"""The model part of a Megatron distributed checkpoint: its keys, global shapes, and what of the Hugging Face tensors stands where.

Keys are those of Megatron-Core's Transformer Engine layers under every platform, so a checkpoint written on a CPU opens on a GPU.
How layers and experts become keys is what Megatron-LM does by default (megatron-core 0.16 and 0.19, `singleton_local_shards` off):

- A model with experts lists its layers in `moe_layer_freq`, which makes `TransformerBlock` store every layer under keys of its own,
  `decoder.layers.7.` and so on. A dense model's layers are stored as one tensor per parameter, `decoder.layers.`, with the layer as
  first axis. Storing dense layers one by one is an option there (`non_homogeneous_layers`), which a reader that takes no notice of
  the checkpoint's metadata would not expect.
- All experts of a layer are one tensor with the expert as first axis, `mlp.experts.experts.`; gate and up are joined along the next.
- An MTP layer is stored under its own number, and the layer inside as `transformer_layer`, whatever the attribute is called (0.19).
- The vocabulary is not padded. Megatron-Core pads it for its own tensor-parallel size on reading, and ignores a writer's padding.
"""

import re
from dataclasses import dataclass

from r1mega.config.layout import Layout
from r1mega.weights.architecture import Architecture
from r1mega.weights.boxes import Box
from r1mega.weights.canonical import canonical
from r1mega.weights.placement import LocalParam, Spelling, placement
from r1mega.weights.table import Storage


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of the checkpoint. `parts` cover it exactly once.

    A part says: this region of the stored tensor is that region of that canonical tensor. The stored region may have one leading axis
    more, of extent 1 (the layer or the expert); the other extents agree.
    """

    key: str
    shape: tuple[int, ...]
    float32: bool
    parts: tuple[tuple[Box, str, Box], ...]


def stored_tensors(arch: Architecture) -> tuple[StoredTensor, ...]:
    """Every tensor of the model in a distributed checkpoint; canonical tensors that copy others have no part in it."""
    float32 = {tensor.name for tensor in canonical(arch) if tensor.storage is Storage.FLOAT32}
    shapes: dict[str, tuple[int, ...]] = {}
    parts: dict[str, list[tuple[Box, str, Box]]] = {}
    for param in placement(arch, Layout(), 1, 0, Spelling("te", "transformer_layer")):
        key, axis = _stored(arch, param)
        shapes[key] = param.shape if axis is None else (axis[1], *param.shape)
        parts.setdefault(key, []).extend(
            (piece.box if axis is None else _at(axis[0], piece.box), piece.tensor, piece.source) for piece in param.pieces
        )
    return tuple(StoredTensor(key, shape, parts[key][0][1] in float32, tuple(parts[key])) for key, shape in shapes.items())


def _stored(arch: Architecture, param: LocalParam) -> tuple[str, tuple[int, int] | None]:
    """(key, (index, extent) of the leading axis that the checkpoint adds)."""
    if param.is_expert:
        assert arch.moe is not None
        match = re.fullmatch(r"(.*\.experts\.)(.*?)(\d+)", param.name)
        assert match is not None, param.name
        return f"{match[1]}experts.{match[2]}", (int(match[3]), arch.moe.experts)
    match = re.fullmatch(r"(decoder\.layers\.)(\d+)\.(.*)", param.name)
    if match is not None and arch.moe is None:
        return match[1] + match[3], (int(match[2]), arch.layers)
    return param.name, None


def _at(index: int, box: Box) -> Box:
    return Box((index, *box.start), (index + 1, *box.stop))
