"""Seconds of one optimizer step: the slowest pipeline stage, the bubble, and what data parallelism adds."""

from dataclasses import dataclass

from r1mega.config.layout import Layout
from r1mega.planner.communication import ring_seconds
from r1mega.planner.compute import Seconds, gemm_rate, head_seconds, layer_seconds
from r1mega.planner.constants import CONSTANTS, Constants
from r1mega.planner.devices import Device
from r1mega.planner.execution import Execution
from r1mega.planner.flops import mtp_weights
from r1mega.planner.parameters import Values, stage_values
from r1mega.weights.architecture import Architecture
from r1mega.weights.pipeline import Stage, stages


@dataclass(frozen=True)
class Step:
    """An optimizer step. `busy`: of the slowest stage, all micro-batches; `bubble`, `gradients`, `optimizer`: seconds beside it."""

    busy: Seconds
    bubble: float
    gradients: float
    optimizer: float
    tokens_per_gpu: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.busy.total + self.bubble + self.gradients + self.optimizer

    @property
    def tokens_per_second(self) -> float:
        """Tokens of training per second and GPU."""
        return self.tokens_per_gpu / self.seconds


def step(
    arch: Architecture, layout: Layout, ranks: int, how: Execution, micro_batches: int, device: Device, constants: Constants = CONSTANTS
) -> Step:
    """One step of `micro_batches` micro-batches on every data-parallel rank."""
    by_stage = [pass_seconds(arch, layout, how, device, constants, chunks) for chunks in stages(arch, layout)]
    slowest = max(by_stage, key=lambda found: found.total)
    # The bubble is as long as a micro-batch takes on all other stages, over the chunks (arXiv 2104.04473, section 2.2.2).
    mean = sum(found.total for found in by_stage) / len(by_stage)
    values = max(stage_values(arch, layout), key=lambda found: found.trained)
    return Step(
        busy=slowest * micro_batches,
        bubble=mean * (layout.pp - 1) / layout.vpp,
        gradients=0.0 if how.grad_overlap else gradient_seconds(layout, ranks, values, how, device, constants),
        optimizer=optimizer_seconds(layout, ranks, values, how, device),
        tokens_per_gpu=how.tokens * micro_batches * layout.dp(ranks) / ranks,
    )


def pass_seconds(
    arch: Architecture,
    layout: Layout,
    how: Execution,
    device: Device,
    constants: Constants,
    chunks: tuple[Stage, ...],
    training: bool = True,
) -> Seconds:
    """One micro-batch through all chunks of a pipeline stage, forward and, in training, backward."""
    dense, moe = (layer_seconds(arch, layout, how, device, constants, moe=kind, training=training) for kind in (False, True))
    head = head_seconds(arch, layout, how, device, constants, training=training)
    first = arch.moe.first_dense_layers if arch.moe is not None else arch.layers
    total = Seconds()
    for stage in chunks:
        dense_layers = sum(layer < first for layer in stage.layers)
        total += dense * dense_layers + moe * (len(stage.layers) - dense_layers)
        if stage.loss:
            total += head * (1 + arch.mtp_layers)
        if stage.mtp:
            join = 6 * how.tokens / (layout.tp * layout.cp) * mtp_weights(arch) / gemm_rate(device, how, constants, head=True)
            total += (moe + Seconds(gemm=join)) * len(stage.mtp)
    return total


def gradient_seconds(layout: Layout, ranks: int, values: Values, how: Execution, device: Device, constants: Constants) -> float:
    """Reduce-scatter of the gradients and all-gather of the weights, not overlapped (ZeRO-1, arXiv 1910.02054)."""
    dp, edp = layout.dp(ranks) * layout.cp, layout.edp(ranks)
    each = how.grad_bytes + how.weight_bytes
    dense = ring_seconds(each * values.dense, dp, layout.tp, device, constants)
    return dense + ring_seconds(each * values.expert, edp, layout.etp * layout.ep, device, constants)


def optimizer_seconds(layout: Layout, ranks: int, values: Values, how: Execution, device: Device) -> float:
    """AdamW reads and writes its states once; what is offloaded crosses the host link, gradients out and weights back."""
    owned = values.dense / (layout.dp(ranks) * layout.cp) + values.expert / layout.edp(ranks) if how.distributed else float(values.trained)
    states = how.master_bytes + 2 * how.moment_bytes
    resident = owned * (1 - how.offload) * (2 * states + how.grad_bytes + how.weight_bytes) / device.hbm_rate
    return resident + owned * how.offload * (how.grad_bytes + how.weight_bytes) / device.host_link
