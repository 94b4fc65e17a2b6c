"""Any rank of a model of any size, built by Megatron-Core itself on the meta device, against what the weight tables say it holds."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core import package_info

from r1mega.config.layout import Layout
from r1mega.config.training import Train
from r1mega.megatron import model, platform, topology
from r1mega.megatron.architecture import transformer_config
from r1mega.weights.architecture import Architecture
from r1mega.weights.placement import LocalParam, Spelling

Key = tuple[int, str]
LIBRARY = f"megatron-core {package_info.__shortversion__}"


@dataclass(frozen=True)
class BuiltRank:
    """What Megatron-Core built for one rank.

    `shapes`: parameters and persistent buffers by (chunk, name).
    `layers`: number in the whole model, from 0, of each decoder layer by (chunk, local index).
    `experts`: numbers of the rank's experts, in the order of their local indices; empty without experts.
    """

    shapes: dict[Key, tuple[int, ...]]
    layers: dict[tuple[int, int], int]
    experts: tuple[int, ...]


def spelling() -> Spelling:
    """The spelling of a rank that is built here: local layers, and this megatron-core's name inside an MTP layer."""
    return Spelling("local", model.mtp_layer_name())


def build_rank(arch: Architecture, layout: Layout, world_size: int, rank: int) -> BuiltRank:
    """Build one rank of a world that need not exist. No weights are allocated; the time goes into Megatron-Core's process groups.

    UserError when Megatron-Core cannot train this model under this layout, or not correctly (`topology.check`).
    """
    topology.check(arch, layout, world_size)
    with platform.imagined(rank, world_size):
        topology.connect(layout)
        config = transformer_config(arch, layout, Train(mtp_loss=0.1 if arch.mtp_layers else 0.0))
        with torch.device("meta"):
            chunks = model.build(arch, layout, config)
        # A stage may hold an MTP layer and no decoder layer.
        moe = (module for chunk in chunks for module in chunk.modules() if hasattr(module, "local_expert_indices"))
        return BuiltRank(
            shapes={key: tuple(weight.shape) for key, weight in model.named_weights(chunks).items()},
            layers={
                (index, local): layer.layer_number - 1
                for index, chunk in enumerate(chunks)
                for local, layer in enumerate(chunk.decoder.layers)
            },
            experts=next((tuple(module.local_expert_indices) for module in moe), ()),
        )


def differences(placed: Sequence[LocalParam], built: BuiltRank) -> list[str]:
    """One line for every parameter that only one side has, or that has another shape, decoder layer or expert for Megatron-Core."""
    expected = {(param.chunk, param.name): param for param in placed}
    return [
        *(f"{_shown(key)}: placed, but not a parameter of Megatron-Core's" for key in sorted(expected.keys() - built.shapes.keys())),
        *(f"{_shown(key)}: a parameter of Megatron-Core's, but not placed" for key in sorted(built.shapes.keys() - expected.keys())),
        *(line for key in sorted(expected.keys() & built.shapes.keys()) for line in _mismatches(expected[key], built)),
    ]


def _mismatches(param: LocalParam, built: BuiltRank) -> Iterator[str]:
    key = (param.chunk, param.name)
    if param.shape != built.shapes[key]:
        yield f"{_shown(key)}: placed as {list(param.shape)}, Megatron-Core has {list(built.shapes[key])}"
    # Ranks that hold other layers or experts have the same names and shapes: those say nothing about which ones are meant.
    sources = sorted({piece.tensor for piece in param.pieces})
    if layer := re.match(r"decoder\.layers\.(\d+)\.", param.name):
        real = built.layers[param.chunk, int(layer[1])]
        yield from (f"{_shown(key)}: placed from {tensor}, layer {real} for Megatron-Core" for tensor in sources if _layer(tensor) != real)
    if expert := re.search(r"local_experts\.(\d+)\.", param.name):
        real = built.experts[int(expert[1])]
        yield from (
            f"{_shown(key)}: placed from {tensor}, expert {real} for Megatron-Core" for tensor in sources if _expert(tensor) != real
        )


def _layer(tensor: str) -> int:
    found = re.match(r"model\.layers\.(\d+)\.", tensor)
    return -1 if found is None else int(found[1])


def _expert(tensor: str) -> int:
    found = re.search(r"\.experts\.(\d+)\.", tensor)
    return -1 if found is None else int(found[1])


def _shown(key: Key) -> str:
    return f"chunk {key[0]} {key[1]}"
