"""Which engine a recipe asks for."""

from pathlib import Path

from r1mega.config.chats import Endpoint
from r1mega.config.rollout import Rollout, Sampling
from r1mega.errors import UserError
from r1mega.rollout.engine import Engine
from r1mega.rollout.teacher import Teacher


def require(settings: Rollout) -> None:
    """UserError for an engine that cannot be opened."""
    if settings.engine == "sglang":
        raise UserError("rollout.engine=sglang is not available yet; use rollout.engine=local")


def open_endpoint(endpoint: Endpoint, sampling: Sampling) -> Teacher:
    """A server that answers questions."""
    from r1mega.rollout.openai import EndpointTeacher

    return EndpointTeacher(endpoint, sampling)


def open_engine(settings: Rollout, model_dir: Path) -> Engine:
    """An engine for the model that `model_dir` describes, without weights yet."""
    require(settings)
    import torch

    from r1mega.rollout.local import LocalEngine

    return LocalEngine(model_dir, dtype=getattr(torch, settings.dtype), max_batch=settings.batch)
