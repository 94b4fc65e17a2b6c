"""Seconds that one layer, or the head, takes on one rank for one micro-batch."""

from dataclasses import dataclass

from r1mega.config.layout import Layout
from r1mega.planner import activations
from r1mega.planner.communication import context_parallel_seconds, expert_seconds, tensor_parallel_seconds
from r1mega.planner.constants import Constants
from r1mega.planner.devices import Device
from r1mega.planner.execution import Execution
from r1mega.planner.flops import attention_flops, head_weights, layer_weights, mla_up_weights, mtp_weights
from r1mega.weights.architecture import Architecture
from r1mega.weights.pipeline import Stage

PARTS = ("matrix products", "attention", "memory traffic", "host", "expert traffic", "tensor and context parallelism")
"""What people call the fields of `Seconds`."""


@dataclass(frozen=True)
class Seconds:
    """Where the time of a pass goes; `experts` is traffic of the experts that computation does not hide."""

    gemm: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    host: float = 0.0
    experts: float = 0.0
    tensor: float = 0.0

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(*(a + b for a, b in zip(self.parts(), other.parts(), strict=True)))

    def __mul__(self, factor: float) -> "Seconds":
        return Seconds(*(factor * part for part in self.parts()))

    def parts(self) -> tuple[float, ...]:
        """The fields in order."""
        return (self.gemm, self.attention, self.memory, self.host, self.experts, self.tensor)

    @property
    def total(self) -> float:
        """Their sum."""
        return sum(self.parts())


def gemm_rate(device: Device, how: Execution, constants: Constants, *, head: bool = False) -> float:
    """FLOP/s of matrix products; the head's are in bf16 whatever the recipe."""
    clock = constants.ultra if device.ultra else 1.0
    if how.fp8 == "none" or head:
        return clock * device.bf16 * constants.gemm_bf16[device.generation]
    return clock * device.fp8 * constants.gemm_fp8[device.generation]


def layer_seconds(
    arch: Architecture, layout: Layout, how: Execution, device: Device, constants: Constants, *, moe: bool, training: bool = True
) -> Seconds:
    """Forward of one layer, and with `training` its backward and what is recomputed.

    Matrix products: 2 FLOPs per weight and token (backward: 4). Attention: causal, by `how.length` (backward: 2.5 times the forward, for
    FlashAttention computes the scores again, arXiv 2307.08691). Everything else moves bytes: `constants.traffic` times those that the layer
    keeps for its backward, over the HBM's rate.
    """
    tokens = how.tokens / (layout.tp * layout.cp)
    rate = gemm_rate(device, how, constants)
    weights = layer_weights(arch, moe)
    full = "full" in how.recompute
    again = (
        weights
        if full
        else (mla_up_weights(arch) if "mla_up_proj" in how.recompute else 0)
        + (3 * arch.hidden * arch.intermediate_size if not moe and "mlp" in how.recompute else 0)
    )
    gemm = 2 * tokens * (3 * weights + again if training else weights) / rate
    forward_attention = (
        attention_flops(arch, how.length) * tokens / (device.bf16 * constants.attention * (constants.ultra if device.ultra else 1))
    )
    attention = forward_attention * ((3.5 + full) if training else 1)
    plain = Execution(how.tokens, how.length, imbalance=how.imbalance)
    moved = activations.layer_bytes(arch, plain, moe=moe, etp=layout.etp) * tokens * constants.traffic / device.hbm_rate
    memory = moved * ((1 + full / 3) if training else 1 / 3)
    passes = (2 + full) if training else 1
    experts = 0.0
    if moe and arch.moe is not None:
        experts = 2 * expert_seconds(arch, layout, how, device, constants, tokens) * passes
        experts *= 1 - constants.overlap[device.generation] if how.ep_overlap else 1
    over_tp = how.tokens / layout.cp
    # The backward of sequence parallelism gathers the inputs once more for the weights' gradients.
    tensor = tensor_parallel_seconds(arch, layout, device, constants, over_tp, moe) * ((2.5 + full) if training else 1)
    tensor += context_parallel_seconds(arch, layout, device, constants, tokens) * ((3 + full) if training else 1)
    return Seconds(gemm, attention, memory, constants.host_s[device.generation][how.graphs] * passes / 2, experts, tensor)


def head_seconds(
    arch: Architecture, layout: Layout, how: Execution, device: Device, constants: Constants, *, training: bool = True
) -> Seconds:
    """The output layer, in bf16 under every FP8 recipe, and its softmax: logits in float32 are written and read a few times."""
    tokens = how.tokens / layout.cp
    weights = head_weights(arch) / layout.tp
    # `logits_chunk`: the house computes logits again in the backward pass.
    passes = (3 if how.logits_chunk is None else 4) if training else 1
    gemm = 2 * tokens * weights * passes / gemm_rate(device, how, constants, head=True)
    memory = 4 * tokens * (weights / arch.hidden) * 2 * passes / device.hbm_rate
    return Seconds(gemm, 0.0, memory, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Costs:
    """Seconds of one micro-batch on one rank, by what a model chunk is made of."""

    first_moe: int
    dense: Seconds
    moe: Seconds
    head: Seconds
    join: Seconds
    heads: int

    @classmethod
    def of(
        cls, arch: Architecture, layout: Layout, how: Execution, device: Device, constants: Constants, *, training: bool = True
    ) -> "Costs":
        """Of a model under a layout; without `training` of a forward pass, which no MTP layer takes part in."""
        dense, moe = (layer_seconds(arch, layout, how, device, constants, moe=kind, training=training) for kind in (False, True))
        join = 6 * how.tokens / (layout.tp * layout.cp) * mtp_weights(arch) / gemm_rate(device, how, constants, head=True)
        return cls(
            first_moe=arch.layers if arch.moe is None else arch.moe.first_dense_layers,
            dense=dense,
            moe=moe,
            head=head_seconds(arch, layout, how, device, constants, training=training),
            join=Seconds(gemm=join) + moe if training else Seconds(),
            heads=1 + arch.mtp_layers if training else 1,
        )

    def stage(self, chunks: tuple[Stage, ...]) -> Seconds:
        """All chunks of a pipeline stage."""
        layers = sum(len(chunk.layers) for chunk in chunks)
        dense = sum(max(0, min(chunk.layers.stop, self.first_moe) - chunk.layers.start) for chunk in chunks)
        total = self.dense * dense + self.moe * (layers - dense)
        if any(chunk.loss for chunk in chunks):
            total += self.head * self.heads
        return total + self.join * sum(len(chunk.mtp) for chunk in chunks)
