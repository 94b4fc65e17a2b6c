"""What was found: rows, the machine they were found on, and both files."""

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from r1mega.pipeline.files import write_atomic, write_json

State = Literal["passed", "failed", "measured", "skipped"]
_PACKAGES = ("torch", "megatron-core", "transformer-engine", "flash-attn", "transformers")


@dataclass(frozen=True)
class Row:
    """One figure. `measured` has no bound; of `skipped` the note says what is missing, of `failed` without a value what happened."""

    check: str
    case: str
    state: State
    value: float | None = None
    unit: str = ""
    bound: float | None = None
    """The largest value that passes."""
    note: str = ""


def bounded(check: str, case: str, value: float, bound: float, unit: str = "", note: str = "") -> Row:
    """A figure that passes up to `bound`; one that is not a number does not."""
    return Row(check, case, "passed" if value <= bound else "failed", value, unit, bound, note)


def machine(device: str) -> dict[str, str]:
    """Date, hardware and versions."""
    import torch

    found = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "device": device, "python": platform.python_version()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["device"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute {properties.major}.{properties.minor}"
        found |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    else:
        found["device"] = f"CPU ({platform.machine()})"
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def write(folder: Path, facts: dict[str, str], rows: Sequence[Row]) -> None:
    """`gpu_check.json` and `gpu_check.md` in a folder."""
    value: dict[str, Any] = {"machine": facts, "rows": [asdict(row) for row in rows]}
    write_json(folder / "gpu_check.json", value)
    write_atomic(folder / "gpu_check.md", "\n".join(markdown(facts, rows)) + "\n")


def markdown(facts: dict[str, str], rows: Sequence[Row]) -> list[str]:
    """A line about the machine, and a table with a group of rows a check."""
    versions = ", ".join(f"{name} {version}" for name, version in facts.items() if name not in ("date", "device"))
    lines = [f"{facts['date']}, {facts['device']}: {versions}.", "", "| check | result | value | at most | |", "|---|---|---|---|---|"]
    for check, members in groupby(rows, key=lambda row: row.check):
        lines.append(f"| **{check}** | | | | |")
        lines += map(_line, members)
    return lines


def _line(row: Row) -> str:
    state = "**failed**" if row.state == "failed" else row.state
    value = "" if row.value is None else f"{_figure(row.value)} {row.unit}".rstrip()
    bound = "" if row.bound is None else _figure(row.bound)
    return f"| {row.case} | {state} | {value} | {bound} | {row.note.replace('|', '/')} |"


def _figure(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"
