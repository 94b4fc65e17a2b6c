"""Which engine a recipe asks for."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from r1mega.config.chats import Endpoint
from r1mega.config.rollout import Rollout, Sampling
from r1mega.rollout.engine import Engine
from r1mega.rollout.sglang_places import ALONE, Allocation
from r1mega.rollout.teacher import Teacher

if TYPE_CHECKING:
    from r1mega.rollout.sglang_servers import Found


GLANCE_S = 3.0
"""For a server that is well; one that takes longer is waited for, which people are told."""


@dataclass(frozen=True)
class Surroundings:
    """Where an engine runs."""

    platform: Literal["cpu", "cuda"]
    folder: Path
    """For logs, and for weights that travel by files."""
    threads: int = 1
    """BLAS threads of a server's process on a CPU."""
    trainer_gpus: int = 0
    """GPUs of a machine that the trainer's ranks have, the first ones."""
    allocation: Allocation = ALONE
    """The nodes of the job."""
    note: Callable[[str], None] = lambda line: None
    """Shows people a line."""


def require(settings: Rollout) -> None:
    """UserError for an engine that cannot be opened, such as a server that is there and refuses the key."""
    if settings.engine == "sglang":
        from r1mega.rollout.sglang_servers import check_interpreter

        if not settings.sglang.addresses:
            check_interpreter(settings.sglang)
        for server in found(settings):
            server.ready(GLANCE_S)


def found(settings: Rollout) -> "list[Found]":
    """The servers at given addresses, where the engine is such servers."""
    from r1mega.rollout.sglang_servers import Found

    addresses = settings.sglang.addresses if settings.engine == "sglang" else []
    return [Found(address, settings.sglang) for address in addresses]


def open_endpoint(endpoint: Endpoint, sampling: Sampling) -> Teacher:
    """A server that answers questions."""
    from r1mega.rollout.openai import EndpointTeacher

    return EndpointTeacher(endpoint, sampling)


def open_engine(settings: Rollout, model_dir: Path, where: Surroundings | None = None) -> Engine:
    """An engine for the model that `model_dir` describes, without weights yet. Every rank calls it.

    `where` is what servers need to know; the embedded engine does without.
    """
    if settings.engine == "sglang":
        from r1mega.rollout.sglang import SglangEngine

        assert where is not None, "servers write logs somewhere"
        return SglangEngine(settings, model_dir, where)
    import torch

    from r1mega.rollout.local import LocalEngine

    return LocalEngine(model_dir, dtype=getattr(torch, settings.dtype), max_batch=settings.batch)
