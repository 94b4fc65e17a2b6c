"""The CUDA platform: NCCL, Transformer Engine's layers, FP8. Not exercised where there is no GPU; see docs/architecture.md."""

import importlib.util
from typing import Any

import torch

from r1mega import env
from r1mega.errors import UserError

BACKEND = "nccl"
SPELLING = "te"

_FP8: dict[str, dict[str, Any]] = {
    "none": {},
    # DeepSeek-V3's recipe: e4m3 everywhere, 128x128 weight blocks, 1x128 activation tiles (arXiv 2412.19437, section 3.3).
    "blockwise": {"fp8": "e4m3", "fp8_recipe": "blockwise"},
    "tensorwise": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
    "mxfp8": {"fp8": "e4m3", "fp8_recipe": "mxfp8"},
}


def prepare(threads: int) -> None:
    """Take this rank's GPU. `threads` is the CPU platform's matter.

    Raises:
        UserError: no GPU for this rank, or Transformer Engine is not installed.
    """
    del threads
    local_rank = env.ranks().local_rank
    require(local_rank + 1)
    torch.cuda.set_device(local_rank)


def require(ranks: int) -> None:
    """UserError unless this machine can start so many ranks, one GPU each; touches no GPU."""
    if not torch.cuda.is_available():
        raise UserError("run.platform=cuda: torch sees no CUDA device; use run.platform=cpu, or install a CUDA build of torch")
    if not _installed("transformer_engine"):
        raise UserError("run.platform=cuda: Transformer Engine is missing; pip install 'r1mega[cuda]'")
    if ranks > torch.cuda.device_count():
        raise UserError(f"run.platform=cuda: {ranks} ranks need a GPU each; this machine has {torch.cuda.device_count()}")


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def release_cached() -> None:
    """Give freed memory back to the GPU, where other processes find it."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def config_overrides(fp8: str) -> dict[str, Any]:
    """TransformerConfig fields that this platform decides."""
    return {
        "moe_grouped_gemm": True,
        "moe_permute_fusion": True,
        # The output layer is Megatron-Core's own and accumulates its gradient through Apex's kernel.
        "gradient_accumulation_fusion": _installed("fused_weight_gradient_mlp_cuda"),
        "moe_token_dispatcher_type": "flex" if _installed("deep_ep") else "alltoall",
        **({"moe_flex_dispatcher_backend": "deepep"} if _installed("deep_ep") else {}),
        **_FP8[fp8],
    }


def layer_spec(config: Any, experts: int | None) -> Any:
    """Spec of one transformer layer, dense when `experts` is None."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=experts,
        moe_grouped_gemm=experts is not None,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
    )


def kernels() -> Any:
    """Megatron-Core's provider of layer parts, for the pieces outside a layer (MTP, final norm)."""
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
