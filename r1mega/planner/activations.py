"""What a layer's forward pass keeps for its backward pass, tensor by tensor, in bytes per token of one sequence over all tp x cp ranks.

Source: the tensors that Megatron-Core 0.16 with Transformer Engine saves (`transformer/multi_latent_attention.py`, `moe/`, `attention.py`),
in the manner of Korthikanti et al. (arXiv 2205.05198, section 4); of the CPU's layers, what autograd was seen to save
(`tests/test_planner_measured.py`). Megatron-Core computes norms and residuals sequence-parallel, heads and
MLPs tensor-parallel, so every tensor is split over tp x cp; of the experts' inputs each of the etp ranks holds all.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from r1mega.planner.execution import Execution
from r1mega.weights.architecture import Architecture, Mla, Moe


@dataclass(frozen=True)
class Saved:
    """One tensor: `values` per token; `by`: the recompute modules that drop it. `fp8`: bytes per value under FP8, None: as without."""

    name: str
    values: float
    by: frozenset[str] = frozenset()
    fp8: float | None = None
    extra: float = 0.0
    """Bytes per token that only FP8 keeps beside it: quantised copies for each linear layer that reads it."""


def layer_bytes(arch: Architecture, how: Execution, *, moe: bool, etp: int = 1) -> float:
    """Bytes per token that one layer keeps. Under full recompute that is its input."""
    if "full" in how.recompute:
        return how.activation_bytes * arch.hidden
    return sum(bytes_of(saved, how) for saved in tensors(arch, how, moe=moe, etp=etp) if not saved.by & how.recompute)


def working_bytes(arch: Architecture, how: Execution, *, moe: bool, etp: int = 1) -> float:
    """Bytes per token that exist while one layer runs backward and that `layer_bytes` does not count: what is recomputed, at most."""
    kept = [saved for saved in tensors(arch, how, moe=moe, etp=etp) if "full" in how.recompute or saved.by & how.recompute]
    return sum(bytes_of(saved, how) for saved in kept)


def bytes_of(saved: Saved, how: Execution) -> float:
    """Bytes per token of one tensor."""
    if how.fp8 == "none":
        return how.activation_bytes * saved.values
    return (how.activation_bytes if saved.fp8 is None else saved.fp8) * saved.values + saved.extra


def tensors(arch: Architecture, how: Execution, *, moe: bool, etp: int = 1) -> Iterator[Saved]:
    """All that a layer keeps when nothing is recomputed."""
    if how.kernels == "local":
        yield from _local(arch, moe=moe, etp=etp)
        return
    norm, hidden = frozenset({"layernorm"}), arch.hidden
    yield Saved("attention norm's input", hidden)
    # Each of the two down projections quantises its own copy; the norm's output itself is then not kept.
    yield Saved(
        "attention norm's output", hidden, norm, fp8=0 if arch.mla is not None else 1, extra=2 * hidden if arch.mla is not None else 0
    )
    if arch.mla is not None:
        yield from _latent_attention(arch, arch.mla)
    else:
        yield from _attention(arch)
    yield Saved("MLP norm's input", hidden)
    if moe and arch.moe is not None:
        # The router reads it in bf16, the shared expert quantises a copy of its own.
        yield Saved("MLP norm's output", hidden, norm, extra=hidden if arch.moe.shared_experts else 0)
        yield from _experts(arch, arch.moe, how, etp)
    else:
        mlp = frozenset({"mlp"})
        yield Saved("MLP norm's output", hidden, norm | mlp, fp8=1)
        yield Saved("MLP's gate and up", 2 * arch.intermediate_size, mlp)
        yield Saved("MLP's activation", arch.intermediate_size, mlp, fp8=1)


def _latent_attention(arch: Architecture, mla: Mla) -> Iterator[Saved]:
    up = frozenset({"mla_up_proj"})
    if mla.q_lora_rank is not None:
        yield Saved("q down projection", mla.q_lora_rank)
        yield Saved("q norm's output", mla.q_lora_rank, fp8=1)
    yield Saved("kv down projection", mla.kv_lora_rank + mla.qk_rope_head_dim)
    yield Saved("kv norm's output", mla.kv_lora_rank, fp8=1)
    head = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    yield Saved("q, k and v", arch.heads * (2 * head + mla.v_head_dim), up)
    # The output projection keeps the attention's own output (Megatron-Core's `set_save_original_input`), whatever the FP8 recipe.
    yield Saved("attention output", arch.heads * mla.v_head_dim)
    yield Saved("attention's log-sum-exp", 2 * arch.heads)


def _attention(arch: Architecture) -> Iterator[Saved]:
    yield Saved("q, k and v", arch.head_dim * (arch.heads + 2 * arch.kv_heads))
    yield Saved("attention output", arch.head_dim * arch.heads)
    yield Saved("attention's log-sum-exp", 2 * arch.heads)


def _experts(arch: Architecture, moe: Moe, how: Execution, etp: int) -> Iterator[Saved]:
    # Logits, scores, probabilities in float32 and the routing map.
    yield Saved("router", 8 * moe.experts)
    if moe.shared_experts:
        width = moe.shared_experts * moe.intermediate_size
        yield Saved("shared expert's gate and up", 2 * width)
        yield Saved("shared expert's activation", width, fp8=1)
    routed = moe.top_k * how.imbalance
    act = frozenset({"moe_act"})
    yield Saved("experts' inputs", routed * arch.hidden * etp, fp8=1)
    yield Saved("experts' gate and up", routed * 2 * moe.intermediate_size)
    yield Saved("experts' activations", routed * moe.intermediate_size, act, fp8=1)
    if how.permuted_outputs:
        yield Saved("experts' outputs", routed * arch.hidden * etp)


def _local(arch: Architecture, *, moe: bool, etp: int) -> Iterator[Saved]:
    """The layers of `megatron.platform.kernels`, in float32: SwiGLU in steps, rotations' cosines and sines, attention over laid rows."""
    norm, up = frozenset({"layernorm"}), frozenset({"mla_up_proj"})
    yield Saved("norms' inputs and roots", 2 * arch.hidden + 2)
    yield Saved("norms' outputs", 2 * arch.hidden, norm)
    if arch.mla is not None:
        mla = arch.mla
        head = mla.qk_nope_head_dim + mla.qk_rope_head_dim
        yield Saved("latents and their norms", 2 * (mla.q_lora_rank or 0) + 2 * mla.kv_lora_rank + 2 + bool(mla.q_lora_rank))
        # Values and outputs are as wide as keys.
        yield Saved("q, k, v and output, laid out", 4 * arch.heads * head, up)
        yield Saved("attention output", arch.heads * mla.v_head_dim)
        yield Saved("rotations", 4 * mla.qk_rope_head_dim, up)
    else:
        yield Saved("q, k, v and output, laid out", 2 * arch.head_dim * (arch.heads + arch.kv_heads))
        yield Saved("attention output", arch.heads * arch.head_dim)
        yield Saved("rotations", 4 * arch.head_dim)
    yield Saved("attention's log-sum-exp", arch.heads)
    if moe and arch.moe is not None:
        yield Saved("router", 8 * arch.moe.experts)
        if arch.moe.shared_experts:
            yield Saved("shared expert", 5 * arch.moe.shared_experts * arch.moe.intermediate_size)
        yield Saved("experts' inputs", arch.moe.top_k * arch.hidden * etp)
        yield Saved("experts' gate and up", arch.moe.top_k * 2 * arch.moe.intermediate_size)
    else:
        yield Saved("MLP's gate, up and activation", 5 * arch.intermediate_size, frozenset({"mlp"}))
