"""What the stages that train by gradient steps share: going on after a checkpoint, rows of metrics, and the model they leave."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from r1mega import heartbeat
from r1mega.errors import UserError
from r1mega.megatron.checkpoint import Checkpoints
from r1mega.megatron.policy import NotFinite, Policy
from r1mega.pipeline.context import StageContext, Stopped
from r1mega.pipeline.model_folder import ModelFolder


def run_updates(
    ctx: StageContext, policy: Policy, updates: int, save_every: int, step: Callable[[int], dict[str, float]]
) -> dict[str, float]:
    """Call `step` for every update (counted from 0) that is still to do; returns the last metrics row.

    `step` must depend on the update alone, so that a stage that was interrupted goes on to the same bits.
    """
    checkpoints = Checkpoints(policy, ctx.dir / "checkpoints")
    done = restore(ctx, checkpoints)
    row: dict[str, float] = {}
    for update in range(done, updates):
        begin = time.perf_counter()
        try:
            row = step(update)
        except NotFinite as error:
            raise UserError(f"stage {ctx.name}, update {update + 1}: {error}; the step was not applied; lower optimizer.lr") from None
        ctx.metrics.write({"update": update + 1} | row | {"seconds/train": time.perf_counter() - begin})
        ctx.progress.update(update + 1, updates, {"loss": row["loss"]})
        if save_every and (update + 1) % save_every == 0 and update + 1 < updates:
            checkpoints.save(f"update-{update + 1:06d}", {"update": update + 1}, None)
        checkpoints.poll()
        if update + 1 < updates and ctx.stop_asked():
            if not save_every or (update + 1) % save_every:
                checkpoints.save(f"update-{update + 1:06d}", {"update": update + 1}, None)
            checkpoints.wait()
            raise Stopped
    checkpoints.wait()
    return row


def restore(ctx: StageContext, checkpoints: Checkpoints, reference: Any = None) -> int:
    """Load the newest checkpoint if there is one; returns how many updates are done."""
    state = checkpoints.restore(reference)
    if state is None:
        return 0
    done = int(state["update"])
    ctx.metrics.resume(done)
    ctx.progress.note(f"{ctx.name}: goes on after update {done}, the last checkpoint")
    return done


def export(ctx: StageContext, model: ModelFolder, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Leave weights as the stage's artifact, a folder like the model's. Every rank calls it."""
    with heartbeat.phase("save"), ctx.artifact() as folder:
        if ctx.rank == 0:
            model.write(folder, weights, dtype)
