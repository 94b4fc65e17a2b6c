"""The few numbers that no data sheet gives: how much of a peak is reached. Each names the published rows that it was fitted on.

The rows are in `backtest`, where those that something was fitted on are marked; all others test it. `r1mega plan --backtest` prints them.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Constants:
    """Fractions of peaks, unless a unit is said."""

    gemm_bf16: dict[str, float] = field(default_factory=lambda: {"hopper": 0.75, "blackwell": 0.469})
    """Matrix products in bf16, by generation. Fitted: 276 TFLOP/s on H100; 782 on GB200, 961 on GB300, both without MTP."""
    gemm_fp8: dict[str, float] = field(default_factory=lambda: {"hopper": 0.65, "blackwell": 0.382})
    """In FP8, whatever the recipe, quantisation included. Fitted: 338 on H100; 1,003 on GB200, 1,635 on GB300, 699 on B200."""
    ultra: float = 1.25
    """Rate of B300 and GB300 over B200 and GB200, whose data sheets say the same peaks, but more power. Fitted: 961 and 1,635 on GB300."""
    attention: float = 0.55
    """Attention core in bf16, forward and backward together. Not fitted: FlashAttention-3's own figures (arXiv 2407.08608, figures 5, 6)."""
    traffic: float = 4.0
    """Times that a byte which is kept for the backward pass goes through HBM in a step: written and read, forward and backward. Not fitted."""
    host_s: dict[str, float] = field(default_factory=lambda: {"none": 5.1e-3, "partial": 2.2e-3, "full": 0.0})
    """Seconds of a layer, forward and backward of one micro-batch, in which the GPU waits for the host, by what CUDA graphs cover.
    Fitted: 276 and 338 on H100 and 699 on B200 (none); 782 and 1,003 on GB200, 961 on GB300 (partial); full: none are left."""
    overlap: float = 0.39
    """Share of the experts' traffic that `ep_overlap` saves, net of the SMs that it takes. Fitted: 350 beside 330 TFLOP/s on H100."""
    network: float = 0.89
    """Of a network port. Fitted: a dispatch over 64 H100 takes 4,626 us with HybridEP."""
    nvlink: float = 0.75
    """Of NVLink. Fitted: 160 GB/s of H800's 200 (DeepSeek-V3, arXiv 2412.19437, section 3.2.2), less what small messages lose."""
    decode_hbm: float = 0.6
    """Of HBM while an engine decodes, all kernels together. Not fitted; the rows of RL steps show it in order of magnitude only."""
    collective_s: float = 20e-6
    """Seconds of a small collective between the GPUs of a server, two a layer. Not fitted, as above."""
    runtime: float = 5.0e9
    """Bytes of a GPU that CUDA, NCCL and workspaces hold: 3 to 5 GB remain of a trainer that sleeps (slime's documentation)."""


CONSTANTS = Constants()
