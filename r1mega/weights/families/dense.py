"""What Qwen2 and Llama share: grouped-query attention and a gated MLP."""

from collections.abc import Iterator
from typing import Literal

from r1mega.errors import UserError
from r1mega.weights.architecture import Architecture
from r1mega.weights.families.config import Config, expect, flag, integer, number, rope
from r1mega.weights.families.rows import embedding, final_norm, gated_mlp, head, linear, norm
from r1mega.weights.table import Fused, Row, Shard, Storage, Table


def architecture(family: Literal["qwen2", "llama"], config: Config, qkv_bias: bool) -> Architecture:
    """The keys that both families spell alike."""
    expect(config, hidden_act="silu", mlp_bias=False)
    theta, scaling = rope(config)
    heads, hidden = integer(config, "num_attention_heads"), integer(config, "hidden_size")
    kv_heads = integer(config, "num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise UserError(f"config.json: num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}")
    return Architecture(
        family=family,
        vocab=integer(config, "vocab_size"),
        hidden=hidden,
        layers=integer(config, "num_hidden_layers"),
        intermediate_size=integer(config, "intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=integer(config, "head_dim", default=hidden // heads),
        norm_eps=number(config, "rms_norm_eps"),
        rope_theta=theta,
        rope=scaling,
        max_positions=integer(config, "max_position_embeddings"),
        tied=flag(config, "tie_word_embeddings", False),
        qkv_bias=qkv_bias,
        mla=None,
        moe=None,
        mtp_layers=0,
    )


def table(arch: Architecture) -> Table:
    """Rows of every tensor."""
    o_proj = (arch.hidden, arch.heads * arch.head_dim)
    layer = (
        norm("input_layernorm.weight", arch.hidden, "input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        *_qkv(arch, "weight", (arch.hidden,)),
        *(_qkv(arch, "bias", ()) if arch.qkv_bias else ()),
        linear("self_attn.o_proj.weight", o_proj, "self_attention.linear_proj.weight", Shard.COLUMNS),
        norm("post_attention_layernorm.weight", arch.hidden, "pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
        *gated_mlp("mlp.{proj}.weight", "mlp.{fc}.weight", "mlp.{fc}.weight", arch.hidden, arch.intermediate_size),
    )
    return Table(
        embedding=embedding(arch), layers=(layer,) * arch.layers, final_norm=final_norm(arch), head=head(arch), mtp=(), mtp_copies=()
    )


def _qkv(arch: Architecture, kind: Literal["weight", "bias"], inner: tuple[int, ...]) -> Iterator[Row]:
    """q, k and v in one parameter: for each key-value head its query heads, then k, then v."""
    parts = (arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim, arch.kv_heads * arch.head_dim)
    param = f"self_attention.linear_qkv.{kind}"
    storage = Storage.BLOCK_FP8 if kind == "weight" else Storage.PLAIN
    for index, name in enumerate("qkv"):
        fused = Fused(index, parts, groups=arch.kv_heads)
        yield Row(f"self_attn.{name}_proj.{kind}", (parts[index], *inner), param, param, Shard.ROWS, fused, storage=storage)
