"""Which layouts a model can be trained under, and Megatron-Core's process groups for one of them."""

import torch.distributed as dist
from megatron.core import package_info, parallel_state

from r1mega.config.layout import Layout
from r1mega.errors import UserError
from r1mega.weights.architecture import Architecture, Moe

MEGATRON_VERSION: tuple[int, int] = (package_info.MAJOR, package_info.MINOR)


def check(arch: Architecture, layout: Layout, world_size: int) -> None:
    """Refuse a layout that cannot hold the model, or that would train wrongly without an error.

    Raises:
        UserError: one line with the two numbers that do not fit, or the trap and the layout to use instead.
    """
    try:
        layout.dp(world_size)
        layout.edp(world_size)
    except ValueError as error:
        raise UserError(f"layout: {error}") from None
    _divides("tp", layout.tp, "attention heads", arch.heads)
    _divides("tp", layout.tp, "key-value heads", arch.kv_heads)
    _divides("tp", layout.tp, "the dense layers' intermediate size", arch.intermediate_size)
    if arch.mtp_layers > 1:
        raise UserError(f"num_nextn_predict_layers={arch.mtp_layers}: one multi-token-prediction layer is supported, as in DeepSeek-V3")
    if layout.pp * layout.vpp > arch.layers and layout.pipeline is None:
        raise UserError(f"layout: pp x vpp = {layout.pp * layout.vpp} stages are more than the model's {arch.layers} layers")
    if arch.moe is None:
        if layout.ep > 1 or layout.etp > 1:
            raise UserError(f"layout: ep={layout.ep}, etp={layout.etp} need a model with experts; this one has none")
        return
    _divides("ep", layout.ep, "experts", arch.moe.experts)
    _divides("etp", layout.etp, "the experts' intermediate size", arch.moe.intermediate_size)
    if arch.moe.shared_experts:
        _divides("tp", layout.tp, "the shared experts' intermediate size", arch.moe.intermediate_size * arch.moe.shared_experts)
    _check_router(arch.moe)
    if layout.tp > layout.ep * layout.etp and MEGATRON_VERSION < (0, 19):
        raise UserError(
            f"layout: tp={layout.tp} with ep x etp = {layout.ep * layout.etp}: megatron-core {package_info.__shortversion__} leaves out "
            f"gradients of experts replicated over tp; use ep >= tp or etp = tp, or megatron-core 0.19"
        )


def _check_router(moe: Moe) -> None:
    """Refuse routers that Megatron-Core would compute differently from the published models."""
    # DeepSeek-V3 scores a group by its best 2 experts, DeepSeek-V2 by its best one; Megatron-Core by its best top_k // top_groups.
    best = 2 if moe.expert_bias else 1
    if moe.groups > 1 and moe.top_k // moe.top_groups != best:
        raise UserError(
            f"num_experts_per_tok={moe.top_k} over topk_group={moe.top_groups} groups: Megatron-Core scores a group by its best "
            f"{moe.top_k // moe.top_groups} experts and this model by its best {best}; only a ratio of {best} gives the same model"
        )
    if moe.scoring == "softmax" and moe.expert_bias:
        raise UserError("scoring_func='softmax' with topk_method='noaux_tc': Megatron-Core has the expert bias with sigmoid scores only")
    if moe.top_k > 1 and moe.normalize != (moe.scoring == "sigmoid"):
        raise UserError(
            f"norm_topk_prob={moe.normalize} with scoring_func={moe.scoring!r}: Megatron-Core normalises sigmoid scores, not softmax"
        )


def _divides(name: str, size: int, what: str, count: int) -> None:
    if count % size:
        raise UserError(f"layout: {name}={size} does not divide {count}, {what}")


def connect(layout: Layout) -> None:
    """Make Megatron-Core's process groups for a layout, replacing those of an earlier one. Every rank calls this.

    Groups of a layout that was connected before are not reused: they are destroyed and new ones are made,
    which costs milliseconds on gloo and lets one process go through many layouts.
    """
    if parallel_state.model_parallel_is_initialized():
        # A rank that still waits for the last message of a group must get it before a peer leaves the group.
        dist.barrier()
        disconnect()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        create_gloo_process_groups=False,
    )


def disconnect() -> None:
    """Destroy the process groups of the connected layout. A policy that was built on them is of no more use."""
    if not parallel_state.model_parallel_is_initialized():
        return
    # Megatron-Core only forgets its groups; each holds threads and sockets, or a communicator's device memory.
    for group in parallel_state._global_process_group_list or []:
        if group is not None:
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()
