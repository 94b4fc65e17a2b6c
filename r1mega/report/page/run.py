"""A run as the page reads it: what each stage was to do, how far it is, and what it wrote. Nothing is changed."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from r1mega.pipeline.artifacts import Provenance, portable
from r1mega.pipeline.metrics import read_metrics
from r1mega.pipeline.rundir import RunDirectory, held

State = Literal["finished", "running", "stopped", "waiting"]


@dataclass(frozen=True)
class StageView:
    """One stage of a run."""

    name: str
    kind: str
    state: State
    """stopped: begun, and no process goes on with it."""
    config: dict[str, Any]
    made: Provenance | None
    rows: list[dict[str, Any]]
    """Of metrics.jsonl, training and evaluation rows mixed, in the order they were written."""
    samples: list[tuple[str, dict[str, Path]]]
    """Label of a checkpoint -> files of samples by suite; a model's label, or `update-000012`, in order."""

    @property
    def measures(self) -> bool:
        """Whether the stage measures the artifacts of others."""
        return self.kind == "evaluate"

    @property
    def training_rows(self) -> list[dict[str, Any]]:
        """Rows of updates."""
        return [row for row in self.rows if not _is_evaluation(row)]

    @property
    def evaluation_rows(self) -> list[dict[str, Any]]:
        """Rows of evaluations."""
        return [row for row in self.rows if _is_evaluation(row)]

    @property
    def updates(self) -> int:
        """Updates that are done."""
        return max((int(row["update"]) for row in self.rows), default=0)


@dataclass(frozen=True)
class RunView:
    """A run directory at one moment."""

    run: RunDirectory
    status: str
    """finished, running, failed, interrupted or not started."""
    stages: list[StageView]


def read_run(path: Path) -> RunView:
    """Read a run directory, finished or not; UserError when the folder is none."""
    run = RunDirectory.open(path)
    alive = held(path)
    return RunView(run, run.status(), [_stage(run, name, alive) for name in run.recipe.stages])


def _stage(run: RunDirectory, name: str, alive: bool) -> StageView:
    folder, stage = run.stage_dirs[name], run.recipe.stages[name]
    made = Provenance.read(folder)
    rows = read_metrics(folder / "metrics.jsonl")
    state: State = "finished" if made else "waiting" if not folder.is_dir() else "running" if alive else "stopped"
    order = [str(row.get("model", f"update-{row['update']:06d}")) for row in rows]
    found = {
        entry.name: {file.name.removesuffix(".jsonl.gz"): file for file in sorted(entry.glob("*.jsonl.gz"))} for entry in _folders(folder)
    }
    samples = sorted(found.items(), key=lambda item: (order.index(item[0]) if item[0] in order else len(order), item[0]))
    return StageView(name, stage.kind, state, made.config if made else portable(stage), made, rows, samples)


def _folders(stage_dir: Path) -> Iterator[Path]:
    samples = stage_dir / "samples"
    return (entry for entry in samples.iterdir() if entry.is_dir()) if samples.is_dir() else iter(())


def _is_evaluation(row: dict[str, Any]) -> bool:
    return any(key.startswith("eval/") for key in row)
