"""One rank of a run: `r1mega.pipeline.worker RUN_DIR [STAGE LOGS NODE TRAINERS ENGINES GPUS]`, which torchrun starts through `rank`.

Runs all stages in turn, or the one that is named, with its logs in a folder of their own and nodes as `Allocation` says.
"""

import errno
import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from rich.console import Console

from r1mega import env, heartbeat
from r1mega.errors import UserError
from r1mega.pipeline import artifacts, files
from r1mega.pipeline.context import StageContext, StageFunction, Stopped
from r1mega.pipeline.metrics import MetricsWriter, scalars
from r1mega.pipeline.rundir import RunDirectory
from r1mega.report.progress import Progress
from r1mega.rollout.pool import Engines
from r1mega.rollout.sglang_keeper import ENGINE, forget
from r1mega.rollout.sglang_places import ALONE, Allocation

if TYPE_CHECKING:
    from r1mega.rollout.engine import Engine


_NO_ROOM = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)]
"""What libraries that write files say of a full disk, whatever their own exceptions are."""
_LATER_S = 600.0
"""By so much a collective's patience is longer than any phase's deadline: it would say that it waits, but not for whom."""


def stage_function(kind: str) -> StageFunction:
    """The driver of a kind of stage. Imported when its turn comes: a run pays for the stages it has."""
    function: StageFunction = importlib.import_module(f"r1mega.stages.{kind}").run
    return function


@contextmanager
def started(run: RunDirectory) -> Iterator[Callable[[], Any]]:
    """The platform of a run, from start to stop; yields the barrier at which all ranks meet."""
    import torch.distributed as dist

    from r1mega.megatron import platform

    settings = run.recipe.run
    platform.start(settings.platform, settings.threads_per_rank, settings.deadlines.longest + _LATER_S)
    yield dist.barrier
    # Not after an error: leaving the process group in order would wait for ranks that wait for this one.
    platform.stop()


def main(
    arguments: Sequence[str],
    find: Callable[[str], StageFunction] = stage_function,
    start: Callable[[RunDirectory], AbstractContextManager[Callable[[], Any]]] = started,
) -> int:
    """Run every unfinished stage of a run directory on this rank, or the named one; returns the exit code.

    An error is left in `rank<k>.error.json` of the logs for the launcher, which shows the one that came first.
    """
    path, ranks = Path(arguments[0]), env.ranks()
    only, logs = (arguments[1], Path(arguments[2])) if arguments[1:] else (None, path / "logs")
    allocation = Allocation(*map(int, arguments[3:]))
    logs.mkdir(parents=True, exist_ok=True)
    heartbeat.start(logs / "beats" / (arguments[3] if arguments[3:] else "0") / str(ranks.rank), logs / f"rank{ranks.rank}.stacks")
    terminal = _redirect(logs / f"rank{ranks.rank}.log")
    try:
        run = RunDirectory.open(path)
        # The finished stages are read before ranks can meet, hence before any rank can finish one: all skip the same.
        finished = run.finished()
        if ranks.rank == 0:
            forget(logs / ENGINE)
        with _progress(run, ranks, terminal, only, logs) as progress, start(run) as barrier:
            run_stages(run, finished, ranks, progress, find, barrier, logs / "stop", only, allocation)
    except Exception as error:
        _say_why(error, path, logs, ranks.rank)
        # No orderly exit: threads and process groups would wait for ranks that wait for this one.
        os._exit(1)
    heartbeat.end()
    return 0


def _say_why(error: Exception, run: Path, logs: Path, rank: int) -> None:
    """Leave an error in the rank's log and in a file; on a full disk, in the place that its heartbeat has there."""
    told = traceback.format_exc()
    message = " ".join(str(error).split())
    is_full = any(text in told for text in _NO_ROOM)
    if is_full:
        message = f"rank {rank}: {message}: a disk or a quota is full; make room for {run}, and the same command goes on"
    found = {"time": time.time(), "rank": rank, "user": is_full or isinstance(error, UserError), "message": message, "traceback": told}
    with suppress(OSError):
        sys.stderr.write(told)
        sys.stdout.flush()
        sys.stderr.flush()
    try:
        files.write_json(logs / f"rank{rank}.error.json", found)
    except OSError as gone:
        heartbeat.end(failed=message if is_full else f"rank {rank}: {message}; {logs}: {gone.strerror}")


