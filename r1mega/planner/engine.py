"""What an engine's GPUs hold, how fast they generate, and how long new weights take to reach them.

Weights are those of `weights.engine`, where SGLang keeps every tensor. A sync's time here is a bound on one link; `tools/plan_sync`
schedules it.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, erf, exp, gcd, inf, log, prod, sqrt

from r1mega.config.engine_layout import EngineLayout
from r1mega.errors import UserError
from r1mega.planner.constants import CONSTANTS, Constants
from r1mega.planner.devices import Device
from r1mega.planner.flops import decode_flops
from r1mega.weights.architecture import Architecture
from r1mega.weights.blocks import BLOCK
from r1mega.weights.engine import check_engine, engine_params
from r1mega.weights.table import Storage


@dataclass(frozen=True)
class Engine:
    """Servers cut as `layout` says. `fp8`: block-FP8 weights where DeepSeek's checkpoints have them.

    `memory`: share of a GPU for weights and key-value cache. `running`: sequences that a server decodes at once, None: as many as fit.
    """

    layout: EngineLayout
    fp8: bool = False
    memory: float = 0.8
    running: int | None = None


@dataclass(frozen=True)
class Lengths:
    """Response lengths: log-normal with this mean (before the cap) and this deviation of the logarithm, cut at `cap` tokens."""

    prompt: int
    mean: float
    cap: int
    deviation: float = 0.8

    def longer(self, tokens: float) -> float:
        """Share of the responses that have more than so many tokens."""
        if tokens <= 0:
            return 1.0
        middle = log(self.mean) - self.deviation**2 / 2
        return 0.0 if tokens >= self.cap else 0.5 * (1 - erf((log(tokens) - middle) / (self.deviation * sqrt(2))))

    def expected(self, steps: int = 256) -> float:
        """Mean length with the cap: the area under `longer`."""
        width = self.cap / steps
        return sum(self.longer((i + 0.5) * width) for i in range(steps)) * width

    def median(self) -> float:
        """Half of the responses are longer."""
        return min(self.cap, self.mean * exp(-(self.deviation**2) / 2))


SERVERS = (1, 2, 4, 8, 16, 32, 64)
"""GPUs of a server, of which one is chosen where nobody says."""


def smallest_engine(arch: Architecture, device: Device, gpus: int, fp8: bool, memory: float = 0.8) -> Engine:
    """The smallest servers whose weights leave half of their memory to the key-value cache, or the largest that there can be."""
    sizes = [tp for tp in SERVERS if gpus % tp == 0 and serves(arch, tp)]
    if not sizes:
        raise UserError(f"no server of {', '.join(map(str, SERVERS))} GPUs divides {gpus:,} GPUs and the model; say --engine-tp")
    engines = (server(arch, tp, gpus, fp8, memory) for tp in sizes)
    return next(
        (engine for engine in engines if engine_weights(arch, engine) <= 0.5 * memory * device.hbm),
        server(arch, sizes[-1], gpus, fp8, memory),
    )


def server(arch: Architecture, tp: int, gpus: int, fp8: bool, memory: float = 0.8) -> Engine:
    """Servers of `tp` GPUs: experts spread whole, and across nodes a copy of the attention on each GPU, as DeepSeek-V3 is served."""
    spread = arch.mla is not None and arch.moe is not None and tp > 8
    ep = gcd(tp, arch.moe.experts) if arch.moe is not None else 1
    return Engine(EngineLayout(servers=gpus // tp, tp=tp, ep=ep, attn_dp=tp if spread else 1), fp8, memory)


def serves(arch: Architecture, tp: int) -> bool:
    try:
        check_engine(arch, server(arch, tp, tp, False).layout)
    except UserError:
        return False
    return True


def engine_weights(arch: Architecture, engine: Engine) -> float:
    """Bytes of weights on one GPU of a server, from the boxes that a weight sync sends it; the MTP layer is not served."""
    return sum(_held(arch, engine))


@lru_cache(maxsize=64)
def _held(arch: Architecture, engine: Engine) -> tuple[float, float]:
    """(bytes of everything else, bytes of routed experts) on the first GPU; the others hold as much, but for padding."""
    held = [0.0, 0.0]
    for param in engine_params(arch, engine.layout, 0):
        # A float32 scale for each block of 128 x 128.
        size = 1 + 4 / BLOCK**2 if engine.fp8 and param.storage is Storage.BLOCK_FP8 else 2
        size = 4 if param.storage is Storage.FLOAT32 else size
        held[param.is_expert] += size * prod(param.shape)
    return held[0], held[1]


def cache_bytes(arch: Architecture, engine: Engine) -> float:
    """Bytes of key-value cache per token on each GPU that holds the sequence. Latents are whole on every GPU of an attention copy."""
    if arch.mla is not None:
        return 2.0 * arch.layers * (arch.mla.kv_lora_rank + arch.mla.qk_rope_head_dim)
    return 2.0 * arch.layers * 2 * arch.kv_heads * arch.head_dim / min(engine.layout.attn_tp, arch.kv_heads)


def cache_tokens(arch: Architecture, engine: Engine, device: Device) -> float:
    """Tokens that the key-value cache of one server holds; negative when the weights alone do not fit."""
    return (engine.memory * device.hbm - engine_weights(arch, engine)) / cache_bytes(arch, engine) * engine.layout.attn_dp


def decode_seconds(
    arch: Architecture, engine: Engine, device: Device, batch: float, context: float, constants: Constants = CONSTANTS
) -> float:
    """One token for each of `batch` sequences of one server.

    Weights that some token needs and every sequence's cache are read once, or the products take longer; and two collectives a layer.
    """
    read = engine_weights(arch, engine)
    if arch.moe is not None:
        touched = 1 - (1 - arch.moe.top_k / arch.moe.experts) ** batch
        routed = _held(arch, engine)[1]
        read -= routed * (1 - touched)
    read += cache_bytes(arch, engine) * context * batch / engine.layout.attn_dp
    flops = decode_flops(arch, context) * batch / engine.layout.tp
    compute = flops / (device.bf16 * constants.gemm_bf16[device.generation])
    collectives = 2 * arch.layers * constants.collective_s if engine.layout.tp > 1 else 0.0
    return max(read / (device.hbm_rate * constants.decode_hbm), compute) + collectives


def rollout_seconds(
    arch: Architecture, engine: Engine, device: Device, gpus: int, responses: int, lengths: Lengths, constants: Constants = CONSTANTS
) -> float:
    """A whole rollout: responses dealt evenly to the servers, decoded together as far as the cache reaches, until the last one ends.

    Continuous batching keeps a server at its largest batch while responses wait; then the batch falls as the length distribution does.
    """
    servers = max(1, gpus // engine.layout.tp)
    mine = ceil(responses / servers)
    expected = lengths.expected()
    room = max(1.0, cache_tokens(arch, engine, device) / (lengths.prompt + expected))
    together = min(float(mine), room, engine.running or inf)
    waves = mine / together - 1
    steady = decode_seconds(arch, engine, device, together, lengths.prompt + expected / 2, constants)
    total, bins = waves * expected * steady, 64
    width = lengths.cap / bins
    for i in range(bins):
        at = (i + 0.5) * width
        alive = together * lengths.longer(at)
        # Below half a response on every server the longest of all has ended.
        if alive * servers < 0.5:
            break
        total += width * decode_seconds(arch, engine, device, max(1.0, alive), lengths.prompt + at, constants)
    prefill = 2 * decode_flops(arch, lengths.prompt / 2) / 2 * lengths.prompt * mine / engine.layout.tp
    return total + prefill / (device.bf16 * constants.gemm_bf16[device.generation])


def sync_seconds(
    arch: Architecture, engine: Engine, device: Device, trainers: int, gpus: int, *, direct: bool, constants: Constants = CONSTANTS
) -> float:
    """New weights to every GPU of the engines.

    `direct`: each receives its own shard and all trainers send; otherwise every server is sent all tensors one after another.
    """
    shard = engine_weights(arch, engine)
    rate = device.network * constants.network
    if direct:
        return max(shard, shard * gpus / trainers) / rate
    return shard * engine.layout.tp / rate
