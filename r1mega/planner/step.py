"""Seconds of one optimizer step: the slowest pipeline stage, the bubble, and what data parallelism adds."""

from dataclasses import dataclass

from r1mega.config.layout import Layout
from r1mega.planner.communication import ring_seconds
from r1mega.planner.compute import PARTS, Costs, Seconds
from r1mega.planner.constants import CONSTANTS, Constants
from r1mega.planner.devices import Device
from r1mega.planner.execution import Execution
from r1mega.planner.memory import owned_values
from r1mega.planner.parameters import Values, cut, kinds, stage_values
from r1mega.planner.schedule import bubble
from r1mega.weights.architecture import Architecture


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

    def phases(self) -> dict[str, float]:
        """Seconds by what they are spent on."""
        beside = {"bubble": self.bubble, "gradients and weights between replicas": self.gradients, "optimizer": self.optimizer}
        return dict(zip(PARTS, self.busy.parts(), strict=True)) | beside

    @property
    def tokens_per_second(self) -> float:
        """Tokens of training per second and GPU."""
        return self.tokens_per_gpu / self.seconds


def step(
    arch: Architecture, layout: Layout, ranks: int, how: Execution, micro_batches: int, device: Device, constants: Constants = CONSTANTS
) -> Step:
    """One step of `micro_batches` micro-batches on every data-parallel rank."""
    costs = Costs.of(arch, layout, how, device, constants)
    chunks = cut(arch, layout)
    by_kind = [(costs.stage(chunks[first]), count) for first, count in kinds(arch, layout)]
    slowest = max((found for found, _ in by_kind), key=lambda found: found.total)
    # The bubble is as long as a micro-batch takes on all other stages, over the chunks (arXiv 2104.04473, section 2.2.2).
    mean = sum(found.total * count for found, count in by_kind) / layout.pp
    values = max(stage_values(arch, layout), key=lambda found: found.trained)
    return Step(
        busy=slowest * micro_batches,
        bubble=mean * micro_batches * bubble(layout.pp, layout.vpp, micro_batches),
        gradients=gradient_seconds(layout, ranks, values, how, device, constants),
        optimizer=optimizer_seconds(layout, ranks, values, how, device, constants),
        tokens_per_gpu=how.tokens * micro_batches * layout.dp(ranks) / ranks,
    )


def gradient_seconds(layout: Layout, ranks: int, values: Values, how: Execution, device: Device, constants: Constants) -> float:
    """Reduce-scatter of the gradients and all-gather of the weights, as far as they are not overlapped (ZeRO-1, arXiv 1910.02054)."""
    dp, edp = layout.dp(ranks) * layout.cp, layout.edp(ranks)
    each = how.grad_bytes * (not how.reduce_overlap) + how.weight_bytes * (not how.gather_overlap)
    dense = ring_seconds(each * values.dense, dp, layout.tp, device, constants)
    return dense + ring_seconds(each * values.expert, edp, layout.etp * layout.ep, device, constants)


def optimizer_seconds(layout: Layout, ranks: int, values: Values, how: Execution, device: Device, constants: Constants) -> float:
    """AdamW reads and writes its states once, gradients and weights too.

    What is offloaded crosses the host link, gradients out and weights back, and is computed from the host's memory by all ranks of a node.
    """
    owned = owned_values(layout, ranks, values, how)
    exchanged = how.grad_bytes + how.weight_bytes
    resident = owned * (1 - how.offload) * (2 * how.state_bytes + exchanged) / device.hbm_rate
    away = owned * how.offload
    on_host = away * (2 * how.state_bytes + exchanged) * min(device.per_node, ranks) / constants.host_rate
    return resident + away * exchanged / device.host_link + on_host
