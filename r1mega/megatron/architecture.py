"""From an `Architecture` to Megatron-Core's transformer configuration."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import MLATransformerConfig, TransformerConfig

from r1mega.config.layout import Layout
from r1mega.config.training import Train
from r1mega.errors import UserError
from r1mega.megatron import platform
from r1mega.megatron.topology import MEGATRON_VERSION
from r1mega.weights.architecture import Architecture, Llama3Rope, Yarn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def transformer_config(arch: Architecture, layout: Layout, train: Train) -> TransformerConfig:
    """Megatron-Core's configuration of one model under one layout.

    Weights are not initialised: every parameter is loaded, or drawn by `model.initialize` from its canonical name, so that
    a model is the same under every layout.
    """
    fields = _common(arch, layout, train) | platform.active().config_overrides(arch, layout, train)
    if arch.moe is not None:
        fields |= _moe(arch, layout, train)
    if arch.mla is None:
        _check_dense_rope(arch)
        return TransformerConfig(
            **fields,
            num_query_groups=arch.kv_heads,
            kv_channels=arch.head_dim,
            add_qkv_bias=arch.qkv_bias,
            rotary_interleaved=False,
        )
    return MLATransformerConfig(**fields, **_mla(arch))


def _check_dense_rope(arch: Architecture) -> None:
    """Megatron-Core's RotaryEmbedding has Llama 3's constants in its code, but for the factor, and GPTModel's knows no YaRN."""
    if isinstance(arch.rope, Yarn):
        raise UserError("rope_scaling: yarn is supported with latent attention only; this model has plain attention")
    if isinstance(arch.rope, Llama3Rope) and replace(arch.rope, factor=8.0) != Llama3Rope(8.0, 1.0, 4.0, 8192):
        raise UserError(
            f"rope_scaling: low_freq_factor={arch.rope.low_freq_factor}, high_freq_factor={arch.rope.high_freq_factor}, "
            f"original_max_position_embeddings={arch.rope.original_length}; Megatron-Core has Llama 3's 1, 4 and 8192 only"
        )


def _common(arch: Architecture, layout: Layout, train: Train) -> dict[str, Any]:
    dtype = DTYPES[train.dtype]
    return {
        "num_layers": arch.layers,
        "hidden_size": arch.hidden,
        "ffn_hidden_size": arch.intermediate_size,
        "num_attention_heads": arch.heads,
        "normalization": "RMSNorm",
        "layernorm_epsilon": arch.norm_eps,
        "activation_func": F.silu,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "perform_initialization": False,
        "mtp_num_layers": arch.mtp_layers or None,
        "tensor_model_parallel_size": layout.tp,
        "sequence_parallel": layout.tp > 1,
        "context_parallel_size": layout.cp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "pipeline_model_parallel_size": layout.pp,
        "pipeline_model_parallel_layout": layout.pipeline_string(arch.layers, arch.mtp_layers) if layout.pp > 1 else None,
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None,
        # Micro-batches are as long as their content, so pipeline stages tell each other the shape first.
        "variable_seq_lengths": layout.pp > 1,
        # Interleaved pipelines with batched p2p swap messages between the same two ranks and train wrongly without an error.
        "overlap_p2p_comm": layout.vpp > 1,
        "batch_p2p_comm": layout.vpp == 1,
        "deallocate_pipeline_outputs": layout.pp > 1,
        "pipeline_dtype": dtype,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "calculate_per_token_loss": True,
        **_recompute(arch, train),
    }


def _recompute(arch: Architecture, train: Train) -> dict[str, Any]:
    if train.recompute == "none":
        return {}
    if train.recompute == "selective":
        # DeepSeek-V3 recomputes norms and the MLA up projection (arXiv 2412.19437, section 3.2.3); Megatron-Core names them so.
        modules = ["layernorm", "mlp"] if arch.mla is None else ["layernorm", "mla_up_proj", "mlp"]
        return {"recompute_granularity": "selective", "recompute_modules": modules}
    return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def _moe(arch: Architecture, layout: Layout, train: Train) -> dict[str, Any]:
    moe = arch.moe
    assert moe is not None
    # Before 0.19 Megatron-Core scales the balance loss by a rank's own tokens where the micro-batch's are meant.
    lost = layout.tp * layout.cp if MEGATRON_VERSION < (0, 19) else 1
    return {
        "num_moe_experts": moe.experts,
        "moe_ffn_hidden_size": moe.intermediate_size,
        "moe_shared_expert_intermediate_size": moe.intermediate_size * moe.shared_experts or None,
        "moe_layer_freq": [0] * moe.first_dense_layers + [1] * (arch.layers - moe.first_dense_layers),
        "moe_router_topk": moe.top_k,
        "moe_router_num_groups": moe.groups if moe.groups > 1 else None,
        "moe_router_group_topk": moe.top_groups if moe.groups > 1 else None,
        "moe_router_score_function": moe.scoring,
        "moe_router_topk_scaling_factor": moe.scaling,
        "moe_router_pre_softmax": True,
        "moe_router_dtype": "fp32",
        "moe_router_enable_expert_bias": moe.expert_bias,
        "moe_router_bias_update_rate": train.router_bias_rate,
        "moe_router_load_balancing_type": "seq_aux_loss" if train.aux_loss else "none",
        "moe_aux_loss_coeff": train.aux_loss * lost,
    }


def _mla(arch: Architecture) -> dict[str, Any]:
    mla = arch.mla
    assert mla is not None
    fields: dict[str, Any] = {
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "q_lora_rank": mla.q_lora_rank,
        "kv_lora_rank": mla.kv_lora_rank,
        "qk_head_dim": mla.qk_nope_head_dim,
        "qk_pos_emb_head_dim": mla.qk_rope_head_dim,
        "v_head_dim": mla.v_head_dim,
        "rotary_base": arch.rope_theta,
    }
    if arch.rope is None:
        return fields | {"rope_type": "rope", "rotary_scaling_factor": 1.0}
    if not isinstance(arch.rope, Yarn):
        raise UserError("rope_scaling: latent attention is supported with plain RoPE and YaRN")
    return fields | {
        "rope_type": "yarn",
        "rotary_scaling_factor": arch.rope.factor,
        "original_max_position_embeddings": arch.rope.original_length,
        "beta_fast": arch.rope.beta_fast,
        "beta_slow": arch.rope.beta_slow,
        "mscale": arch.rope.mscale,
        "mscale_all_dim": arch.rope.mscale_all_dim,
    }
