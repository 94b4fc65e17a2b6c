"""The one place that reads the process environment."""

import os
from dataclasses import dataclass

from r1mega.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among those that torchrun started."""

    rank: int
    world_size: int
    local_rank: int


def ranks() -> Ranks:
    """Rank, world size and local rank; a process started by hand is rank 0 of 1."""
    return Ranks(
        rank=int(os.environ.get("RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
    )


def secret(variable: str) -> str:
    """The value of an environment variable that is never to be written anywhere. UserError where it is not set."""
    value = os.environ.get(variable, "").strip()
    if not value:
        raise UserError(f"the environment variable {variable}, which the recipe names for an API key, is not set; export it")
    return value


def for_ranks(threads_per_rank: int, platform: str) -> dict[str, str]:
    """The environment a launcher gives its ranks, on top of its own.

    One BLAS thread too many per rank makes tiny steps tens of times slower, so the count is always explicit.
    On a CPU, dynamo would spend 25 s compiling the small fusions that Megatron-Core decorates.
    """
    env = dict(os.environ)
    env["OMP_NUM_THREADS"] = str(threads_per_rank)
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    env.setdefault("HF_HUB_OFFLINE", "1")
    if platform == "cpu":
        env["TORCHDYNAMO_DISABLE"] = "1"
        env["CUDA_VISIBLE_DEVICES"] = ""
    else:
        # Megatron-Core's overlap of tensor-parallel communication needs one hardware queue on Hopper.
        env.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    return env
