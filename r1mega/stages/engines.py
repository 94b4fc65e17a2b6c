"""Engines as stages use them."""

from contextlib import ExitStack
from pathlib import Path

from r1mega.pipeline.context import StageContext
from r1mega.rollout.engine import Engine
from r1mega.rollout.open import Surroundings, open_engine


def opened(ctx: StageContext, model_dir: Path, stack: ExitStack) -> Engine:
    """The recipe's engine for the model that a folder describes, closed with the stack. Every rank calls it."""
    run = ctx.recipe.run
    engine = open_engine(ctx.recipe.rollout, model_dir, Surroundings(run.platform, ctx.dir / "engine", run.threads_per_rank))
    stack.callback(engine.close)
    return engine
