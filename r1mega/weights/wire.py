"""What an engine is sent of a canonical tensor: names, shapes and dtypes, as its loader expects them."""

from dataclasses import dataclass
from math import prod
from typing import Literal

from r1mega.config.engine_layout import EngineLayout
from r1mega.errors import UserError
from r1mega.weights.architecture import Architecture
from r1mega.weights.blocks import SCALE, scale_shape
from r1mega.weights.canonical import Tensor, canonical
from r1mega.weights.engine import check_block_fp8, engine_params
from r1mega.weights.table import Storage

DType = Literal["float32", "bfloat16", "float16", "float8_e4m3fn"]
"""As `torch.<name>` and SGLang's requests spell it."""

ITEMSIZE: dict[DType, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}


@dataclass(frozen=True, slots=True)
class Sent:
    """One tensor on its way to an engine."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class Wire:
    """The dtype that an engine is sent; tensors that are float32 in every checkpoint stay so.

    `block_fp8` sends codes and scales of what DeepSeek's checkpoints quantise, and the rest in `dtype`.
    """

    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    block_fp8: bool = False

    def check(self, arch: Architecture) -> None:
        """UserError when SGLang could not be sent this model so."""
        if self.block_fp8 and arch.family == "llama":
            # Its loader looks for `weight_scale`, and drops what is named otherwise with a warning in its log only.
            raise UserError("weight sync: SGLang 0.5.23 loses the scales of block FP8 for llama; send bfloat16")

    def check_served(self, arch: Architecture, engine: EngineLayout) -> None:
        """UserError when a server of this layout could not be sent the model so, or not serve what it is sent."""
        self.check(arch)
        if not self.block_fp8:
            return
        if engine.device == "cpu":
            raise UserError("rollout.sglang.block_fp8: SGLang's FP8 kernels need a GPU; leave it out on a CPU")
        shapes = {tensor.name: tensor.shape for tensor in canonical(arch)}
        for param in engine_params(arch, engine, 0):
            if self.quantises(param.storage):
                check_block_fp8(param, shapes)

    def quantises(self, storage: Storage) -> bool:
        """Whether tensors that checkpoints store so are sent as codes and scales."""
        return self.block_fp8 and storage is Storage.BLOCK_FP8

    def dtype_of(self, storage: Storage) -> DType:
        """The dtype of a tensor's values before any quantisation, which is that of gathered pieces that cut a block."""
        return "float32" if storage is Storage.FLOAT32 else self.dtype

    def of(self, tensor: Tensor) -> tuple[Sent, ...]:
        """What is sent of a canonical tensor: itself, or its codes and then its scales."""
        if not self.quantises(tensor.storage):
            return (Sent(tensor.name, self.dtype_of(tensor.storage), tensor.shape),)
        return Sent(tensor.name, "float8_e4m3fn", tensor.shape), Sent(tensor.name + SCALE, "float32", scale_shape(tensor.shape))
