"""`r1mega submit`: check, write the run directory, and hand one job a stage to NeMo-Run."""

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from r1mega.config.cluster import Cluster, Slurm
from r1mega.config.loading import load_cluster, load_recipe
from r1mega.config.schema import Recipe
from r1mega.errors import UserError
from r1mega.launch import nemo
from r1mega.launch.plan import StageTask, check_container, tasks
from r1mega.pipeline import files
from r1mega.pipeline.preflight import check_references
from r1mega.pipeline.rundir import RunDirectory, check_belongs, claimed

_RECORD = "submitted.json"
_ANSWER_S = 20.0


@dataclass(frozen=True)
class Submission:
    """What was submitted last, `submitted.json` of the run directory."""

    cluster: str
    executor: str
    experiment: str
    folder: str
    """Where NeMo-Run keeps scripts and logs."""
    jobs: dict[str, str]
    """Slurm's job by stage."""

    @classmethod
    def read(cls, run_dir: Path) -> "Submission | None":
        """The record of a run directory; None where nothing was submitted."""
        found = files.read_json(run_dir / _RECORD)
        return None if found is None else cls(**found)


def submit(recipe_path: Path, cluster_path: Path, overrides: Sequence[str], run_dir: Path | None, dry_run: bool) -> list[str]:
    """Submit the unfinished stages of a recipe; returns lines to print.

    With `dry_run` nothing is submitted: the scripts are written to `scripts/` of the run directory, and the inputs need not be here.

    Raises:
        UserError: anything that is known now to be wrong; nothing is queued then.
    """
    recipe, cluster = load_recipe(recipe_path, overrides, inputs=not dry_run), load_cluster(cluster_path)
    folder = recipe_path.parent.absolute()
    path = (run_dir or Path("runs") / recipe.name).absolute()
    check_belongs(path, recipe, fresh=False)
    check_references(recipe, folder, inputs=not dry_run)
    finished = RunDirectory(path, recipe).finished()
    found = tasks(recipe, cluster, path, skip=finished)
    if isinstance(cluster.executor, Slurm) and not dry_run:
        if cluster.executor.container is not None:
            check_container(cluster.executor.container, {"the run directory": path, "the recipe's folder": folder})
        _check_not_queued(path)
        if found:
            nemo.check(recipe.name, found, cluster, [folder])
    # Held only while it is prepared: the first job may start before the last is queued.
    with claimed(path, recipe, fresh=False) as (directory, _):
        directory.check_finished()
    if not found:
        return [f"all stages are finished: {path}"]
    if dry_run:
        return _write_scripts(path, nemo.scripts(recipe.name, found, cluster, [folder]), found)
    made = nemo.submit(recipe.name, found, cluster, [folder])
    files.write_json(path / _RECORD, asdict(Submission(cluster.name, cluster.executor.kind, made.experiment, str(made.folder), made.jobs)))
    return _told(directory, recipe, cluster, found, made)


def _check_not_queued(path: Path) -> None:
    before = Submission.read(path)
    queued = states(list(before.jobs.values())) if before else {}
    waiting = [job for job, state in queued.items() if state not in ENDED]
    if waiting:
        raise UserError(f"{path} is submitted already, as job {', '.join(waiting)}; wait for it (r1mega status), or scancel it first")


ENDED = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"})
"""Slurm's states in which a job does nothing more by itself."""


def states(jobs: Sequence[str]) -> dict[str, str]:
    """What Slurm says of its jobs, as far as it still knows them and is there to be asked."""
    if not jobs or shutil.which("squeue") is None:
        return {}
    asked = ["squeue", "--noheader", "--states=all", "--jobs", ",".join(jobs), "--format=%i %T"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=_ANSWER_S).stdout
    except subprocess.TimeoutExpired:
        return {}
    lines = [line.split() for line in answer.splitlines()]
    return {line[0]: line[1] for line in lines if len(line) == 2}


def _write_scripts(path: Path, scripts: dict[str, str], found: Sequence[StageTask]) -> list[str]:
    folder = path / "scripts"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, text in scripts.items():
        (folder / f"{name}.sh").write_text(text, encoding="utf-8")
    return [*map(_line, found), f"nothing is submitted; the scripts are in {folder}"]


def _line(task: StageTask) -> str:
    after = f", after {', '.join(task.after)}" if task.after else ""
    plural = "" if task.nodes == 1 else "s"
    servers = f", {task.engine_nodes} more for servers" if task.engine_nodes else ""
    return f"{task.stage}: {task.nodes} node{plural} x {task.ranks_per_node} ranks{servers}, {task.time}{after}"


def _told(directory: RunDirectory, recipe: Recipe, cluster: Cluster, found: Sequence[StageTask], made: nemo.Submitted) -> list[str]:
    if made.jobs:
        lines = [f"{_line(task)}: job {made.jobs[task.stage]}" for task in found]
        return [*lines, f"r1mega status {directory.path}    r1mega logs {directory.path}"]
    unfinished = [name for name in recipe.stages if name not in directory.finished()]
    if unfinished and cluster.executor.kind == "local":
        raise UserError(f"not finished: {', '.join(unfinished)}; see r1mega logs {directory.path}")
    return [f"{cluster.name}: NeMo-Run's experiment {made.experiment}: {directory.path}"]
