"""Seconds that tensors take between GPUs. Bytes are exact; what links reach of their peaks stands in `constants`."""

from r1mega.config.layout import Layout
from r1mega.planner.constants import Constants
from r1mega.planner.devices import Device
from r1mega.planner.execution import Execution
from r1mega.weights.architecture import Architecture, Moe


def expert_seconds(arch: Architecture, layout: Layout, how: Execution, device: Device, constants: Constants, tokens: float) -> float:
    """One way of the experts' traffic, a dispatch or a combine, of a MoE layer for `tokens` tokens of one rank, in bf16.

    The slower of network and NVLink. With `dedupe` a token crosses the network once per node that it reaches (DeepEP; DeepSeek-V3,
    arXiv 2412.19437, section 3.2.2, where group-limited routing bounds their number), otherwise once per expert. The dispatch is bf16:
    Megatron-Core sends activations as they are under every FP8 recipe.
    """
    moe = arch.moe
    assert moe is not None
    if layout.ep * layout.etp == 1:
        return 0.0
    size = 2.0 * arch.hidden * tokens * how.imbalance
    domain = min(device.domain, layout.ep * layout.etp)
    nodes = max(1, layout.ep * layout.etp // domain)
    copies = moe.top_k * layout.etp
    sent = _nodes_reached(moe, nodes) if how.dedupe else float(copies)
    across = size * sent * (nodes - 1) / nodes
    within = size * copies * (domain - 1) / domain
    return max(across / (device.network * constants.network), within / (device.nvlink * constants.nvlink))


def _nodes_reached(moe: Moe, nodes: int) -> float:
    """Expected number of nodes with at least one of a token's experts; experts uniform over the groups that routing allows."""
    if moe.groups > 1 and nodes >= moe.groups:
        return float(moe.top_groups)
    reachable = nodes if moe.groups <= 1 else max(1.0, nodes * (1 - (1 - 1 / nodes) ** moe.top_groups))
    return reachable * (1 - (1 - 1 / reachable) ** moe.top_k)


def tensor_parallel_seconds(arch: Architecture, layout: Layout, device: Device, constants: Constants, tokens: float, moe: bool) -> float:
    """All-gathers and reduce-scatters of one layer's forward pass with sequence parallelism (arXiv 2205.05198, section 4.2.2).

    Two pairs in a dense layer, one in attention alone; the shared expert of a MoE layer has its own pair. `tokens`: over all tp ranks.
    """
    if layout.tp == 1:
        return 0.0
    pairs = 1 if moe and (arch.moe is None or not arch.moe.shared_experts) else 2
    nbytes = 2 * pairs * 2.0 * arch.hidden * tokens * (layout.tp - 1) / layout.tp
    rate = device.nvlink * constants.nvlink if layout.tp <= device.domain else device.network * constants.network
    return nbytes / rate


def context_parallel_seconds(arch: Architecture, layout: Layout, device: Device, constants: Constants, tokens: float) -> float:
    """Keys and values that one attention layer passes around the ring (arXiv 2310.01889); `tokens`: of one rank."""
    if layout.cp == 1:
        return 0.0
    width = 2 * arch.kv_heads * arch.head_dim if arch.mla is None else arch.heads * (arch.head_dim + arch.mla.v_head_dim)
    nbytes = 2.0 * (width / layout.tp) * tokens * (layout.cp - 1)
    rate = device.nvlink * constants.nvlink if layout.tp * layout.cp <= device.domain else device.network * constants.network
    return nbytes / rate


def ring_seconds(nbytes: float, ranks: int, spread: int, device: Device, constants: Constants) -> float:
    """A reduce-scatter or an all-gather of `nbytes` over `ranks` ranks, every `spread`-th rank of the world."""
    if ranks == 1:
        return 0.0
    rate = device.nvlink * constants.nvlink if ranks * spread <= device.domain else device.network * constants.network
    return nbytes * (ranks - 1) / ranks / rate
