"""The planner against published figures. `tools/plan_backtest` prints them; `tests/test_planner_backtest.py` holds the bounds.

Sources: memory: arXiv 2603.07685 (Megatron-Core MoE), bf16 without optimisations, and what each of these saves. Throughput:
Megatron-Bridge's performance pages by container, its card of 2026-08, the same paper, and issue 5 of Megatron-MoE-ModelZoo; recipes from
Megatron-Bridge's `perf_recipes`. Footprints: verl's `docs/perf/dpsk.md`; slime's DeepSeek-R1 example, script and `actor.py`.
RL steps: NeMo-RL's `docs/about/performance-summary.md` and `docs/design-docs/nccl-reshard-refit.md`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from r1mega.config.engine_layout import EngineLayout
from r1mega.config.layout import Layout
from r1mega.config.training import Optimizer, Train
from r1mega.planner.activations import bytes_of, tensors
from r1mega.planner.communication import expert_seconds
from r1mega.planner.constants import CONSTANTS
from r1mega.planner.devices import DEVICES
from r1mega.planner.engine import Engine, Lengths, engine_weights, rollout_seconds, sync_seconds
from r1mega.planner.execution import Execution, states
from r1mega.planner.flops import training_flops
from r1mega.planner.memory import RankMemory, training_memory
from r1mega.planner.step import step
from r1mega.weights.architecture import Architecture

GIB = 2.0**30
LENGTH = 4096
UP, MLP = frozenset({"mla_up_proj"}), frozenset({"mlp"})
H100_1024 = Layout(tp=2, pp=8, vpp=4, ep=64, pipeline="Et|(tt|)*30mL")
PP4_VPP4 = Layout(pp=4, vpp=4, ep=64, pipeline="Et*4|(tttt|)*14tmL")
PP2_VPP8 = Layout(pp=2, vpp=8, ep=32, pipeline="Et*4|(tttt|)*14tmL")
PP2_VPP4 = Layout(pp=2, vpp=4, ep=32, pipeline="Et*7|(t*8|)*6t*6mL")
PP8_VPP4 = Layout(pp=8, vpp=4, ep=32, pipeline="Et*2|(tt|)*22t|(tt|)*7mL")
PP8_VPP2 = Layout(pp=8, vpp=2, ep=32, pipeline="Et*4|(tttt|)*14tmL")
PP16 = Layout(pp=16, ep=8, pipeline="E(tttt|)*15tmL")
BF16 = Train(dtype="bfloat16")
SHORT = Optimizer(lr=1e-6, moments="bfloat16")
AWAY = states(Optimizer(lr=1e-6, offload=1.0), BF16)


@dataclass(frozen=True)
class Row:
    """One published figure and the planner's. `bound`: largest relative error that is asked for, None: shown, for the reason in `note`."""

    group: str
    name: str
    unit: str
    published: float
    predicted: float
    bound: float | None
    fitted: bool = False
    note: str = ""

    @property
    def error(self) -> float:
        """Relative to what was published."""
        return self.predicted / self.published - 1

    @property
    def holds(self) -> bool:
        """Whether the error is within the bound."""
        return self.bound is None or abs(self.error) <= self.bound


def rows(v3: Architecture) -> list[Row]:
    """All rows. `v3`: DeepSeek-V3's architecture, MTP layer included."""
    return [*_memory(v3), *_throughput(v3), *_dispatch(v3), *_footprints(v3), *_reinforcement(v3)]


# ---------------------------------------------------------------- memory