def run_stages(
    run: RunDirectory,
    finished: Collection[str],
    ranks: env.Ranks,
    progress: Progress,
    find: Callable[[str], StageFunction],
    barrier: Callable[[], Any],
    stop_file: Path | None = None,
    only: str | None = None,
    allocation: Allocation = ALONE,
) -> None:
    """Run the stages that are not finished, in order, or the one named; `finished` is the same on every rank.

    `stop_file` lies in the folder of the logs, and asks them to stop; left out: `stop` in the run's.
    """
    stop_file = stop_file or run.logs / "stop"
    with Engines(partial(opened, run, progress, stop_file.parent / ENGINE, ranks.local_world_size, allocation)) as engines:
        for name, stage in run.recipe.stages.items():
            if only not in (None, name):
                continue
            if name in finished:
                progress.skip(name)
                continue
            try:
                _run_stage(run, name, ranks, progress, engines, find(stage.kind), stop_file)
            except Stopped:
                progress.note(f"{name}: stopped, and saved")
                return
            # The next stage reads what rank 0 has just written.
            barrier()


def opened(run: RunDirectory, progress: Progress, logs: Path, local_ranks: int, allocation: Allocation, model_dir: Path) -> "Engine":
    """The recipe's engine for the model that a folder describes, beside so many ranks on each machine."""
    from r1mega.rollout.open import Surroundings, open_engine

    settings, rollout = run.recipe.run, run.recipe.rollout
    if rollout.engine == "sglang":
        servers = rollout.sglang
        wanted = ", ".join(servers.addresses) or f"{servers.layout.servers} of tp {servers.layout.tp}, which log to {logs}"
        progress.note(f"waiting for SGLang servers, at most {servers.start_timeout_s:g} s: {wanted}")
    where = Surroundings(settings.platform, logs, settings.threads_per_rank, local_ranks, allocation, progress.note)
    return open_engine(rollout, model_dir, where)


def _run_stage(
    run: RunDirectory,
    name: str,
    ranks: env.Ranks,
    progress: Progress,
    engines: Engines,
    function: StageFunction,
    stop_file: Path,
) -> None:
    folder = run.stage_dirs[name]
    folder.mkdir(parents=True, exist_ok=True)
    metrics = MetricsWriter(folder, enabled=ranks.rank == 0)
    context = StageContext(run, name, ranks.rank, ranks.world_size, metrics, progress, engines, stop_file)
    begin = time.monotonic()
    progress.begin(name, context.stage.kind)
    inputs = artifacts.input_digests(context.stage, run.stage_dirs) if ranks.rank == 0 else {}
    try:
        summary = function(context)
    finally:
        metrics.close()
    if ranks.rank == 0:
        wall_s = time.monotonic() - begin
        made = folder / "artifact"
        artifacts.record(
            recipe=run.recipe.name,
            name=name,
            stage=context.stage,
            seed=context.seed,
            ranks=ranks.world_size,
            platform_name=run.recipe.run.platform,
            wall_s=wall_s,
            inputs=inputs,
            artifact=made if made.is_dir() else None,
            metrics=summary,
        ).write(folder)
        run.write_summary("running")
        progress.end(name, wall_s, _headline(summary))


def _headline(summary: Mapping[str, Any]) -> dict[str, float]:
    """The measured values of a summary, those with an interval; of a stage that measured none, its first numbers."""
    measured = {name: value for name, value in summary.items() if isinstance(value, Mapping) and "ci95" in value}
    return dict(islice(scalars(measured or summary), 6))


def _progress(run: RunDirectory, ranks: env.Ranks, terminal: int, only: str | None, logs: Path) -> Progress:
    if ranks.rank:
        return Progress.silent()
    shown: TextIO = os.fdopen(terminal, "w", buffering=1, encoding="utf-8")
    if only is None:
        return Progress(list(run.recipe.stages), Console(file=shown))
    # Slurm keeps what is shown in a file of its own choice; `r1mega logs` reads this one.
    both = _Both([shown, (logs / "progress.log").open("a", buffering=1, encoding="utf-8")])
    return Progress([only], Console(file=cast(TextIO, both), width=200))


class _Both:
    """A stream that writes to several. It is no terminal: progress comes in lines."""

    def __init__(self, streams: Sequence[TextIO]) -> None:
        self._streams = streams

    def write(self, text: str) -> int:
        return max(stream.write(text) for stream in self._streams)

    def flush(self) -> None:
        for stream in self._streams:
            stream.flush()


def _redirect(log: Path) -> int:
    """Send stdout and stderr to the rank's log, so that no library's print tears the display; returns the old stdout."""
    terminal = os.dup(1)
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
    return terminal


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
