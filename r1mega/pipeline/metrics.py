"""The metrics of a stage: one JSON row per update, mirrored to TensorBoard."""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class MetricsWriter:
    """Appends rows to `metrics.jsonl`. A stage that resumes says so first; otherwise the file starts anew.

    Args:
        folder: the stage's folder.
        enabled: False on every rank but 0, where all calls do nothing.
    """

    def __init__(self, folder: Path, enabled: bool) -> None:
        self._path = folder / "metrics.jsonl"
        self._events = folder / "tensorboard"
        self._enabled = enabled
        self._resumed_after = -1
        self._file: int | None = None
        self._board: Any = None

    def resume(self, after: int) -> None:
        """Keep the rows up to update `after`, drop those past it. Call before the first `write`."""
        if self._file is not None:
            raise RuntimeError("resume comes before the first write")
        self._resumed_after = after

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row; it holds `update`, and plain JSON values. NaN and infinity are written as null.

        A row is one write of one line, so a reader never sees half of it unless the machine stops in its middle.
        """
        if not self._enabled:
            return
        if self._file is None:
            self._open()
        assert self._file is not None
        os.write(self._file, (json.dumps(_finite(row), ensure_ascii=False) + "\n").encode())
        if self._board is not None:
            for name, value in scalars(row):
                self._board.add_scalar(name, value, row["update"])

    def close(self) -> None:
        """Flush and close; harmless when nothing was written."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if self._board is not None:
            self._board.close()
            self._board = None

    def _open(self) -> None:
        kept = [row for row in read_metrics(self._path) if row["update"] <= self._resumed_after]
        if not kept:
            shutil.rmtree(self._events, ignore_errors=True)
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")
        os.replace(temporary, self._path)
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return  # the extra `report` is not installed; the JSON rows are complete without it
        self._board = SummaryWriter(str(self._events), purge_step=self._resumed_after + 1 if kept else None)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`, without a last line that was cut off."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def scalars(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a row by name; `{"value": v, "ci95": [lo, hi]}` counts as v."""
    for name, value in row.items():
        if isinstance(value, Mapping):
            if "value" in value:
                yield prefix + name, float(value["value"])
            else:
                yield from scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and prefix + name != "update":
            yield prefix + name, float(value)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
