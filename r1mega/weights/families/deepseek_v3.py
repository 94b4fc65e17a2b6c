"""DeepSeek-V3, R1 and Moonlight: latent attention, routed and shared experts, multi-token prediction (arXiv 2412.19437)."""

from typing import Literal

from r1mega.weights.architecture import Architecture, Mla, Moe
from r1mega.weights.families.config import Config, choice, expect, flag, integer, number, optional_integer, rope
from r1mega.weights.families.rows import embedding, final_norm, gated_mlp, head, linear, norm
from r1mega.weights.table import Mtp, Row, Shard, Storage, Table


def architecture(config: Config) -> Architecture:
    """Read a `DeepseekV3ForCausalLM` config.json. `head_dim` of the result is that of queries and keys, rotary part included."""
    scoring: Literal["sigmoid", "softmax"] = "sigmoid"
    if choice(config, "scoring_func", ("sigmoid", "softmax"), "sigmoid") == "softmax":
        scoring = "softmax"
    expert_bias = choice(config, "topk_method", ("noaux_tc", "greedy"), "noaux_tc") == "noaux_tc"
    moe = Moe(
        experts=integer(config, "n_routed_experts"),
        shared_experts=integer(config, "n_shared_experts", least=0),
        top_k=integer(config, "num_experts_per_tok"),
        intermediate_size=integer(config, "moe_intermediate_size"),
        first_dense_layers=integer(config, "first_k_dense_replace", least=0),
        groups=integer(config, "n_group"),
        top_groups=integer(config, "topk_group"),
        scoring=scoring,
        normalize=flag(config, "norm_topk_prob", True),
        scaling=number(config, "routed_scaling_factor"),
        expert_bias=expert_bias,
    )
    return latent_attention_moe("deepseek_v3", config, moe, mtp_layers=integer(config, "num_nextn_predict_layers", least=0, default=0))


def latent_attention_moe(family: Literal["deepseek_v3", "deepseek_v2"], config: Config, moe: Moe, mtp_layers: int) -> Architecture:
    """The part of config.json that DeepSeek-V2 and V3 spell alike."""
    expect(config, hidden_act="silu", attention_bias=False, mlp_bias=False, moe_layer_freq=1)
    mla = Mla(
        q_lora_rank=optional_integer(config, "q_lora_rank"),
        kv_lora_rank=integer(config, "kv_lora_rank"),
        qk_nope_head_dim=integer(config, "qk_nope_head_dim"),
        qk_rope_head_dim=integer(config, "qk_rope_head_dim"),
        v_head_dim=integer(config, "v_head_dim"),
    )
    theta, scaling = rope(config)
    heads = integer(config, "num_attention_heads")
    return Architecture(
        family=family,
        vocab=integer(config, "vocab_size"),
        hidden=integer(config, "hidden_size"),
        layers=integer(config, "num_hidden_layers"),
        intermediate_size=integer(config, "intermediate_size"),
        heads=heads,
        kv_heads=integer(config, "num_key_value_heads", default=heads),
        head_dim=mla.qk_nope_head_dim + mla.qk_rope_head_dim,
        norm_eps=number(config, "rms_norm_eps"),
        rope_theta=theta,
        rope=scaling,
        max_positions=integer(config, "max_position_embeddings"),
        tied=flag(config, "tie_word_embeddings", False),
        qkv_bias=False,
        mla=mla,
        moe=moe,
        mtp_layers=mtp_layers,
    )


def table(arch: Architecture) -> Table:
    """Rows of every tensor; the released V3 checkpoint has exactly these."""
    assert arch.mla is not None and arch.moe is not None
    attention = _attention(arch, arch.mla)
    dense = (*attention, *_dense_mlp(arch))
    moe = (*attention, *_moe_mlp(arch, arch.moe))
    dense_layers = min(arch.moe.first_dense_layers, arch.layers)
    token_embedding, output = embedding(arch), head(arch)
    return Table(
        embedding=token_embedding,
        layers=(dense,) * dense_layers + (moe,) * (arch.layers - dense_layers),
        final_norm=final_norm(arch),
        head=output,
        mtp=(Mtp(own=_mtp(arch), layer=moe),) * arch.mtp_layers,
        mtp_copies=(
            ("embed_tokens.weight", token_embedding.tensor),
            ("shared_head.head.weight", (output or token_embedding).tensor),
        ),
    )


