"""The CUDA platform: NCCL, Transformer Engine's layers, FP8. What it chooses, and what has run, is in docs/gpu.md.

Apex is not used: fused layers, optimizer and gradient accumulation are Transformer Engine's.
"""

import importlib.util
from importlib.metadata import version
from typing import Any

import torch
from packaging.version import Version

from r1mega import env
from r1mega.config.layout import Layout
from r1mega.config.training import Train
from r1mega.errors import UserError
from r1mega.weights.architecture import Architecture

BACKEND = "nccl"
SPELLING = "te"

_INSTALL = "pip install --no-build-isolation 'r1mega[cuda]'"
_LEAST = Version("2.9")
_ABLE = {"blockwise": "is_fp8_block_scaling_available", "tensorwise": "is_fp8_available", "mxfp8": "is_mxfp8_available"}
"""Transformer Engine's own questions: the versions of CUDA that a recipe's kernels need are its matter."""
_HARDWARE = {"blockwise": ((9, 0), "Hopper"), "tensorwise": ((8, 9), "Ada or Hopper"), "mxfp8": ((10, 0), "Blackwell")}

_FP8: dict[str, dict[str, Any]] = {
    "none": {},
    # DeepSeek-V3's recipe: e4m3 everywhere, 128x128 weight blocks, 1x128 activation tiles (arXiv 2412.19437, section 3.3).
    # The output layer and the routers stay as they are under each recipe.
    "blockwise": {"fp8": "e4m3", "fp8_recipe": "blockwise"},
    # Current scaling: gradients in e5m2.
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
    fuse_gradients()


def require(ranks: int) -> None:
    """UserError unless this machine can start so many ranks, one GPU each; touches no GPU."""
    if not torch.cuda.is_available():
        raise UserError("run.platform=cuda: torch sees no CUDA device; use run.platform=cpu, or install a CUDA build of torch")
    if not _installed("transformer_engine"):
        raise UserError(f"run.platform=cuda: Transformer Engine is missing; {_INSTALL}")
    found = _version("transformer-engine")
    if found < _LEAST:
        raise UserError(f"run.platform=cuda: Transformer Engine {found} is older than {_LEAST}; {_INSTALL}")
    if ranks > torch.cuda.device_count():
        raise UserError(f"run.platform=cuda: {ranks} ranks need a GPU each; this machine has {torch.cuda.device_count()}")


def check(train: Train, where: str = "") -> None:
    """UserError for what a recipe asks for and this machine lacks, with how to install it; nothing is replaced by something else.

    `where` stands before the key, such as `stages.zero.`.
    """
    if train.dispatcher == "deepep" and not _installed("deep_ep"):
        raise UserError(
            f"{where}train.dispatcher=deepep: DeepEP is missing; pip install --no-build-isolation "
            "git+https://github.com/deepseek-ai/DeepEP, or use alltoall"
        )
    if train.fp8 == "none" or not torch.cuda.is_available():
        return
    needed, generation = _HARDWARE[train.fp8]
    if torch.cuda.get_device_capability() < needed:
        raise UserError(
            f"{where}train.fp8={train.fp8} needs {generation} (compute capability {needed[0]}.{needed[1]}); this GPU is "
            f"{torch.cuda.get_device_name()}"
        )
    if _installed("transformer_engine"):
        import transformer_engine.pytorch as te

        able, reason = getattr(te, _ABLE[train.fp8])(return_reason=True)
        if not able:
            raise UserError(f"{where}train.fp8={train.fp8}: Transformer Engine says: {reason}")


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def release_cached() -> None:
    """Give freed memory back to the GPU, where other processes find it."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def config_overrides(arch: Architecture, layout: Layout, train: Train) -> dict[str, Any]:
    """TransformerConfig fields that this platform decides."""
    check(train)
    # Of a dense model too: with Megatron-Core's default it refuses sequences of varying length, which pipelines have.
    fields: dict[str, Any] = {
        "gradient_accumulation_fusion": True,
        "moe_token_dispatcher_type": "alltoall",
        # Transformer Engine would keep FP8 copies of all weights from one micro-batch to the next, as many bytes as the weights in bf16.
        # Where every layer is computed again in its backward pass, they can go with it; making them anew reads the weights once more.
        "disable_parameter_transpose_cache": train.fp8 != "none" and train.recompute == "full",
        **_FP8[train.fp8],
    }
    if arch.moe is None:
        return fields
    # With all experts on every rank there is nothing to send, and Megatron-Core's flexible dispatcher refuses to.
    deepep = train.dispatcher == "deepep" and layout.ep * layout.etp > 1
    return fields | {
        "moe_grouped_gemm": True,
        "moe_permute_fusion": True,
        "moe_token_dispatcher_type": "flex" if deepep else "alltoall",
        **({"moe_flex_dispatcher_backend": "deepep"} if deepep else {}),
        "moe_shared_expert_overlap": train.overlap and not deepep and arch.moe.shared_experts > 0,
    }


def fuse_gradients() -> None:
    """Let weight gradients be added up in the products' own kernels, which are Transformer Engine's.

    Megatron-Core's output layer, a class of its own, asks for Apex's kernel when it is built. Its product is `megatron.head`'s, through
    autograd, and that kernel would never run.
    """
    from megatron.core.tensor_parallel import layers

    layers._grad_accum_fusion_available = True


def layer_spec(config: Any, experts: int | None) -> Any:
    """Spec of one transformer layer, dense when `experts` is None."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    from r1mega.megatron.platform.latent import LatentAttention

    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=experts,
        moe_grouped_gemm=experts is not None,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
    )
    if config.multi_latent_attention:
        spec.submodules.self_attention.module = LatentAttention
    return spec


def kernels() -> Any:
    """Megatron-Core's provider of layer parts, for the pieces outside a layer (MTP, final norm)."""
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()


def _version(distribution: str) -> Version:
    return Version(version(distribution))


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
