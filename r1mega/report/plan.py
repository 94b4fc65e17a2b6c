"""What `r1mega plan` prints: plain columns, and a bar of what fills each GPU."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from r1mega.config.layout import Layout
from r1mega.planner.backtest import Row
from r1mega.planner.compute import PARTS, Seconds
from r1mega.planner.devices import Device
from r1mega.planner.memory import Memory, RankMemory
from r1mega.planner.plan import Generation, Problem, StagePlan
from r1mega.planner.search import RECOMPUTE, Found, Search, short
from r1mega.report.audit import columns, spans

WIDTH = 60
_GLYPHS = {
    "weights": "W", "gradients": "G", "optimizer": "O", "activations": "A", "working": "k", "dispatch": "d", "logits": "L", "buckets": "s",
    "runtime": "r",
}  # fmt: skip
_GB = 1e9


def described(stages: Sequence[StagePlan], device: Device) -> Iterator[str]:
    """Every stage: memory of its rank classes, the engine, the host, the time, and what does not fit."""
    for stage in stages:
        yield f"{stage.name} ({stage.kind}) on {stage.ranks:,} {device.name.upper()}{_layout(stage)}"
        if stage.memory:
            yield from _memory(stage.memory, device)
        if stage.generation is not None:
            yield from _generation(stage.generation)
        if stage.host:
            parts = ", ".join(f"{name} {size / _GB:,.0f}" for name, size in stage.host.items())
            yield f"  host: {sum(stage.host.values()) / _GB:,.0f} of {device.host / _GB:,.0f} GB on the fullest node ({parts})"
        if stage.seconds:
            yield from _time(stage)
        yield from (f"  DOES NOT FIT: {problem_line(problem)}" for problem in stage.problems)
        yield ""
    yield verdict(stages)


def verdict(stages: Sequence[StagePlan]) -> str:
    """The first thing that does not fit, and by how much; or that all fits."""
    for stage in stages:
        for problem in stage.problems:
            return f"does not fit: {stage.name}: {problem_line(problem)}"
    return "everything fits"


def problem_line(problem: Problem) -> str:
    """One problem in a line, with the number that breaks and what helps."""
    if "tokens" in problem.what:
        return f"{problem.where} needs {problem.needs:,.0f} {problem.what}, there are {max(0, problem.has):,.0f}; {problem.advice}"
    needs, has = problem.needs / _GB, problem.has / _GB
    return (
        f"{problem.where} needs {needs:,.1f} GB of {problem.what}, there are {has:,.1f}: {needs - has:,.1f} GB too much; {problem.advice}"
    )


def _layout(stage: StagePlan) -> str:
    if stage.layout is None:
        return ""
    sizes = {name: getattr(stage.layout, name) for name in ("tp", "cp", "pp", "vpp", "ep", "etp")}
    shown = " ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one rank a copy"
    return f": {shown}, dp {stage.layout.dp(stage.ranks)}, {stage.micro_batches} micro-batches of {stage.tokens:,} tokens"


def _memory(ranks: Sequence[RankMemory], device: Device) -> Iterator[str]:
    classes = _classes(ranks)
    used = [name for name in Memory.__dataclass_fields__ if any(getattr(gpu, name) for _, gpu in classes)]
    rows = [["pp", *used, "GB"]]
    rows += [[stages, *(f"{getattr(gpu, name) / _GB:.1f}" for name in used), f"{gpu.total / _GB:.1f}"] for stages, gpu in classes]
    yield from columns(rows)
    width = max(len(stages) for stages, _ in classes)
    key = " ".join(f"{_GLYPHS[name]} {name}" for name in used)
    yield f"  {'':{width}}  {key}; | marks {device.hbm / _GB:,.0f} GB"
    yield from (f"  {stages:>{width}}  {bar(gpu, device.hbm)}" for stages, gpu in classes)


def _classes(ranks: Sequence[RankMemory]) -> list[tuple[str, Memory]]:
    """Neighbouring pipeline stages that hold the same."""
    grouped = groupby(ranks, key=lambda rank: {name: round(size / _GB, 1) for name, size in rank.gpu.parts().items()})
    found = [list(members) for _, members in grouped]
    return [(spans(rank.stage for rank in members), members[0].gpu) for members in found]


def bar(gpu: Memory, capacity: float) -> str:
    """One character is a sixtieth of the GPU; `|` is its end, and what stands behind it does not fit."""
    line, filled = "", 0.0
    for name, size in gpu.parts().items():
        filled += size
        line += _GLYPHS[name] * (round(WIDTH * filled / capacity) - len(line))
    line = line.ljust(WIDTH, ".")
    return f"{line[:WIDTH]}|{line[WIDTH : 2 * WIDTH]}{'>' if len(line) > 2 * WIDTH else ''}"


def _generation(found: Generation) -> Iterator[str]:
    engine = found.engine.layout
    how = f"{engine.tp} GPU{'s' if engine.tp > 1 else ''}{f', attention in {engine.attn_dp} copies' if engine.attn_dp > 1 else ''}"
    yield (
        f"  engine: {found.servers:,} servers of {how}; a GPU holds {found.weights / _GB:.1f} GB of weights and "
        f"{max(0, found.cache) / _GB:.1f} of cache, {max(0, found.cache_tokens):,.0f} tokens a server"
    )


def _time(stage: StagePlan) -> Iterator[str]:
    parts = "\n".join(columns([[f"  {phase}", _seconds(value), f"{value / stage.cycle:.0%}"] for phase, value in stage.seconds.items()]))
    what = "a rollout and its updates" if stage.kind == "grpo" else "an optimizer step"
    every = "" if stage.cycles is None else f"; all {stage.cycles:,}: {_long(stage.cycles * stage.cycle)}"
    yield f"  {what}: {_seconds(stage.cycle)}{every}"
    yield parts
    if stage.busy is not None:
        yield f"  a training step of the slowest stage: {_busy(stage.busy, stage.bubble)}"
    yield "  FLOPs per token: " + ", ".join(f"{name} {_flops(value)}" for name, value in stage.flops.items())


def _busy(busy: Seconds, bubble: float) -> str:
    whole = busy.total + bubble
    parts = [(name, value) for name, value in zip(PARTS, busy.parts(), strict=True) if value] + [("bubble", bubble)]
    return ", ".join(f"{name} {value / whole:.0%}" for name, value in parts)


def _flops(value: float) -> str:
    return f"{value / 1e9:,.1f} G" if value >= 1e9 else f"{value / 1e6:,.1f} M"


def _seconds(value: float) -> str:
    return f"{value:,.0f} s" if value >= 100 else f"{value:.3g} s"


def _long(seconds: float) -> str:
    return f"{seconds / 86400:,.1f} days" if seconds >= 172800 else f"{seconds / 3600:,.1f} h"


def ranked(name: str, found: Search, device: Device, ranks: int, top: int) -> Iterator[str]:
    """The best layouts, why those after the first lose, and what became of all others."""
    best = found.found[0]
    every = len(found.found) + len(found.rejected)
    fit = f"{len(found.found):,} layouts of {every:,} fit {ranks:,} {device.name.upper()}"
    yield f"{name}: {fit}; fastest first, each combination of sizes with its best cut"
    rows = [["", "layout", "recompute", "offload", "micro-batches", "GB", "s/step", "tok/s/GPU", "loses by"]]
    shown = _distinct(found.found)[:top]
    for index, one in enumerate(shown, 1):
        how = one.execution
        loses = "" if one is best else f"{one.step.seconds / best.step.seconds - 1:.1%}: {one.loses(best)}"
        figures = [f"{one.bytes_needed / _GB:.1f}", f"{one.step.seconds:.2f}", f"{one.tokens_per_second:,.0f}"]
        rows.append([str(index), short(one.layout), RECOMPUTE[how.recompute], f"{how.offload:g}", str(one.micro_batches), *figures, loses])
    yield from columns(rows, numbers=False)
    listed = {id(one) for one in shown}
    slower = Counter(one.loses(best) for one in found.found if id(one) not in listed)
    yield from _counted("slower, by what they spend most more on", slower)
    yield from _counted("do not fit, by the largest term", Counter(one.part for one in found.rejected))
    yield from _counted("not legal", Counter(found.illegal))


def _distinct(found: Sequence[Found]) -> list[Found]:
    """The best of each combination of sizes, however the layers are cut."""
    best: dict[Layout, Found] = {}
    for one in found:
        best.setdefault(one.layout.model_copy(update={"pipeline": None}), one)
    return list(best.values())


def _counted(title: str, counts: Counter[str]) -> Iterator[str]:
    if counts:
        yield f"{title}:"
        yield from columns([[what, f"{count:,}"] for what, count in counts.most_common()])


def backtested(rows: Iterable[Row]) -> list[str]:
    """The back-test as a Markdown table; rows that a constant was fitted on are marked."""
    lines = ["| figure | published | planner | error | asked | |", "|---|---|---|---|---|---|"]
    for group, members in groupby(rows, key=lambda row: row.group):
        lines.append(f"| **{group}** | | | | | |")
        lines += map(_backtested, members)
    return lines


def _backtested(row: Row) -> str:
    asked = "-" if row.bound is None else f"{row.bound:.0%}"
    marks = [mark for mark, said in (("fitted", row.fitted), ("**outside**", not row.holds), (row.note, row.note)) if said]
    figures = f"{_figure(row.published)} {row.unit} | {_figure(row.predicted)} | {row.error:+.1%} | {asked}"
    return f"| {row.name} | {figures} | {'; '.join(marks)} |"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
