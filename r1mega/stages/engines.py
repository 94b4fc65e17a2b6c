"""Engines as stages use them."""

from contextlib import ExitStack
from pathlib import Path

from r1mega.pipeline.context import StageContext
from r1mega.rollout.engine import Engine


def opened(ctx: StageContext, model_dir: Path, stack: ExitStack) -> Engine:
    """The recipe's engine for the model that a folder describes, given back with the stack. Every rank calls it."""
    return stack.enter_context(ctx.engines.lent(model_dir))
