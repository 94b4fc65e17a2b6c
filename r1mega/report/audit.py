"""What `r1mega audit` prints: plain columns, one line per thing, so that `grep` and `diff` work on it."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from r1mega.config.layout import Layout, LayoutFile
from r1mega.weights.audit import Figures, Findings
from r1mega.weights.placement import LocalParam
from r1mega.weights.ranks import RankClass

_FIGURES = {"stored tensors": "stored_tensors", "stored bytes": "stored_bytes", "tensors": "tensors", "values": "values"}


def described(folder: Path, expected: Figures) -> list[str]:
    """The figures of a checkpoint that is not there."""
    rows = [[what, f"{getattr(expected, name):,}"] for what, name in _FIGURES.items()]
    return [f"{folder}: no weights here; the checkpoint that its config.json describes holds", *columns(rows)]


def inspected(folder: Path, expected: Figures, found: Figures, findings: Findings) -> list[str]:
    """The figures of a folder with weights, and what is wrong with it."""
    rows = [["", "found", "config.json"]]
    rows += [[what, f"{getattr(found, name):,}", f"{getattr(expected, name):,}"] for what, name in _FIGURES.items()]
    lines = findings.lines()
    return [f"{folder}:", *columns(rows), f"{len(lines)} findings" if lines else "no findings", *(f"  {line}" for line in lines)]


def fitted(source: Path, file: LayoutFile, classes: Sequence[RankClass]) -> list[str]:
    """A layout that fits, and what a rank of each class holds."""
    rows = [["ranks", "count", "pp", "parameters", "values", "bytes in bf16"]]
    for found in classes:
        stages = sorted({file.layout.coordinates(rank, file.ranks).pp for rank in found.ranks})
        counts = (found.parameters, found.values, found.bytes_in_bf16)
        rows.append([spans(found.ranks), str(len(found.ranks)), spans(stages), *(f"{count:,}" for count in counts)])
    return [f"{source}: {_sizes(file.layout, file.ranks)}; fits", "a rank of each class holds", *columns(rows)]


def built(rank: int, file: LayoutFile, params: Sequence[LocalParam], differences: Sequence[str], library: str) -> list[str]:
    """The parameters of one rank, and how they differ from what Megatron-Core built."""
    at = file.layout.coordinates(rank, file.ranks)
    rows = [[str(param.chunk), param.name, str(list(param.shape))] for param in params]
    verdict = (
        f"{len(differences)} differences from {library}" if differences else f"as {library} builds them: names, shapes, layers, experts"
    )
    return [
        f"rank {rank}: tp {at.tp}, cp {at.cp}, dp {at.dp}, pp {at.pp}; experts: etp {at.etp}, ep {at.ep}, edp {at.edp}",
        *columns([["chunk", "parameter", "shape"], *rows], numbers=False),
        f"{len(params)} parameters and buffers, {verdict}",
        *(f"  {line}" for line in differences),
    ]


def spans(numbers: Iterable[int]) -> str:
    """Ascending numbers, runs shortened: `0-3, 8, 10-11`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)


def _sizes(layout: Layout, ranks: int) -> str:
    sizes = {name: getattr(layout, name) for name in ("tp", "cp", "pp", "vpp", "ep", "etp")}
    sizes |= {"dp": layout.dp(ranks), "edp": layout.edp(ranks)}
    return f"{ranks:,} ranks, {', '.join(f'{name} {size}' for name, size in sizes.items())}"


def columns(rows: Sequence[Sequence[str]], numbers: bool = True) -> list[str]:
    """Aligned columns: the first to the left, the others to the right when they are numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = (
        [row[0].ljust(widths[0]), *(c.rjust(w) if numbers else c.ljust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        for row in rows
    )
    return [f"  {'  '.join(row)}".rstrip() for row in aligned]
