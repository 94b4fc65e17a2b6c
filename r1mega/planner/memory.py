"""Bytes on the GPU of one rank of each pipeline stage while it trains, and what it keeps on its host."""

from dataclasses import dataclass, fields
from functools import lru_cache

from r1mega.config.layout import Layout
from r1mega.planner.activations import layer_bytes, working_bytes
from r1mega.planner.constants import CONSTANTS, Constants
from r1mega.planner.execution import Execution
from r1mega.planner.parameters import Values, cut, kinds, stage_values
from r1mega.planner.schedule import in_flight
from r1mega.weights.architecture import Architecture
from r1mega.weights.pipeline import Stage


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank's GPU at the peak of a training step.

    `weights`: under FP8 with the copies in it; `working`: what one layer's backward pass adds; `dispatch`: buffers of the
    experts' traffic; `logits`: the head's peak; `buckets`: of a weight sync; `runtime`: CUDA, NCCL, workspaces.
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
        held = self.weights + self.gradients + self.optimizer + self.activations
        return held + self.working + self.dispatch + self.logits + self.buckets + self.runtime

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
    every_stage: bool = True,
    constants: Constants = CONSTANTS,
) -> list[RankMemory]:
    """By pipeline stage; without `every_stage` only the first of those that are alike, which holds most: later ones have fewer in flight.

    `copies`: of a rank's weights that wait on its host (a reference, reward models, the policy while they compute).

    Raises:
        UserError: the layout does not fit the model.
    """
    each = _each(arch, layout.tp, layout.cp, layout.ep, layout.etp, how)
    chunks, values = cut(arch, layout), stage_values(arch, layout)
    wanted = range(layout.pp) if every_stage else [first for first, _ in kinds(arch, layout)]
    return [
        _rank(each, layout, ranks, how, micro_batches, chunks[stage], values[stage], copies, bucket_bytes, constants.runtime)
        for stage in wanted
    ]


@dataclass(frozen=True)
class _Each:
    """Bytes of one micro-batch on one rank: what layers of either kind keep and need while they run, and the head's peak."""

    first_moe: int
    dense: float
    moe: float
    join: float
    head: float
    working_dense: float
    working_moe: float
    dispatch: float
    logits: float

    def kept(self, stage: Stage) -> float:
        """By one forward pass of a model chunk."""
        dense = _dense_layers(stage, self.first_moe)
        layers = self.dense * dense + self.moe * (len(stage.layers) - dense + len(stage.mtp))
        return layers + self.join * len(stage.mtp) + (self.head if stage.loss else 0.0)


@lru_cache(maxsize=65536)
def _each(arch: Architecture, tp: int, cp: int, ep: int, etp: int, how: Execution) -> _Each:
    share = how.tokens / (tp * cp)
    return _Each(
        first_moe=arch.layers if arch.moe is None else arch.moe.first_dense_layers,
        dense=share * layer_bytes(arch, how, moe=False, etp=etp),
        moe=share * layer_bytes(arch, how, moe=True, etp=etp),
        # An MTP layer normalises and joins hidden states and embeddings first.
        join=share * 6 * how.activation_bytes * arch.hidden,
        # The last norm's input, and its output of all tokens on every tensor-parallel rank.
        head=(1 + tp) * share * how.activation_bytes * arch.hidden,
        working_dense=share * working_bytes(arch, how, moe=False, etp=etp),
        working_moe=share * working_bytes(arch, how, moe=True, etp=etp),
        dispatch=share * _dispatch(arch, ep * etp, how),
        logits=logits_bytes(arch, tp, cp, how),
    )


def _dense_layers(stage: Stage, first_moe: int) -> int:
    return max(0, min(stage.layers.stop, first_moe) - stage.layers.start)


def _rank(
    each: _Each,
    layout: Layout,
    ranks: int,
    how: Execution,
    micro_batches: int,
    chunks: tuple[Stage, ...],
    values: Values,
    copies: int,
    bucket_bytes: float,
    runtime: float,
) -> RankMemory:
    weights = weight_bytes(values, how)
    owned = owned_values(layout, ranks, values, how)
    any_moe = any(stage.layers.stop > each.first_moe or stage.mtp for stage in chunks)
    passes = in_flight(layout.pp, layout.vpp, chunks[0].pp, micro_batches)
    quantised = fp8_copies(values, how)
    # Fully recomputed, one layer's at a time; a stage may have an embedding alone.
    passing = quantised / max(1, sum(len(stage.layers) + len(stage.mtp) for stage in chunks)) if "full" in how.recompute else 0.0
    gpu = Memory(
        weights=weights + (0 if passing else quantised),
        gradients=how.grad_bytes * values.trained,
        optimizer=owned * (how.state_bytes + how.step_bytes) * (1 - how.offload),
        activations=sum(count * each.kept(stage) for stage, count in zip(chunks, passes, strict=True)),
        working=(each.working_moe if any_moe else each.working_dense) + passing,
        dispatch=each.dispatch if any_moe else 0.0,
        logits=each.logits if any(stage.loss for stage in chunks) else 0.0,
        buckets=2 * bucket_bytes,
        runtime=runtime,
    )
    # An offloaded AdamW computes on the host: its states there, and the gradients that it is sent, in float32.
    host = {"optimizer": owned * how.offload * (how.state_bytes + 4), "weights": copies * weights}
    return RankMemory(chunks[0].pp, values, gpu, {name: size for name, size in host.items() if size})


def weight_bytes(values: Values, how: Execution) -> float:
    """Bytes of the weights; buffers are float32."""
    return how.weight_bytes * values.trained + 4 * values.buffers


def fp8_copies(values: Values, how: Execution) -> float:
    """Bytes of the FP8 copies that Transformer Engine makes of bf16 weights, by rows and by columns.

    They live as long as a step, and with everything recomputed no longer than their layer runs (`platform/cuda`).
    """
    return 0.0 if how.fp8 == "none" else 2.0 * values.linear


def owned_values(layout: Layout, ranks: int, values: Values, how: Execution) -> float:
    """Values whose optimizer states a rank holds: its share over the replicas (ZeRO-1, arXiv 1910.02054), or all of them."""
    if not how.distributed:
        return values.trained
    return values.dense / (layout.dp(ranks) * layout.cp) + values.expert / layout.edp(ranks)


def logits_bytes(arch: Architecture, tp: int, cp: int, how: Execution) -> float:
    """The head's peak.

    In chunks (`megatron.head`): logits in the weights' dtype and float32, their exponentials, the products for the entropy and a copy that
    is clamped, then a gradient of the output layer in float32 beside its product. At once (Megatron-LM's fused cross entropy): logits, and
    float32 softmax that becomes the gradient.
    """
    if arch.head == "score":
        return 0.0
    rows = -(-arch.vocab // tp)
    if how.logits_chunk is None:
        return how.tokens / cp * rows * (2 * how.activation_bytes + 4)
    tokens = min(how.logits_chunk, how.tokens / cp)
    return tokens * rows * (how.activation_bytes + 16) + rows * arch.hidden * (4 + 2 * how.weight_bytes)


def _dispatch(arch: Architecture, expert_ranks: int, how: Execution) -> float:
    """Bytes per token of what an all-to-all sends and receives, one way at a time; nothing moves without expert parallelism."""
    if arch.moe is None or expert_ranks == 1:
        return 0.0
    return 2 * how.activation_bytes * arch.moe.top_k * how.imbalance * arch.hidden
