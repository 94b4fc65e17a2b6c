"""The CPU platform: gloo, SDPA, and Megatron-Core's local layers with the replacements in `kernels`."""

import sys
from typing import Any

import torch
import torch._dynamo.config

from r1mega.config.layout import Layout
from r1mega.config.training import Train
from r1mega.megatron import limits
from r1mega.megatron.platform import standins
from r1mega.weights.architecture import Architecture

BACKEND = "gloo"
SPELLING = "local"


def prepare(threads: int) -> None:
    """Thread count and stand-ins; call before anything of Megatron-Core is imported."""
    # Megatron-Core calls the CUDA kernels of these packages wherever it can import them, for a CPU's tensors as well.
    for package in ("transformer_engine", "apex"):
        sys.modules.setdefault(package, None)  # type: ignore[arg-type]
    stand_in(threads)


def stand_in(threads: int) -> None:
    """What `prepare` does in a process that may be another platform's later."""
    torch.set_num_threads(threads)
    # Megatron-Core compiles small fusions: 25 s on a CPU for nothing, and inductor then asks for the stand-in device.
    torch._dynamo.config.disable = True
    standins.install()


def device() -> torch.device:
    return torch.device("cpu")


def release_cached() -> None:
    """What is freed on a CPU is free."""


def config_overrides(arch: Architecture, layout: Layout, train: Train) -> dict[str, Any]:
    """TransformerConfig fields that this platform decides. Fusions are CUDA kernels; FP8 needs tensor cores."""
    del arch, layout
    limits.check_platform("cpu", train)
    return {
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "bias_dropout_fusion": False,
        "moe_token_dispatcher_type": "alltoall",
    }


def layer_spec(config: Any, experts: int | None) -> Any:
    """Spec of one transformer layer, dense when `experts` is None."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    from r1mega.megatron.platform.kernels import CpuKernels, LatentNorm, PackedAttention, RmsNorm, WholeLinear
    from r1mega.megatron.platform.latent import LatentAttention

    if config.multi_latent_attention:
        attention = ModuleSpec(
            module=LatentAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=MLASelfAttentionSubmodules(
                linear_q_proj=ColumnParallelLinear,
                linear_q_down_proj=WholeLinear,
                linear_q_up_proj=ColumnParallelLinear,
                linear_kv_down_proj=WholeLinear,
                linear_kv_up_proj=ColumnParallelLinear,
                core_attention=PackedAttention,
                linear_proj=RowParallelLinear,
                q_layernorm=LatentNorm,
                kv_layernorm=LatentNorm,
            ),
        )
    else:
        attention = ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=ColumnParallelLinear,
                core_attention=PackedAttention,
                linear_proj=RowParallelLinear,
                q_layernorm=IdentityOp,
                k_layernorm=IdentityOp,
            ),
        )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RmsNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RmsNorm,
            mlp=get_mlp_module_spec_for_backend(backend=CpuKernels(), num_experts=experts),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=_fused_norms(config, experts),
        ),
    )


def _fused_norms(config: Any, experts: int | None) -> dict[str, str]:
    """Checkpoint keys of the norms that Transformer Engine fuses into the linear that follows: files are alike on every platform."""
    if config.multi_latent_attention:
        keys = {f"self_attention.{x}_layernorm.": f"self_attention.linear_{x}_up_proj.layer_norm_" for x in ("q", "kv")}
    else:
        keys = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    return keys if experts else keys | {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


def kernels() -> Any:
    """Megatron-Core's provider of layer parts, for the pieces outside a layer (MTP, final norm)."""
    from r1mega.megatron.platform.kernels import CpuKernels

    return CpuKernels()
