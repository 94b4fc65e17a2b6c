"""Which layouts a model can be trained under. Imports no Megatron-Core, so that a recipe is refused before seconds of imports."""

import runpy
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from r1mega.config.layout import Layout
from r1mega.config.training import Optimizer, Train
from r1mega.errors import UserError
from r1mega.weights.architecture import Architecture, Moe


def _package_info() -> dict[str, Any]:
    """The names in megatron.core.package_info, run as a file: importing it would import all of Megatron-Core."""
    spec = find_spec("megatron.core")
    assert spec is not None and spec.origin is not None
    return runpy.run_path(str(Path(spec.origin).with_name("package_info.py")))


_PACKAGE = _package_info()
MEGATRON_VERSION: tuple[int, int] = (_PACKAGE["MAJOR"], _PACKAGE["MINOR"])


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
            f"layout: tp={layout.tp} with ep x etp = {layout.ep * layout.etp}: megatron-core {_PACKAGE['__shortversion__']} leaves out "
            f"gradients of experts replicated over tp; use ep >= tp or etp = tp, or megatron-core 0.19"
        )


def trained(arch: Architecture, layout: Layout, mtp_loss: float) -> tuple[Architecture, Layout]:
    """What is built of a model for training: an MTP layer without a loss is not, and its weights pass from checkpoint to checkpoint.

    Raises:
        UserError: there is a loss for an MTP layer and no such layer.
    """
    if mtp_loss > 0:
        if not arch.mtp_layers:
            raise UserError(f"train.mtp_loss={mtp_loss} needs a model with num_nextn_predict_layers=1")
        return arch, layout
    return replace(arch, mtp_layers=0), layout.model_copy(update={"pipeline": layout.pipeline and layout.pipeline.replace("m", "")})


def check_platform(platform: str, train: Train, optimizer: Optimizer | None = None) -> None:
    """UserError for what only GPUs, or Megatron-Core's optimizers for them, can do."""
    if platform == "cuda":
        return
    if train.fp8 != "none":
        raise UserError(f"train.fp8={train.fp8} needs run.platform=cuda; on a CPU use fp8=none")
    if train.dispatcher != "alltoall":
        raise UserError(f"train.dispatcher={train.dispatcher} needs run.platform=cuda; on a CPU use alltoall")
    if optimizer is not None and optimizer.offload > 0:
        raise UserError(
            f"optimizer.offload={optimizer.offload:g} needs run.platform=cuda: on a CPU the states are on the host already; use 0"
        )
    if optimizer is not None and optimizer.reduced:
        raise UserError(
            "optimizer.moments, main_params and main_grads below float32 need run.platform=cuda: Megatron-Core has no such optimizer for "
            "a CPU; use float32"
        )


def pad_to(layout: Layout) -> int:
    """Multiple that each packed sequence is padded to: context parallelism deals every sequence out in 2 x cp parts."""
    return 2 * layout.cp if layout.cp > 1 else 1


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