def _memory(v3: Architecture) -> Iterator[Row]:
    """Stage 2 of 4: the figures are those of its layers, and of 15 chunks of 4 layers in flight."""
    plain = Execution(LENGTH, LENGTH, permuted_outputs=True, **states(Optimizer(lr=1e-6), BF16))
    fp8 = replace(plain, fp8="blockwise")
    found = _stage(v3, plain)
    yield _gib("weights and gradients", 36.4, found.gpu.weights + found.gpu.gradients, 0.05)
    yield _gib("master weights and optimizer", 32.1, found.gpu.optimizer, 0.05)
    yield _gib("activations", 131.0, found.gpu.activations, 0.15)
    tokens = 15 * 4 * LENGTH

    def kept(name: str, how: Execution) -> float:
        return tokens * sum(bytes_of(saved, how) for saved in tensors(v3, how, moe=True) if name in saved.name)

    def saved(module: str, how: Execution) -> float:
        return _stage(v3, how).gpu.activations - _stage(v3, replace(how, recompute=frozenset({module}))).gpu.activations

    yield _gib("saved by memory-efficient permutation", 26.3, kept("experts' outputs", plain), 0.15)
    yield _gib("saved by FP8 activations", 16.0, found.gpu.activations - _stage(v3, fp8).gpu.activations, 0.15)
    yield _gib("saved by recomputing MLA's up projection", 30.4, saved("mla_up_proj", plain), 0.15)
    yield _gib("saved by recomputing SwiGLU", 3.8, saved("moe_act", fp8), 0.15, "after FP8, as the figure's size says")
    yield _gib("saved by recomputing norms", 8.2, saved("layernorm", fp8), 0.15, "after FP8")
    moments = found.gpu.optimizer * 2 * plain.moment_bytes / plain.state_bytes
    yield _gib("saved by offloading both moments", 20.0, moments, 0.15, "published as 15 to 20; against the nearer end")


def _stage(v3: Architecture, how: Execution) -> RankMemory:
    return training_memory(v3, PP4_VPP4, 256, how, 64)[2]


def _gib(name: str, published: float, nbytes: float, bound: float, note: str = "") -> Row:
    return Row("memory of V3, 256 GPUs, PP4 VPP4 EP64", name, "GiB", published, nbytes / GIB, bound, note=note)


# ---------------------------------------------------------------- throughput


