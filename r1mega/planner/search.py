"""Every legal layout of a model on a cluster, ranked by the time of a step, and why the others lose."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from math import ceil
from typing import Any

from r1mega.config.layout import Layout
from r1mega.errors import UserError
from r1mega.planner.constants import CONSTANTS, Constants
from r1mega.planner.devices import Device
from r1mega.planner.execution import SELECTIVE, Execution
from r1mega.planner.memory import Memory, training_memory
from r1mega.planner.step import Step, step
from r1mega.weights.architecture import Architecture

EVERYTHING = frozenset({"full"})
RECOMPUTE = {frozenset[str](): "none", SELECTIVE: "selective", EVERYTHING: "full"}
"""What `train.recompute` can say, from the fastest to the one that keeps least."""

OFFLOAD = (0.0, 0.5, 1.0)

ROOM = 0.95
"""Share of a GPU that a plan may fill: allocators leave gaps."""


@dataclass(frozen=True)
class Found:
    """A layout that fits, with the least recomputation and offloading that lets it fit."""

    layout: Layout
    execution: Execution
    micro_batches: int
    bytes_needed: float
    step: Step
    tokens_per_second: float
    """A GPU's, padding left out."""

    def loses(self, best: "Found") -> str:
        """What it spends more on than the best one: the phase with the largest difference."""
        mine, theirs = self.step.phases(), best.step.phases()
        return max(mine, key=lambda phase: mine[phase] - theirs[phase])


@dataclass(frozen=True)
class Rejected:
    """A layout that does not fit even with full recomputation and the optimizer on the host; `part` is the largest of its terms."""

    layout: Layout
    bytes_needed: float
    part: str


@dataclass(frozen=True)
class Search:
    """What was found, fastest first; what does not fit, nearest first; and how many layouts broke which rule before that."""

    found: tuple[Found, ...]
    rejected: tuple[Rejected, ...]
    illegal: dict[str, int]

    def record(self) -> dict[str, Any]:
        """As JSON: bytes and seconds."""
        best = self.found[0]
        return {
            "illegal": self.illegal,
            "found": [_record(one, best) for one in self.found],
            "rejected": [_named(one) for one in self.rejected],
        }


def _record(one: Found, best: Found) -> dict[str, Any]:
    execution = {"recompute": RECOMPUTE[one.execution.recompute], "offload": one.execution.offload, "micro_batches": one.micro_batches}
    figures = {"bytes": one.bytes_needed, "seconds": one.step.seconds, "phases": one.step.phases(), "loses_by": one.loses(best)}
    return {"layout": one.layout.model_dump(), **execution, **figures}


def _named(one: Rejected) -> dict[str, Any]:
    return {"layout": one.layout.model_dump(), "bytes": one.bytes_needed, "part": one.part}


def search(
    arch: Architecture, ranks: int, sequences: int, how: Execution, device: Device, constants: Constants = CONSTANTS, room: float = ROOM
) -> Search:
    """All layouts for one optimizer step of `sequences` micro-batches of `how.tokens` tokens over all ranks.

    Where data-parallel ranks do not divide them, some have padding.

    Args:
        how: what recompute and offload are chosen for; its own are not read.
        room: share of the GPU's memory that may be filled.

    Raises:
        UserError: nothing fits; the layout that comes nearest, and by how much it misses.
    """
    illegal: Counter[str] = Counter()
    found, rejected = [], []
    for layout in layouts(arch, ranks, illegal):
        outcome = _evaluated(arch, layout, ranks, sequences, how, device, constants, room * device.hbm)
        found.append(outcome) if isinstance(outcome, Found) else rejected.append(outcome)
    found.sort(key=lambda candidate: candidate.step.seconds)
    rejected.sort(key=lambda candidate: candidate.bytes_needed)
    if not found and rejected:
        best = rejected[0]
        raise UserError(
            f"no layout fits {ranks:,} {device.name.upper()}: the nearest, {short(best.layout)}, needs {best.bytes_needed / 1e9:,.1f} GB "
            f"of {device.hbm * room / 1e9:,.0f} with everything recomputed and the optimizer on the host, most of it {best.part}: "
            f"use more GPUs"
        )
    if not found:
        raise UserError(f"no layout divides {ranks:,} GPUs: {', '.join(illegal)}")
    return Search(tuple(found), tuple(rejected), dict(illegal))


