"""Tiny models, ragged batches and layout runs that the tests of r1mega.megatron share."""

import gc
import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from r1mega.config.layout import Layout
from r1mega.config.training import Optimizer, Train
from r1mega.data.packing import ROUTED, ROUTING, TokenSequence
from r1mega.megatron import platform, topology
from r1mega.megatron.exchange import Exchange
from r1mega.megatron.policy import LocalBatch, Policy, TokenLoss
from r1mega.objectives.mismatch import off_policy_sequences
from r1mega.stages.trust import measured
from r1mega.weights.architecture import Architecture
from r1mega.weights.canonical import canonical
from r1mega.weights.moving import reader_of

# Sizes differ from each other, and 127 tokens divide by no parallel size.
DEEPSEEK: dict[str, Any] = {
    "hidden_size": 48, "num_hidden_layers": 4, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 4,
    "q_lora_rank": 24, "kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10, "vocab_size": 127,
    "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 4, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
    "rms_norm_eps": 1e-6, "max_position_embeddings": 512, "rope_theta": 10000.0, "hidden_act": "silu", "attention_bias": False,
    "tie_word_embeddings": False,
}  # fmt: skip
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
        "mscale_all_dim": 1.0}  # fmt: skip
V3: dict[str, Any] = DEEPSEEK | {
    "model_type": "deepseek_v3", "n_group": 4, "topk_group": 2, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
    "norm_topk_prob": True, "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1, "rope_scaling": YARN,
}  # fmt: skip
MOONLIGHT: dict[str, Any] = {key: value for key, value in V3.items() if key != "rope_scaling"} | {
    "q_lora_rank": None, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 3, "n_shared_experts": 2, "rms_norm_eps": 1e-5,
    "num_nextn_predict_layers": 0,
}  # fmt: skip
V2: dict[str, Any] = DEEPSEEK | {
    "model_type": "deepseek_v2", "topk_method": "greedy", "n_group": 1, "topk_group": 1, "num_experts_per_tok": 3,
    "scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 1.5, "q_lora_rank": None,
    "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
}  # fmt: skip
DENSE: dict[str, Any] = {
    "hidden_size": 48, "num_hidden_layers": 4, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 127, "rms_norm_eps": 1e-5, "max_position_embeddings": 512, "hidden_act": "silu",
}  # fmt: skip
QWEN: dict[str, Any] = DENSE | {"model_type": "qwen2", "tie_word_embeddings": True, "rope_theta": 10000.0, "use_sliding_window": False}
LLAMA: dict[str, Any] = DENSE | {
    "model_type": "llama", "tie_word_embeddings": False, "rope_theta": 500000.0, "attention_bias": False, "mlp_bias": False,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192},
}  # fmt: skip
CONFIGS = {"v3": V3, "moonlight": MOONLIGHT, "v2": V2, "qwen": QWEN, "llama": LLAMA}


@contextmanager
def cpu_platform() -> Iterator[None]:
    """The CPU platform with a process group of one rank."""
    platform.start("cpu", 1)
    try:
        yield
    finally:
        topology.disconnect()
        platform.stop()


def random_weights(arch: Architecture, seed: int = 0) -> dict[str, Tensor]:
    """A float32 value for every canonical tensor; nothing is left at 0 or 1, where a lost term would not show."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for tensor in canonical(arch):
        if tensor.copy_of is None:
            noise = torch.randn(tensor.shape, generator=generator)
            values[tensor.name] = 1 + 0.1 * noise if tensor.name.endswith("norm.weight") else 0.1 * noise
    return values


def sequences(count: int = 16, seed: int = 0, vocab: int = 127, even: bool = False) -> list[TokenSequence]:
    """Ragged sequences of 1 to 40 tokens; a prompt of 0 to 3 tokens, then random loss weights; an extra of either sign."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in range(count):
        length = 1 if index == 3 else int(torch.randint(2, 41, (), generator=generator))
        length = 16 if even else length
        weights = torch.rand(length, generator=generator) / (20 * count)
        weights[: index % 4] = 0
        advantages = torch.randn(length, generator=generator)
        tokens = torch.randint(0, vocab, (length,), generator=generator)
        # As far from the trainer's as those of a uniform distribution, and further where the advantage is large.
        extras = {"rollout_logprobs": 0.3 * advantages - math.log(vocab), "sequence": torch.full((length,), index)}
        found.append(TokenSequence(tokens, weights, {"advantages": advantages, **extras}))
    return found


def routed(found: list[TokenSequence], arch: Architecture, seed: int = 7) -> list[TokenSequence]:
    """The same sequences with experts for four tokens out of five: any, so hardly ever those that a router would choose."""
    generator = torch.Generator().manual_seed(seed)
    moe = arch.moe
    assert moe is not None
    return [
        replace(
            sequence,
            extras={
                **sequence.extras,
                ROUTING: torch.rand(len(sequence.tokens), arch.layers - moe.first_dense_layers, moe.experts, generator=generator)
                .argsort(-1)[..., : moe.top_k]
                .to(torch.uint8),
                ROUTED: torch.rand(len(sequence.tokens), generator=generator) < 0.8,
            },
        )
        for sequence in found
    ]


def objective(logprobs: Tensor, entropies: Tensor, batch: LocalBatch) -> TokenLoss:
    """Not linear in the log-probs, and not the same for all tokens: a gradient that is scaled or misplaced shows."""
    mask = batch.mask
    loss = -batch.extras["advantages"] * logprobs + 0.2 * logprobs.square()
    return TokenLoss(loss, {"entropy": (entropies * mask).sum(), "tokens": mask.sum()}, {"peak": (-logprobs).amax()})