def _attention(arch: Architecture, mla: Mla) -> tuple[Row, ...]:
    # The down projections are whole on every tensor-parallel rank (Transformer Engine's "duplicated"): a column-parallel
    # k_pe would be used by every rank's heads while its gather only splits the gradient.
    heads, hidden = arch.heads, arch.hidden
    q_rows = heads * arch.head_dim
    if mla.q_lora_rank is None:
        query: tuple[Row, ...] = (linear("self_attn.q_proj.weight", (q_rows, hidden), "self_attention.linear_q_proj.weight", Shard.ROWS),)
    else:
        rank = mla.q_lora_rank
        query = (
            linear("self_attn.q_a_proj.weight", (rank, hidden), "self_attention.linear_q_down_proj.weight"),
            norm("self_attn.q_a_layernorm.weight", rank,
                 "self_attention.q_layernorm.weight", "self_attention.linear_q_up_proj.layer_norm_weight"),
            linear("self_attn.q_b_proj.weight", (q_rows, rank), "self_attention.linear_q_up_proj.weight", Shard.ROWS),
        )  # fmt: skip
    kv_down = (mla.kv_lora_rank + mla.qk_rope_head_dim, hidden)
    kv_up = (heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank)
    return (
        norm("input_layernorm.weight", hidden, "input_layernorm.weight"),
        *query,
        linear("self_attn.kv_a_proj_with_mqa.weight", kv_down, "self_attention.linear_kv_down_proj.weight"),
        norm("self_attn.kv_a_layernorm.weight", mla.kv_lora_rank,
             "self_attention.kv_layernorm.weight", "self_attention.linear_kv_up_proj.layer_norm_weight"),
        linear("self_attn.kv_b_proj.weight", kv_up, "self_attention.linear_kv_up_proj.weight", Shard.ROWS),
        linear("self_attn.o_proj.weight", (hidden, heads * mla.v_head_dim), "self_attention.linear_proj.weight", Shard.COLUMNS),
    )  # fmt: skip


def _dense_mlp(arch: Architecture) -> tuple[Row, ...]:
    return (
        norm("post_attention_layernorm.weight", arch.hidden, "pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
        *gated_mlp("mlp.{proj}.weight", "mlp.{fc}.weight", "mlp.{fc}.weight", arch.hidden, arch.intermediate_size),
    )


def _moe_mlp(arch: Architecture, moe: Moe) -> tuple[Row, ...]:
    hidden = arch.hidden
    rows = [
        norm("post_attention_layernorm.weight", hidden, "pre_mlp_layernorm.weight"),
        Row("mlp.gate.weight", (moe.experts, hidden), "mlp.router.weight", "mlp.router.weight"),
    ]
    if moe.expert_bias:
        rows.append(Row(
            "mlp.gate.e_score_correction_bias", (moe.experts,),
            "mlp.router.expert_bias", "mlp.router.expert_bias", storage=Storage.FLOAT32, buffer=True,
        ))  # fmt: skip
    rows += gated_mlp(
        "mlp.experts.{e}.{proj}.weight", "mlp.experts.local_experts.{e}.{fc}.weight", "mlp.experts.{fc}.weight{e}",
        hidden, moe.intermediate_size, moe.experts,
    )  # fmt: skip
    if moe.shared_experts:
        shared = "mlp.shared_experts.{fc}.weight"
        rows += gated_mlp("mlp.shared_experts.{proj}.weight", shared, shared, hidden, moe.shared_experts * moe.intermediate_size)
    return tuple(rows)


def _mtp(arch: Architecture) -> tuple[Row, ...]:
    # eh_proj is quantised nowhere: the released checkpoint keeps it in bf16.
    hidden = arch.hidden
    return (
        norm("enorm.weight", hidden, "enorm.weight"),
        norm("hnorm.weight", hidden, "hnorm.weight"),
        Row("eh_proj.weight", (hidden, 2 * hidden), "eh_proj.weight", "eh_proj.weight", Shard.ROWS),
        norm("shared_head.norm.weight", hidden, "final_layernorm.weight"),
    )