def rounded(micro_batches: float, layout: Layout) -> int:
    """Micro-batches of a rank: whole ones, and for the interleaved schedule pp at a time."""
    count = max(1, ceil(micro_batches))
    return ceil(count / layout.pp) * layout.pp if layout.vpp > 1 else count


@cache
def _variant(how: Execution, offload: float, recompute: frozenset[str]) -> Execution:
    """Megatron-Core keeps all states of an optimizer that is partly offloaded in float32."""
    if offload:
        how = replace(how, master_bytes=min(how.master_bytes * 2, 4), moment_bytes=4)
    return replace(how, offload=offload, recompute=recompute)


def _evaluated(
    arch: Architecture, layout: Layout, ranks: int, sequences: int, how: Execution, device: Device, constants: Constants, room: float
) -> Found | Rejected:
    micro_batches = rounded(sequences / layout.dp(ranks), layout)

    @cache
    def parts(recompute: frozenset[str]) -> list[Memory]:
        """With the optimizer on the GPU, its states as wide as offloading has them."""
        how_much = _variant(_variant(how, 1.0, recompute), 0.0, recompute)
        return [rank.gpu for rank in training_memory(arch, layout, ranks, how_much, micro_batches, every_stage=False, constants=constants)]

    # Of the states' width, what they have where nothing is offloaded.
    narrow = how.state_bytes / _variant(how, 1.0, EVERYTHING).state_bytes

    def needed(recompute: frozenset[str], offload: float) -> float:
        kept = 1 - offload if offload else narrow
        return max(gpu.total - (1 - kept) * gpu.optimizer for gpu in parts(recompute))

    if needed(EVERYTHING, 1.0) > room:
        worst = max(parts(EVERYTHING), key=lambda gpu: gpu.total - gpu.optimizer)
        named = {**worst.parts(), "optimizer": 0.0}
        return Rejected(layout, needed(EVERYTHING, 1.0), max(named, key=lambda part: named[part]))
    best = None
    for offload in OFFLOAD:
        recompute = next((recompute for recompute in RECOMPUTE if needed(recompute, offload) <= room), None)
        if recompute is None:
            continue
        chosen = _variant(how, offload, recompute)
        found = step(arch, layout, ranks, chosen, micro_batches, device, constants)
        if best is None or found.seconds < best.step.seconds:
            rate = sequences * how.tokens / ranks / found.seconds
            best = Found(layout, chosen, micro_batches, needed(recompute, offload), found, rate)
        # More on the host makes a step faster only where it saves recomputation.
        if not recompute:
            break
    assert best is not None
    return best


# ---------------------------------------------------------------- which layouts there are


def layouts(arch: Architecture, ranks: int, illegal: Counter[str]) -> Iterator[Layout]:
    """Every combination of parallel sizes that divides model and ranks, with every way to cut the layers.

    `illegal` counts the combinations that break a rule, by the rule.
    """
    moe = arch.moe
    for tp, pp, cp in product(_divisors(ranks), repeat=3):
        if ranks % (tp * pp * cp):
            continue
        rule = _dense_rule(arch, tp, pp, cp)
        if rule:
            illegal[rule] += 1
            continue
        for ep, etp in product(_divisors(moe.experts if moe else 1), _divisors(min(moe.intermediate_size, 8) if moe else 1)):
            if ranks % (etp * ep * pp):
                illegal["etp x ep x pp does not divide the ranks"] += 1
            elif moe is not None and tp > ep * etp:
                illegal["tp is larger than ep x etp: Megatron-Core 0.16 leaves out gradients"] += 1
            else:
                for vpp, pipeline in _cuts(arch, pp):
                    yield Layout(tp=tp, pp=pp, vpp=vpp, cp=cp, ep=ep, etp=etp, pipeline=pipeline)


