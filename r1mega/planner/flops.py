"""Floating-point operations of a model, counted from its matrix products (2 per multiply-add).

Norms, softmax, activations and routing's top-k are left out, as in Megatron-LM's and DeepSeek's own accounting.
"""

from r1mega.weights.architecture import Architecture


def forward_flops(arch: Architecture, length: int) -> float:
    """FLOPs of one forward pass over a sequence, output head included, attention causal (half of the full square)."""
    layers = sum(_layer(arch, index) for index in range(arch.layers))
    linear = layers + _head(arch)
    if arch.mtp_layers:
        linear += arch.mtp_layers * (2 * arch.hidden**2 + _layer(arch, arch.layers) + arch.hidden * arch.vocab)
    pairs = (arch.layers + arch.mtp_layers) * arch.heads * _attended(arch) / 2
    return 2 * length * (linear + pairs * length)


def training_flops(arch: Architecture, length: int) -> float:
    """FLOPs of one sequence in training: the backward pass costs two forward passes; nothing recomputed."""
    return 3 * forward_flops(arch, length)


def active_parameters(arch: Architecture) -> int:
    """Weights in the matrix products of one token, output head included, embedding and MTP layer left out."""
    return sum(_layer(arch, index) for index in range(arch.layers)) + _head(arch)


def layer_weights(arch: Architecture, moe: bool) -> int:
    """Weights that one token meets in a decoder layer of either kind."""
    return _layer(arch, arch.layers if moe or arch.moe is None else 0)


def head_weights(arch: Architecture) -> int:
    """Weights of the output layer."""
    return _head(arch)


def mtp_weights(arch: Architecture) -> int:
    """Weights of an MTP layer's own projection, which joins hidden states and embeddings."""
    return 2 * arch.hidden**2


def mla_up_weights(arch: Architecture) -> int:
    """Weights of the up projections of latent attention, which `mla_up_proj` recomputes; 0 without latent attention."""
    if arch.mla is None:
        return 0
    mla, query = arch.mla, arch.heads * arch.head_dim
    q = 0 if mla.q_lora_rank is None else mla.q_lora_rank * query
    return q + mla.kv_lora_rank * arch.heads * (mla.qk_nope_head_dim + mla.v_head_dim)


def attention_flops(arch: Architecture, length: int) -> float:
    """FLOPs per token of one layer's attention core, causal: half of the full square."""
    return arch.heads * _attended(arch) * length


def decode_flops(arch: Architecture, context: float) -> float:
    """FLOPs of one generated token at a context length, output head included, no MTP.

    Latent attention decodes absorbed (DeepSeek-V2, arXiv 2405.04434, section 2.1.2): each head meets the latents themselves.
    """
    attended = _attended(arch) if arch.mla is None else 2 * arch.mla.kv_lora_rank + arch.mla.qk_rope_head_dim
    return 2 * (active_parameters(arch) + arch.layers * arch.heads * attended * context)


def _head(arch: Architecture) -> int:
    return arch.hidden * (arch.vocab if arch.head == "lm" else 1)


def _layer(arch: Architecture, index: int) -> int:
    """Weights that one token meets in a decoder layer; MTP layers are numbered after the last and are like it."""
    if arch.moe is None or index < arch.moe.first_dense_layers:
        return _attention(arch) + 3 * arch.hidden * arch.intermediate_size
    moe = arch.moe
    return _attention(arch) + arch.hidden * moe.experts + 3 * arch.hidden * moe.intermediate_size * (moe.top_k + moe.shared_experts)


def _attention(arch: Architecture) -> int:
    if arch.mla is None:
        return arch.hidden * arch.head_dim * (2 * arch.heads + 2 * arch.kv_heads)
    mla, query = arch.mla, arch.heads * (arch.mla.qk_nope_head_dim + arch.mla.qk_rope_head_dim)
    q = arch.hidden * query if mla.q_lora_rank is None else mla.q_lora_rank * (arch.hidden + query)
    kv = arch.hidden * (mla.kv_lora_rank + mla.qk_rope_head_dim) + mla.kv_lora_rank * arch.heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    return q + kv + arch.heads * mla.v_head_dim * arch.hidden


def _attended(arch: Architecture) -> int:
    """Multiply-adds of one head for one pair of positions: scores and weighted values."""
    if arch.mla is None:
        return 2 * arch.head_dim
    return arch.mla.qk_nope_head_dim + arch.mla.qk_rope_head_dim + arch.mla.v_head_dim
