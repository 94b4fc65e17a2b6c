"""Where SGLang keeps every canonical tensor: one more placement, for engines that are sent their own shards.

Learnt from SGLang 0.5.23 (`models/deepseek_v2.py`, `qwen2.py`, `llama.py`, `layers/linear.py`, `vocab_parallel_embedding.py`,
`moe/fused_moe_triton/layer.py`). It holds for backends that keep weights as they were loaded (torch native, Triton); those that
permute experts afterwards (FlashInfer's TRT-LLM and CUTLASS kernels, AITER) take full tensors only.
"""

from dataclasses import dataclass
from typing import Literal

from r1mega.config.engine_layout import EngineLayout
from r1mega.weights.architecture import Architecture
from r1mega.weights.placement import Holders, LocalParam
from r1mega.weights.table import Storage, layer_prefix

Part = Literal["whole", "attention", "tp", "experts"]
"""Over which ranks of a server a parameter is cut: none, those of one copy of the attention, all, or all as experts are."""

PADDING = 64
"""Rows of the embedding and the output layer are padded to a multiple of this."""


@dataclass(frozen=True, slots=True)
class EngineParam(LocalParam):
    """A parameter of one engine rank. Chunk 0 is the model, chunk 1 the draft model made of the MTP layer.

    `shape` and the pieces' boxes are those of the parameter as a matrix; SGLang's own shape is `tensor_shape`.
    """

    storage: Storage = Storage.PLAIN
    stacked: int = 0

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """[experts, rows, columns] of stacked experts, otherwise `shape`."""
        return (self.stacked, self.shape[0] // self.stacked, self.shape[1]) if self.stacked else self.shape


@dataclass(frozen=True, slots=True)
class Derived:
    """An attribute that an engine computes from a parameter after loading; it is no parameter, and no checksum covers it.

    It is rebuilt at the end of a session with full tensors. After a direct load it is stale until an empty session follows.
    """

    name: str
    of: str


def derived(arch: Architecture) -> tuple[Derived, ...]:
    """MLA's absorbed projections, of every layer."""
    if arch.mla is None:
        return ()
    attention = [f"{layer_prefix(index)}self_attn." for index in range(arch.layers)]
    return tuple(Derived(prefix + name, prefix + "kv_b_proj.weight") for prefix in attention for name in ("w_kc", "w_vc"))


def engine_params(arch: Architecture, engine: EngineLayout, rank: int, mtp: bool = False) -> list[EngineParam]:
    """Every parameter of a rank of a server (0 <= rank < tp).

    Args:
        mtp: whether the server drafts with the MTP layer, which is a model of its own (chunk 1).

    Raises:
        UserError: the layout does not divide the model.
    """
    raise NotImplementedError


def engine_holders(arch: Architecture, engine: EngineLayout, first: int = 0, mtp: bool = False) -> list[Holders]:
    """The placement of all ranks of all servers, for `transfer_plan` and `direct_plan`.

    Args:
        first: number of the engine's first rank. 0 when trainer and engine share their GPUs: what a rank holds already stays there.
            The trainer's world size when they do not.
    """
    raise NotImplementedError