@dataclass(frozen=True)
class Case:
    """One run: a model under a layout, and what of it is compared."""

    model: str
    layout: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    """0: compare gradients; otherwise the weights after so many optimizer steps."""
    distributed: bool = False
    """Use the distributed optimizer, which leaves each rank a part of the gradients: only with `steps`."""
    even: bool = False
    """Sequences of one length, so that every layout packs the same chunks without padding."""
    replay: bool = False
    """Send most tokens through given experts."""

    @property
    def reference(self) -> "Case":
        """The same run in one process: cases that share it must agree."""
        train = {key: value for key, value in self.train.items() if key not in ("recompute", "overlap")}
        return Case(self.model, {}, train, self.steps, even=self.even, replay=self.replay)

    @property
    def name(self) -> str:
        parts = [self.model, " ".join(f"{key}{value}" for key, value in self.layout.items()) or "one"]
        parts += [f"{key}={value}" for key, value in self.train.items()]
        parts += [f"steps={self.steps}"] * bool(self.steps) + ["distributed"] * self.distributed
        parts += ["replayed"] * self.replay
        return ", ".join(parts)


@dataclass
class Outcome:
    """What a run measured. `local` are this rank's gradients or weights by (chunk, name)."""

    policy: Policy
    scalars: dict[str, float]
    digests: dict[str, str]
    local: dict[tuple[int, str], Tensor]


def run(case: Case) -> Outcome:
    """Build, load, step; every rank calls it."""
    gc.collect()  # an earlier case's process groups keep dozens of threads until its policy is gone
    arch = Architecture.from_hf(CONFIGS[case.model])
    train = Train(**{"chunk_tokens": 128, "logprob_chunk": 17, **case.train})
    optimizer = Optimizer(lr=1e-3, clip_grad=0.0, distributed=case.distributed, weight_decay=0.1)
    policy = Policy(arch, Layout(**case.layout), train, optimizer)
    policy.exchange.initialize(0.02, seed=3)
    digests = {"initialized": digest(policy.exchange.gather(torch.float32))}
    policy.exchange.load(reader_of(random_weights(arch)))
    digests["loaded"] = digest(policy.exchange.gather(torch.float32))
    given = sequences(even=case.even)
    batches = policy.microbatches(routed(given, arch) if case.replay else given)
    forward = _total_logprob(policy, batches)
    trust = _trust(policy, batches) if train.dtype == "float32" else {}
    for _ in range(case.steps or 1):
        result = policy.step(batches, objective, 1e-3)
    scalars = {"forward": forward, "loss": result.loss, "grad_norm": result.grad_norm, **result.sums, **result.peaks, **trust}
    scalars |= {f"differing {name}": value for name, value in policy.routing_disagreement(batches).items()}
    if case.steps:
        local = {key: weight.detach().clone() for key, weight in policy.weights.items()}
    else:
        local = {key: weight.main_grad.clone() for key, weight in policy.weights.items() if hasattr(weight, "main_grad")}
    return Outcome(policy, scalars, digests, local)


def _total_logprob(policy: Policy, batches: list[LocalBatch]) -> float:
    """Of all ranks' tokens, by the schedule without a backward."""
    found = policy.logprobs(batches)
    assert (found is not None) == policy.is_last_stage
    counts = found is not None and parallel_state.get_tensor_model_parallel_rank() == 0
    total = torch.tensor(sum(values.double().sum().item() for values in found) if counts else 0.0, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item()


def _trust(policy: Policy, batches: list[LocalBatch]) -> dict[str, float]:
    """The gap to made-up log-probs of a rollout, and the tokens that the off-policy sequence mask leaves out."""
    left_out = torch.zeros((), dtype=torch.float64)
    for batch, logprobs in zip(batches, policy.logprobs(batches) or [], strict=False):
        batch.extras["old_logprobs"] = logprobs
        log_ratio = torch.where(batch.mask, logprobs - batch.extras["rollout_logprobs"], 0.0)
        advantages, owners = batch.extras["advantages"], batch.extras["sequence"]
        masked = off_policy_sequences(log_ratio, advantages, batch.mask, owners, 16, 0.1, policy.over_context)
        left_out += masked.sum() if policy.counts else 0
    return measured(policy, batches, 16).measures() | {"left_out": policy.total(left_out).item()}


def digest(values: Mapping[str, Tensor]) -> str:
    """Of the bytes of all tensors, names included."""
    found = hashlib.blake2b(digest_size=16)
    for name, value in values.items():
        found.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def canonical_values(outcome: Outcome) -> dict[str, Tensor]:
    """The run's gradients or weights as canonical tensors (buffers have no gradient: 0)."""
    policy = outcome.policy
    everything = {key: outcome.local.get(key, torch.zeros_like(weight)) for key, weight in policy.weights.items()}
    exchange = Exchange(policy.arch, policy.layout, everything)
    return {name: value.clone() for name, value in exchange.gather(torch.float32).items()}


def differences(outcome: Outcome, reference: Mapping[str, Tensor]) -> dict[str, float]:
    """By canonical tensor, the largest difference of this rank's shards of it, relative to the norm of the whole tensor.

    Every replica is compared, not only the rank that answers for a tensor. Padding that is not 0 differs infinitely.
    """
    worst: dict[str, float] = {}
    for placed in outcome.policy.exchange.placed:
        values = outcome.local.get((placed.chunk, placed.name))
        if values is None:
            continue
        padding = values.clone()
        for piece in placed.pieces:
            expected = reference[piece.tensor]
            error = (values[piece.box.slices].float() - expected[piece.source.slices]).norm().item()
            relative = error / max(expected.norm().item(), 1e-30)
            worst[piece.tensor] = max(worst.get(piece.tensor, 0.0), relative if math.isfinite(relative) else math.inf)
            padding[piece.box.slices] = 0
        if padding.any():
            worst[placed.name] = math.inf
    return worst
