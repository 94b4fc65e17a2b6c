"""The CPU platform's layers on a GPU: what Transformer Engine's are held against (`gpu_check`). Nothing is trained on it."""

from typing import Any

import torch
import torch._dynamo.config

from r1mega.errors import UserError
from r1mega.megatron.platform.cpu import SPELLING, config_overrides, kernels, layer_spec
from r1mega.megatron.platform.cuda import device, release_cached

__all__ = ["BACKEND", "SPELLING", "config_overrides", "device", "kernels", "layer_spec", "prepare", "release_cached"]

BACKEND = "nccl"


def prepare(threads: int) -> None:
    """Take the first GPU; Transformer Engine may be missing. `threads` is the CPU platform's matter.

    Raises:
        UserError: there is no GPU.
    """
    del threads
    if not torch.cuda.is_available():
        raise UserError("torch sees no CUDA device; install a CUDA build of torch, on a machine with NVIDIA's driver")
    torch.cuda.set_device(0)
    torch._dynamo.config.disable = True
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    from r1mega.megatron.platform.kernels import WholeLinear

    modules: Any = (multi_latent_attention, moe_utils)
    # Two of `standins`' answers have nothing to do with where tensors live.
    modules[0].TELinear = WholeLinear
    if not hasattr(moe_utils, "te_general_gemm"):
        modules[1].te_general_gemm = None
