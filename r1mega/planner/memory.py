"""Bytes on the GPU of one rank of each pipeline stage while it trains, and what it keeps on its host."""

from dataclasses import dataclass, fields

from r1mega.config.layout import Layout
from r1mega.planner.activations import layer_bytes, working_bytes
from r1mega.planner.constants import CONSTANTS, Constants
from r1mega.planner.execution import Execution
from r1mega.planner.parameters import Values, stage_values
from r1mega.planner.schedule import in_flight
from r1mega.weights.architecture import Architecture
from r1mega.weights.pipeline import Stage, stages


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank's GPU at the peak of a training step.

    `working`: what one layer's backward pass adds; `dispatch`: buffers of the experts' traffic; `logits`: the head's peak;
    `buckets`: of a weight sync; `runtime`: CUDA, NCCL, workspaces.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    working: float
    dispatch: float
    logits: float
    buckets: float
    runtime: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """By name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class RankMemory:
    """The ranks of one pipeline stage: what they hold. `host`: bytes of the host's memory a rank takes while it trains, by name."""

    stage: int
    values: Values
    gpu: Memory
    host: dict[str, float]


def training_memory(
    arch: Architecture,
    layout: Layout,
    ranks: int,
    how: Execution,
    micro_batches: int,
    *,
    copies: int = 0,
    bucket_bytes: float = 0.0,
    constants: Constants = CONSTANTS,
) -> list[RankMemory]:
    """By pipeline stage. `copies`: of a rank's weights that wait on its host (a reference, reward models, the policy while they compute).

    Raises:
        UserError: the layout does not fit the model.
    """
    found = zip(stages(arch, layout), stage_values(arch, layout), strict=True)
    return [_rank(arch, layout, ranks, how, micro_batches, chunks, values, copies, bucket_bytes, constants) for chunks, values in found]


def _rank(
    arch: Architecture,
    layout: Layout,
    ranks: int,
    how: Execution,
    micro_batches: int,
    chunks: tuple[Stage, ...],
    values: Values,
    copies: int,
    bucket_bytes: float,
    constants: Constants,
) -> RankMemory:
    weights = weight_bytes(values, how)
    owned = owned_values(layout, ranks, values, how)
    states = owned * (how.master_bytes + 2 * how.moment_bytes)
    any_moe = arch.moe is not None and any(_moe_layers(arch, stage) for stage in chunks)
    share = how.tokens / (layout.tp * layout.cp)
    gpu = Memory(
        weights=weights,
        gradients=how.grad_bytes * values.trained,
        optimizer=states * (1 - how.offload),
        activations=stage_activations(arch, layout, how, micro_batches, chunks),
        working=working_bytes(arch, how, moe=any_moe, etp=layout.etp) * share,
        dispatch=_dispatch(arch, layout, how) * share if any_moe else 0.0,
        logits=logits_bytes(arch, layout, how) if any(stage.loss for stage in chunks) else 0.0,
        buckets=2 * bucket_bytes,
        runtime=constants.runtime,
    )
    # An offloaded AdamW computes on the host: its states, and the gradients and weights that it exchanges with the GPU.
    offloaded = owned * how.offload * (how.master_bytes + 2 * how.moment_bytes + how.grad_bytes)
    host = {"optimizer": offloaded, "weights": copies * weights}
    return RankMemory(chunks[0].pp, values, gpu, {name: size for name, size in host.items() if size})


def weight_bytes(values: Values, how: Execution) -> float:
    """Bytes of the weights; buffers are float32."""
    return how.weight_bytes * values.trained + 4 * values.buffers


def owned_values(layout: Layout, ranks: int, values: Values, how: Execution) -> float:
    """Values whose optimizer states a rank holds: its share over the replicas (ZeRO-1, arXiv 1910.02054), or all of them."""
    if not how.distributed:
        return values.trained
    return values.dense / (layout.dp(ranks) * layout.cp) + values.expert / layout.edp(ranks)


def stage_activations(arch: Architecture, layout: Layout, how: Execution, micro_batches: int, chunks: tuple[Stage, ...]) -> float:
    """Bytes that the micro-batches in flight keep on one stage."""
    dense, moe = (layer_bytes(arch, how, moe=kind, etp=layout.etp) for kind in (False, True))
    passes = in_flight(layout.pp, layout.vpp, chunks[0].pp, micro_batches)
    total = 0.0
    for stage, count in zip(chunks, passes, strict=True):
        routed = _moe_layers(arch, stage)
        per_token = dense * (len(stage.layers) - routed) + moe * (routed + len(stage.mtp))
        # An MTP layer normalises and joins hidden states and embeddings first.
        per_token += 6 * how.activation_bytes * arch.hidden * len(stage.mtp)
        total += count * per_token
    return total * how.tokens / (layout.tp * layout.cp)


def logits_bytes(arch: Architecture, layout: Layout, how: Execution) -> float:
    """The head's peak.

    In chunks (`megatron.head`): logits in the weights' dtype and float32, their exponentials, the products for the entropy and a copy that
    is clamped, then a gradient of the output layer in float32 beside its product. At once (Megatron-LM's fused cross entropy): logits, and
    float32 softmax that becomes the gradient.
    """
    if arch.head == "score":
        return 0.0
    rows = -(-arch.vocab // layout.tp)
    if how.logits_chunk is None:
        return how.tokens / layout.cp * rows * (2 * how.activation_bytes + 4)
    tokens = min(how.logits_chunk, how.tokens / layout.cp)
    return tokens * rows * (how.activation_bytes + 16) + rows * arch.hidden * (4 + 2 * how.weight_bytes)


def _dispatch(arch: Architecture, layout: Layout, how: Execution) -> float:
    """Bytes per token of what an all-to-all sends and receives, one way at a time; nothing moves without expert parallelism."""
    if arch.moe is None or layout.ep * layout.etp == 1:
        return 0.0
    return 2 * how.activation_bytes * arch.moe.top_k * how.imbalance * arch.hidden


def _moe_layers(arch: Architecture, stage: Stage) -> int:
    first = arch.layers if arch.moe is None else arch.moe.first_dense_layers
    return sum(layer >= first for layer in stage.layers)
