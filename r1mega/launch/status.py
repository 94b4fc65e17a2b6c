"""`r1mega status` and `r1mega logs`: every stage and every attempt at it, from the run directory and, where it can be asked, Slurm.

A requeued job keeps its number; each of its attempts has a folder `logs/<stage>/<job>-<restart>` of its own. `r1mega run` without a stage
has no attempts, and keeps its last start's logs in `logs`.
"""

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from r1mega.config.schema import Recipe
from r1mega.config.tree import nearest_of
from r1mega.errors import UserError
from r1mega.launch.submit import ENDED, Submission, states
from r1mega.pipeline.metrics import read_metrics
from r1mega.pipeline.nodes import Attempt, attempts
from r1mega.pipeline.rundir import RunDirectory, held

_TAIL = 40


def status(path: Path) -> list[str]:
    """A line for every stage, and one for each of its attempts."""
    run = RunDirectory.open(path)
    submission, finished = Submission.read(path), run.finished()
    jobs = submission.jobs if submission else {}
    asked = states([job for name, job in jobs.items() if name not in finished])
    lines = [f"{run.recipe.name}: {path}" + (f", submitted to {submission.cluster} as {submission.experiment}" if submission else "")]
    width = max(map(len, run.recipe.stages))
    for name, folder in run.stage_dirs.items():
        made = attempts(run.logs, name)
        job = jobs.get(name)
        if name in finished:
            state = "finished"
        elif made or job or not folder.exists():
            state = _state(made[-1][1] if made else None, folder, asked.get(job or ""))
        else:
            state = run.status()
        told = f"job {job}" + (f" {asked[job]}" if job in asked else "") if job else ""
        lines.append("  ".join(part for part in (name.ljust(width), state, _progress(run.recipe, name, folder), told) if part).rstrip())
        lines += [
            f"    {_line(where.name, attempt, last=index == len(made) - 1, running=state == 'running')}"
            for index, (where, attempt) in enumerate(made)
        ]
    return lines


def _state(last: Attempt | None, folder: Path, slurm: str | None) -> str:
    """A stage that is not finished, in a word or two."""
    if slurm is not None and slurm not in ENDED:
        if slurm in ("PENDING", "REQUEUED"):
            return "waits" if last is None else "waits again"
        return "running" if last is not None and last.outcome is None else "starting"
    if last is None:
        return "not begun" if slurm is None else slurm.lower().replace("_", " ")
    if last.outcome is None:
        return "running" if held(folder) else "lost"
    return last.outcome


def _progress(recipe: Recipe, name: str, folder: Path) -> str:
    rows = read_metrics(folder / "metrics.jsonl")
    if not rows:
        return ""
    total = getattr(recipe.stages[name], "updates", None)
    return f"update {rows[-1]['update']}" + (f" of {total}" if total else "")


def _line(attempt_name: str, attempt: Attempt, last: bool, running: bool) -> str:
    """An attempt without an outcome runs if it is the last of a running stage; otherwise it was lost with its node."""
    outcome = attempt.outcome or ("running" if last and running else "lost")
    began = datetime.fromisoformat(attempt.began)
    took = f" for {(datetime.fromisoformat(attempt.ended) - began).total_seconds():.0f} s" if attempt.ended else ""
    size = f"{attempt.nodes} node{'' if attempt.nodes == 1 else 's'}, {attempt.ranks} rank{'' if attempt.ranks == 1 else 's'}"
    reason = f": {attempt.reason}" if attempt.reason else ""
    return f"{attempt_name}  {began:%Y-%m-%d %H:%M:%S}{took}  {size}  {outcome}{reason}"


def logs(path: Path, stage: str | None, rank: int | None, every_line: bool) -> Iterator[str]:
    """What the attempts at a stage, or at all, have printed, the last lines of each; with `rank`, what that rank has.

    Raises:
        UserError: there is no such stage, or it has left no logs.
    """
    run = RunDirectory.open(path)
    if stage is not None and stage not in run.recipe.stages:
        raise UserError(f"no stage {stage!r} in {path}; the nearest is {nearest_of(stage, list(run.recipe.stages))!r}")
    shown = False
    for name in [stage] if stage else run.recipe.stages:
        for folder, attempt in attempts(run.logs, name):
            shown = True
            yield f"==> {name}, {_line(folder.name, attempt, last=True, running=held(run.stage_dirs[name]))}"
            yield from _lines(folder, "progress.log" if rank is None else f"rank{rank}.log", rank is None, every_line)
    if not shown:
        log = f"rank{rank or 0}.log"
        if not (run.logs / log).exists():
            raise UserError(
                f"{path} has no logs{'' if stage is None else f' of stage {stage!r}'}{'' if rank is None else f' of rank {rank}'}"
            )
        yield f"==> {run.logs / log}, the last start of all stages"
        yield from _lines(run.logs, log, rank is None, every_line)


def _lines(folder: Path, log: str, with_errors: bool, every_line: bool) -> Iterator[str]:
    """The end of a log, or all of it, and what ranks have left that failed."""
    for file in [folder / log, *(sorted(folder.glob("rank*.error.json")) if with_errors else ())]:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
        yield from lines if every_line else lines[-_TAIL:]
