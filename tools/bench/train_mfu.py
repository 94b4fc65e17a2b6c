"""Fraction of this machine's matrix-product rate that a training step reaches, on a compute-bound V3-style model of about 60M weights.

    python tools/bench/train_mfu.py [--threads N] [--steps N]

One step is forward, backward, gradient norm, clipping and AdamW through Megatron-Core, in float32, on one process. The rate it is held
against is measured in the same run, between the steps, by square products with the same threads.
"""

import argparse
import statistics
import time

import torch

from r1mega.config.layout import Layout
from r1mega.config.training import Optimizer, Train
from r1mega.data.packing import TokenSequence
from r1mega.megatron import platform
from r1mega.planner.flops import training_flops
from r1mega.weights.architecture import Architecture, Mla, Moe

ARCH = Architecture(
    family="deepseek_v3", vocab=4096, hidden=1024, layers=3, intermediate_size=2816, heads=8, kv_heads=8, head_dim=96,
    norm_eps=1e-6, rope_theta=10000.0, rope=None, max_positions=4096, tied=False, qkv_bias=False,
    mla=Mla(q_lora_rank=384, kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64),
    moe=Moe(experts=8, shared_experts=1, top_k=2, intermediate_size=704, first_dense_layers=1, groups=2, top_groups=1,
            scoring="sigmoid", normalize=True, scaling=2.5, expert_bias=True),
    mtp_layers=0,
)  # fmt: skip
SEQUENCES, LENGTH = 16, 512


def gemm_rate(size: int = 2048) -> float:
    """FLOP/s of a square float32 product, the best of several."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    out = torch.empty(size, size)
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    platform.start("cpu", options.threads)
    from r1mega.megatron.policy import LocalBatch, Policy, TokenLoss

    def cross_entropy(logprobs: torch.Tensor, entropies: torch.Tensor, batch: LocalBatch) -> TokenLoss:
        return TokenLoss(-logprobs)

    policy = Policy(ARCH, Layout(), Train(chunk_tokens=SEQUENCES * LENGTH), Optimizer(lr=1e-4))
    policy.exchange.initialize(0.02, seed=1)
    weights = sum(weight.numel() for weight in policy.weights.values())
    uniform = torch.full((LENGTH,), 1.0 / (SEQUENCES * LENGTH))
    sequences = [TokenSequence(torch.randint(ARCH.vocab, (LENGTH,)), uniform) for _ in range(SEQUENCES)]
    batches = policy.microbatches(sequences)
    flops = SEQUENCES * training_flops(ARCH, LENGTH)
    print(f"{weights / 1e6:.1f}M weights, {SEQUENCES * LENGTH} tokens, {flops / 1e12:.3f} TFLOP a step, {options.threads} threads")
    policy.step(batches, cross_entropy, lr=1e-4)
    fractions = []
    for step in range(options.steps):
        peak = gemm_rate()
        begin = time.perf_counter()
        policy.step(batches, cross_entropy, lr=1e-4)
        seconds = time.perf_counter() - begin
        peak = (peak + gemm_rate()) / 2
        rate = flops / seconds
        fractions.append(rate / peak)
        print(f"step {step}: {seconds:.2f} s, {rate / 1e9:.1f} GFLOP/s, products {peak / 1e9:.1f} GFLOP/s, fraction {rate / peak:.3f}")
    print(f"median fraction {statistics.median(fractions):.3f}")


if __name__ == "__main__":
    main()
