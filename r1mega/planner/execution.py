"""How a training step is executed, beside its layout: what of a recipe, or of a published run, moves bytes and seconds."""

from dataclasses import dataclass
from typing import Any, Literal

from r1mega.config.training import Optimizer, Train

Fp8 = Literal["none", "blockwise", "tensorwise", "mxfp8"]

SELECTIVE = frozenset({"layernorm", "mla_up_proj", "mlp"})
"""What `train.recompute=selective` recomputes, as `megatron.architecture` spells it out for Megatron-Core."""


@dataclass(frozen=True)
class Execution:
    """One way to execute a step.

    `tokens`: of a micro-batch, over its tp x cp ranks together; `length`: of the sequences packed in it (attention is quadratic in it).
    `recompute`: Megatron-Core's names (layernorm, mla_up_proj, mlp, moe_act), or full.
    `weight_bytes`, `grad_bytes`, `master_bytes`, `moment_bytes`: per value; two moments. `step_bytes`: of the gradients' copy in float32
    that an optimizer without kernels for lower dtypes steps with.
    `offload`: share of the optimizer's states that live on the host. `ep_overlap`: one micro-batch's expert traffic hides behind another's
    computation; `reduce_overlap`: so does the reduction of gradients, `gather_overlap`: so does the gathering of weights. `dedupe`: a
    token goes once to each node
    (DeepEP, HybridEP), not once to each expert. `imbalance`: tokens of the busiest expert-parallel rank over the mean.
    `permuted_outputs`: expert outputs are kept to be weighted after the combine, as before Megatron-Core 0.13.
    `graphs`: what CUDA graphs cover. `kernels`: Transformer Engine's layers, or those of a CPU.
    """

    tokens: int
    length: int
    fp8: Fp8 = "none"
    recompute: frozenset[str] = frozenset()
    weight_bytes: float = 2
    grad_bytes: float = 4
    master_bytes: float = 4
    moment_bytes: float = 4
    step_bytes: float = 0
    distributed: bool = True
    offload: float = 0.0
    logits_chunk: int | None = None
    ep_overlap: bool = False
    dedupe: bool = True
    imbalance: float = 1.0
    reduce_overlap: bool = False
    gather_overlap: bool = False
    permuted_outputs: bool = False
    graphs: Literal["none", "partial", "full"] = "none"
    kernels: Literal["te", "local"] = "te"

    @property
    def state_bytes(self) -> float:
        """Of the optimizer, per value: a master copy and two moments."""
        return self.master_bytes + 2 * self.moment_bytes

    @property
    def activation_bytes(self) -> float:
        """Of one value that an FP8 recipe leaves alone."""
        return 2.0 if self.weight_bytes <= 2 else 4.0


def states(optimizer: Optimizer, train: Train) -> dict[str, Any]:
    """`Execution`'s bytes and places of the optimizer's states, as Megatron-Core's distributed optimizer keeps them.

    With dtypes of its own (`use_precision_aware_optimizer`) Transformer Engine's kernel keeps the master copy: in float16, or of float32
    the 16 bits that a bfloat16 weight lacks (`store_param_remainders`), unless an FP8 recipe has Megatron-Core keep it in float32. Then,
    and with offloading, gradients are stepped with in float32.
    """
    if train.dtype == "float32":
        # A float32 model is its own master copy.
        return {"master_bytes": 0, "distributed": optimizer.distributed}
    kernel = optimizer.reduced and optimizer.offload == 0 and (train.fp8 == "none" or optimizer.main_params == "float16")
    short = optimizer.main_grads == "bfloat16"
    return {
        "master_bytes": 2 if kernel else 4,
        "moment_bytes": 2 if optimizer.moments == "bfloat16" else 4,
        "grad_bytes": 2 if short else 4,
        "step_bytes": 4 if short and not kernel else 0,
        "offload": optimizer.offload,
        "distributed": optimizer.distributed,
    }


def execution(train: Train, optimizer: Optimizer, length: int, imbalance: float, kernels: Literal["te", "local"] = "te") -> Execution:
    """What a recipe's `train` and `optimizer` mean."""
    named = {"none": frozenset[str](), "selective": SELECTIVE, "full": frozenset({"full"})}
    return Execution(
        tokens=train.chunk_tokens,
        length=min(length, train.chunk_tokens),
        fp8=train.fp8,
        recompute=named[train.recompute],
        weight_bytes=4 if train.dtype == "float32" else 2,
        logits_chunk=train.logprob_chunk,
        reduce_overlap=train.overlap,
        dedupe=train.dispatcher == "deepep",
        imbalance=imbalance,
        kernels=kernels,
        **states(optimizer, train),
    )
