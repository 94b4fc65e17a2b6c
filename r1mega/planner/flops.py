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