def _throughput(v3: Architecture) -> Iterator[Row]:
    trunk = replace(v3, mtp_layers=0)
    h100: dict[str, Any] = {"recompute": UP | MLP}
    h100_fp8: dict[str, Any] = {**h100, "fp8": "tensorwise"}
    h100_block: dict[str, Any] = {**h100, "fp8": "blockwise"}
    overlapped: dict[str, Any] = {"reduce_overlap": True, "gather_overlap": True}
    part: dict[str, Any] = {"graphs": "partial", **overlapped}
    part_up: dict[str, Any] = {**part, "recompute": UP}
    mx: dict[str, Any] = {**part, "fp8": "mxfp8"}
    full: dict[str, Any] = {**mx, "graphs": "full", "ep_overlap": True}
    eager: dict[str, Any] = {"fp8": "mxfp8", **overlapped, "recompute": UP}
    over = {"ep_overlap": True}
    per_token = training_flops(v3, LENGTH) / LENGTH / 1e12
    notes = {"557 MXFP8, 25.11": "the recipe of 699 in an earlier container, 20 % slower: which of them a cluster has is not in a recipe"}
    # (architecture, device, ranks, layout, sequences a step and a micro-batch, execution, published tokens/s/GPU, name, fitted, bound)
    table: list[tuple[Architecture, str, int, Layout, int, int, dict[str, Any], float, str, bool, float | None]] = [
        (v3, "h100", 1024, H100_1024, 16384, 1, h100, 1061, "276 bf16, card of 2026-08", True, 0.10),
        (v3, "h100", 1024, H100_1024, 8192, 1, h100_fp8, 1297, "338 FP8 per tensor, 25.09", True, 0.10),
        (v3, "h100", 1024, H100_1024, 8192, 1, h100_block, 330 / per_token, "330 FP8 blockwise, 25.09", False, 0.10),
        (v3, "h100", 1024, H100_1024, 8192, 1, h100_block | over, 350 / per_token, "350 FP8 blockwise, overlap, issue 5", True, 0.10),
        (v3, "h100", 1024, H100_1024, 8192, 1, h100_block | over, 1412, "368 FP8 blockwise, overlap, paper", False, 0.10),
        (trunk, "gb200", 256, _trunk(PP4_VPP4), 4096, 1, part_up, 3139, "782 bf16 without MTP, 25.11", True, 0.10),
        (trunk, "gb200", 256, _trunk(PP8_VPP4), 4096, 1, {**mx, "recompute": UP}, 4018, "1,003 MXFP8 without MTP, 25.11", True, 0.10),
        (v3, "gb200", 256, PP4_VPP4, 4096, 1, {**mx, "recompute": MLP}, 3955, "1,028 MXFP8, 26.02", False, 0.10),
        (v3, "gb200", 256, PP4_VPP4, 8192, 1, part_up | over, 3298, "857 bf16, paper", False, 0.10),
        (v3, "gb200", 256, PP4_VPP4, 8192, 1, {**mx, "recompute": UP} | over, 4020, "1,048 MXFP8, paper", False, 0.10),
        (v3, "gb200", 256, PP4_VPP4, 4096, 1, {**full, "recompute": UP}, 4912, "1,276 MXFP8, 26.08", False, 0.10),
        (trunk, "gb300", 256, _trunk(PP2_VPP4), 4096, 1, part_up, 3848, "961 bf16 without MTP, 25.11", True, 0.10),
        (trunk, "gb300", 256, _trunk(PP2_VPP4), 4096, 1, {**mx, "recompute": UP}, 4357, "1,088 MXFP8 without MTP, 25.11", True, 0.10),
        (v3, "gb300", 256, PP2_VPP8, 4096, 2, {**mx, "recompute": UP}, 4612, "1,199 MXFP8, 26.02", False, 0.10),
        (v3, "gb300", 256, PP4_VPP4, 8192, 1, mx | over, 4730, "1,233 MXFP8, paper", False, 0.10),
        (v3, "gb300", 256, PP2_VPP8, 4096, 1, full, 6288, "1,635 MXFP8, 26.08", True, 0.10),
        (v3, "b200", 256, PP16, 2048, 1, eager, 2139, "557 MXFP8, 25.11", False, None),
        (v3, "b200", 256, PP16, 4096, 1, eager, 2689, "699 MXFP8, 26.02", True, 0.10),
        (v3, "b200", 256, PP8_VPP2, 4096, 1, {**mx, "recompute": UP | MLP} | over, 3328, "864 MXFP8, 26.04", False, 0.10),
        (v3, "b300", 256, PP16, 4096, 1, eager, 2983, "776 MXFP8, 26.02", False, 0.10),
    ]  # fmt: skip
    for arch, device, ranks, layout, sequences, each, settings, published, name, fitted, bound in table:
        kept = states(SHORT, Train(dtype="bfloat16", fp8=settings.get("fp8", "none")))
        how = Execution(LENGTH * each, LENGTH, **settings, **kept)
        found = step(arch, layout, ranks, how, sequences // (layout.dp(ranks) * each), DEVICES[device])
        note = notes.get(name, "")
        label = f"{ranks:,} {device.upper()}: {name}"
        yield Row("throughput of V3", label, "tok/s/GPU", published, found.tokens_per_second, bound, fitted, note)


def _trunk(layout: Layout) -> Layout:
    assert layout.pipeline is not None
    return layout.model_copy(update={"pipeline": layout.pipeline.replace("m", "")})


def _dispatch(v3: Architecture) -> Iterator[Row]:
    layout = Layout(ep=64)
    for name, dedupe, published in (("HybridEP", True, 4626), ("all-to-all", False, 9164)):
        how = Execution(LENGTH, LENGTH, dedupe=dedupe)
        seconds = expert_seconds(v3, layout, how, DEVICES["h100"], CONSTANTS, LENGTH)
        yield Row("a dispatch, EP64 on H100", f"4,096 tokens, {name}", "us", published, 1e6 * seconds, 0.10, dedupe)


# ---------------------------------------------------------------- footprints


def _footprints(v3: Architecture) -> Iterator[Row]:
    trunk = replace(v3, mtp_layers=0)
    everything = frozenset({"full"})
    verl = Layout(tp=8, pp=12, ep=8, pipeline="Et*5|(t*5|)*10t*6L")
    found = training_memory(trunk, verl, 96, Execution(6144, 6144, recompute=everything, **AWAY), 16)
    engine = Engine(EngineLayout(tp=32), memory=0.6)
    asleep = engine_weights(trunk, engine)
    # Asleep, the engine keeps its weights on the host (vLLM's level 1); policy and reference are parked there.
    nodes = [8 * (sum(rank.host.values()) + 2 * rank.gpu.weights + asleep) for rank in found]
    peak = max(max(rank.gpu.total for rank in found), engine.memory * DEVICES["h20"].hbm + CONSTANTS.runtime)
    group = "footprint of V3"
    yield Row(group, "verl, 96 H20: peak of a GPU", "GB", 66, peak / 1e9, 0.15)
    yield Row(group, "verl, 96 H20: host memory of a node, mean", "GB", 1500, sum(nodes) / len(nodes) / 1e9, 0.15)
    slime = Layout(tp=8, cp=4, pp=4, ep=32, pipeline="Et*16|t*16|t*16|t*13L")
    found = training_memory(trunk, slime, 128, Execution(65536, 16384, recompute=everything, **AWAY), 16)
    # Paused, weights and gradients are kept on the host, beside copies of policy and reference (`weights_backuper`).
    host = max(8 * (sum(rank.host.values()) + 3 * rank.gpu.weights + rank.gpu.gradients) for rank in found)
    yield Row(group, "slime, 128 H100: host memory of the fullest node", "GB", 1450, host / 1e9, 0.15, note="published as 1.4 to 1.5 TB")


# ---------------------------------------------------------------- reinforcement learning


def _reinforcement(v3: Architecture) -> Iterator[Row]:
    trunk, group = replace(v3, mtp_layers=0), "RL on V3, order of magnitude"
    engine, device = Engine(EngineLayout(tp=32)), DEVICES["h100"]
    lengths = Lengths(prompt=200, mean=701, cap=1536)
    layout = Layout(pp=16, ep=16, pipeline="Ettt|(tttt|)*14ttL")
    how = Execution(1736, 901, recompute=frozenset({"full"}), **states(SHORT, BF16))
    micro_batches = 512 * 901 // (16 * 1736)
    train = step(trunk, layout, 256, how, micro_batches, device).seconds
    total = rollout_seconds(trunk, engine, device, 256, 512, lengths) + 4 / 3 * train
    total += sync_seconds(trunk, engine, device, 256, 256, direct=True)
    note = "it waits for sequences of 1,536 tokens in short micro-batches; start-up of phases and offloading are not modelled"
    yield Row(group, "NeMo-RL, 256 H100: a GRPO step of 512 samples", "s", 134, total, None, note=note)
    note = "a bound of links at work all the time; theirs packs and synchronises between groups of tensors"
    seconds = sync_seconds(trunk, engine, device, 256, 256, direct=True)
    yield Row(group, "NeMo-RL: PP16 x EP16 to TP32 x DP8, shard to shard", "s", 2.61, seconds, None, note=note)
    lengths = Lengths(prompt=500, mean=1960, cap=4096)
    seconds = rollout_seconds(trunk, Engine(EngineLayout(tp=32), memory=0.6), DEVICES["h20"], 96, 512 * 8, lengths)
    note = "batch and length distribution are not published; here 512 prompts of 8, in eager mode there"
    yield Row(group, "verl, 96 H20: a rollout of mean length 1,960", "s", 1050, seconds, None, note=note)