def _dense_rule(arch: Architecture, tp: int, pp: int, cp: int) -> str:
    """The rule that a combination breaks, or nothing."""
    if arch.heads % tp or arch.intermediate_size % tp or (arch.mla is None and arch.kv_heads % tp):
        return "tp does not divide heads or MLP columns"
    if tp * cp > 64:
        return "tp x cp is larger than 64: a layer's exchanges would cross a rack"
    if pp > arch.layers:
        return "more pipeline stages than layers"
    return ""


@cache
def _divisors(number: int) -> tuple[int, ...]:
    return tuple(size for size in range(1, number + 1) if number % size == 0)


def _cuts(arch: Architecture, pp: int) -> Iterator[tuple[int, str | None]]:
    """(chunks a rank, layout string) for every number of chunks that the schedule takes."""
    if pp == 1:
        yield 1, None
        return
    for vpp in (1, 2, 4, 8, 16):
        if pp * vpp <= arch.layers + arch.mtp_layers + 1:
            yield from ((vpp, cut) for cut in pipelines(arch.layers, arch.mtp_layers, pp, vpp))


@cache
def pipelines(layers: int, mtp_layers: int, pp: int, vpp: int) -> tuple[str, ...]:
    """Ways to cut the layers into pp x vpp chunks, as layout strings: those that teams publish, by rule.

    Even with remainders in front. As many as fit in every chunk, what is missing taken from the last rank, which has the head and MTP:
    all of it, or one layer of it from the first chunk, which has the embedding. As few as fit, the last chunk with the rest.
    """
    count = pp * vpp
    most, fewest = -(-layers // count), layers // count
    candidates = [[fewest + (chunk < layers % count) for chunk in range(count)]]
    missing = most * count - layers
    candidates.append(_shortened(most, count, pp, 0, missing))
    if missing:
        candidates.append(_shortened(most, count, pp, 1, missing - 1))
    if 0 < layers - fewest * count <= 2 and fewest:
        candidates.append([*[fewest] * (count - 1), fewest + layers - fewest * count])
    strings = ("E" + "|".join("t" * size for size in sizes) + "m" * mtp_layers + "L" for sizes in candidates if min(sizes) >= 0)
    return tuple(dict.fromkeys(strings))


def _shortened(size: int, count: int, pp: int, first: int, last: int) -> list[int]:
    """`size` layers in each chunk, less `first` in the first one and `last` in those of the last rank, from the last one backward."""
    sizes = [size] * count
    sizes[0] -= first
    for chunk in range(count - 1, -1, -pp):
        taken = min(last, sizes[chunk])
        sizes[chunk] -= taken
        last -= taken
    return sizes if last == 0 else [-1]


def short(layout: Layout) -> str:
    """The sizes above 1, and how layers are cut."""
    sizes = " ".join(f"{name} {getattr(layout, name)}" for name in ("tp", "cp", "pp", "vpp", "ep", "etp") if getattr(layout, name) > 1)
    return f"{sizes or 'one rank a copy'}{f' {folded(layout.pipeline)}' if layout.pipeline else ''}"


def folded(pipeline: str) -> str:
    """A layout string with repeated chunks written once: `Et|(tt|)*30mL`."""
    chunks, parts = pipeline.split("|"), []
    position = 0
    while position < len(chunks):
        run = 1
        while position + run < len(chunks) - 1 and chunks[position + run] == chunks[position]:
            run += 1
        last = position + run >= len(chunks)
        text = chunks[position] + ("" if last else "|")
        parts.append(f"({text})*{run}" if run > 1 else text)
        position += run
    return "".join(parts)
