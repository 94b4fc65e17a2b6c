"""The few numbers that no data sheet gives: how much of a peak is reached. Each names the published rows that it was fitted on.

The rows are in `backtest`, where those that something was fitted on are marked; all others test it. `tools/plan_backtest` prints them.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Constants:
    """Fractions of peaks, unless a unit is said."""

    gemm_bf16: dict[str, float] = field(default_factory=lambda: {"hopper": 0.75, "blackwell": 0.488})
    """Matrix products in bf16, by generation. Fitted (with the five below, jointly): H100 276, 338 and 350 TFLOP/s; GB200 782 and 1,003;
    GB300 961, 1,088 and 1,635; B200 699. Hopper's two were kept below 0.75 and 0.65, which large products alone reach."""
    gemm_fp8: dict[str, float] = field(default_factory=lambda: {"hopper": 0.65, "blackwell": 0.373})
    """In FP8, whatever the recipe, quantisation included. Fitted as above."""
    ultra: float = 1.25
    """Rate of B300 and GB300 over B200 and GB200, whose data sheets say the same peaks, but more power. Fitted as above."""
    host_s: dict[str, dict[str, float]] = field(
        default_factory=lambda: {
            "hopper": {"none": 5.2e-3, "partial": 2.8e-3, "full": 0.0},
            "blackwell": {"none": 7.5e-3, "partial": 2.8e-3, "full": 0.0},
        }
    )
    """Seconds of a layer, forward and backward of one micro-batch, in which the GPU waits for the host, by what CUDA graphs cover. Fitted
    as above, but for Blackwell without graphs: on B200 699 alone, as the faster GPU waits longer. full: none are left."""
    overlap: dict[str, float] = field(default_factory=lambda: {"hopper": 0.41, "blackwell": 0.55})
    """Share of the experts' traffic that `ep_overlap` saves, net of the SMs that it takes. Fitted: H100 350; GB300 1,635."""
    attention: float = 0.55
    """Attention core in bf16, forward and backward together. Not fitted: of an H100's 989 TFLOP/s FlashAttention-3 reaches 579
    forward, causal, and 542 backward, not causal, with heads of 128 at 4,096 tokens (arXiv 2407.08608, figures 5 and 6): 0.56 together, a
    backward being 2.5 forwards. Heads of 192 and 128 are not among its figures."""
    traffic: float = 4.0
    """Times that a byte which is kept for the backward pass goes through HBM: written and read, forward and backward. Not fitted."""
    network: float = 0.89
    """Of a network port. Fitted: a dispatch over 64 H100 takes 4,626 us with HybridEP."""
    nvlink: float = 0.8
    """Of NVLink. Not fitted: 160 GB/s of H800's 200 (DeepSeek-V3, arXiv 2412.19437, section 3.2.2)."""
    host_rate: float = 3.0e11
    """Bytes/s of a node's memory while AdamW runs there. Not fitted: half of two sockets of DDR5."""
    decode_hbm: float = 0.6
    """Of HBM while an engine decodes, all kernels together. Not fitted; the rows of RL steps show it in order of magnitude only."""
    collective_s: float = 20e-6
    """Seconds of a small collective between the GPUs of a server, two a layer. Not fitted, as above."""
    runtime: float = 5.0e9
    """Bytes of a GPU that CUDA, NCCL and workspaces hold: 3 to 5 GB remain of a trainer that sleeps (slime's documentation)."""


CONSTANTS = Constants()
