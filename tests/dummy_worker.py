"""A worker whose stages need no model: every kind is a loop that the prompts' limit and the description steer."""

import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from r1mega import env
from r1mega.errors import UserError
from r1mega.pipeline import worker
from r1mega.pipeline.context import StageContext, Stopped
from r1mega.pipeline.files import write_atomic
from r1mega.pipeline.rundir import RunDirectory


@contextmanager
def start(run: RunDirectory) -> Iterator[Callable[[], Any]]:
    ranks, met = env.ranks(), itertools.count()
    folder = run.path / "logs" / f"barrier-{os.environ['TORCHELASTIC_RUN_ID']}-{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    folder.mkdir(exist_ok=True)

    def barrier() -> None:
        step = next(met)
        (folder / f"{step}-{ranks.rank}").touch()
        while len(list(folder.glob(f"{step}-*"))) < ranks.world_size:
            time.sleep(0.01)

    barrier()  # as the real platform, whose process group is a meeting
    yield barrier
    if run.recipe.description == f"stop at the end on rank {ranks.rank}":
        os.kill(os.getpid(), signal.SIGSTOP)


def misbehave(ctx: StageContext) -> None:
    """What the description asks for."""
    action = ctx.recipe.description
    if action == f"user error on rank {ctx.rank}":
        raise UserError("the prompts are missing; name a file")
    if action == f"crash on rank {ctx.rank}":
        raise ArithmeticError("loss is NaN")
    if action == f"die on rank {ctx.rank}":
        os.kill(os.getpid(), 9)
    if action == f"die once, {ctx.rank}" and not (ctx.run.path / "logs" / "died").exists():
        (ctx.run.path / "logs" / "died").touch()
        os.kill(os.getpid(), 9)
    if action == f"full disk on rank {ctx.rank}":
        fill_disk(ctx)
    elif action.startswith("stop once on rank "):
        stop_in_first_attempt(ctx, int(action.split()[-1]))
    elif " on rank " in action and not action.startswith("stop at the end"):
        time.sleep(60)  # as in a collective that the other rank never joins


def fill_disk(ctx: StageContext) -> None:
    """Whatever this rank writes from now on finds no room: its state, its log, and the file that would say so."""
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, 1)
    os.dup2(full, 2)
    for path in (ctx.dir / f".done-{ctx.rank}.tmp", ctx.run.logs / f".rank{ctx.rank}.error.json.tmp"):
        path.symlink_to("/dev/full")


def stop_in_first_attempt(ctx: StageContext, rank: int) -> None:
    """Stop one rank as a signal does; the others wait for it."""
    marker = ctx.run.path / f"stopped-{ctx.rank}"
    if marker.exists():
        return
    marker.touch()
    if ctx.rank == rank:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)


def stage(ctx: StageContext) -> dict[str, Any]:
    checkpoint = ctx.dir / f"done-{ctx.rank}"  # each its own: ranks do not wait for one another within a stage
    done = int(checkpoint.read_text()) if checkpoint.exists() else 0
    ctx.metrics.resume(after=done)
    for update in range(done + 1, 5):
        misbehave(ctx)
        ctx.metrics.write({"update": update, "reward/mean": update / 4, "eval/tiny/pass@1": {"value": 0.5, "ci95": [0.4, 0.6]}})
        ctx.progress.update(update, 4, {"reward": update / 4})
        write_atomic(checkpoint, str(update))
        while (ctx.run.path / f"hold-{update}").exists() and not (ctx.run.path / "deaf").exists():
            if ctx.stop_file is not None and ctx.stop_file.exists():
                raise Stopped
            time.sleep(0.05)
        while (ctx.run.path / "deaf").exists():
            time.sleep(0.05)
    print("a library prints")
    if ctx.stage.kind != "evaluate":
        with ctx.artifact() as folder:
            if ctx.rank == 0:
                (folder / "config.json").write_text("{}")
                (folder / "model.safetensors").write_bytes(b"weights")
    else:
        for reference in ctx.stage.models.values():
            ctx.model_dir(reference)
    return {"pass@1": {"value": 0.5, "ci95": [0.4, 0.6]}, "seed": ctx.seed}


if __name__ == "__main__":
    # As on a machine without the extra `report`, and four seconds less of imports.
    sys.modules["torch.utils.tensorboard"] = None  # type: ignore[assignment]
    raise SystemExit(worker.main(sys.argv[1:], find=lambda kind: stage, start=start))
