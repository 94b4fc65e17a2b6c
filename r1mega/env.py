"""The one place that reads the process environment. (`rollout/in_sglang` has its own, where this package is not installed.)"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from r1mega.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among those that torchrun started."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int = 1
    """Processes on this machine."""


def ranks() -> Ranks:
    """What torchrun says; a process started by hand is rank 0 of 1."""
    return Ranks(
        rank=int(os.environ.get("RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    )


@dataclass(frozen=True)
class Task:
    """Where this process stands among those that Slurm started for one step, one a node."""

    node: int
    nodes: int
    job: str
    restart: int
    """How often Slurm has put the job back into its queue."""

    @property
    def attempt(self) -> str:
        """Names this start of the job, the same on every node."""
        return f"{self.job}-{self.restart}"


def slurm_task() -> Task | None:
    """The task of a Slurm step that this process is; None outside of one."""
    if "SLURM_STEP_NUM_NODES" not in os.environ:
        return None
    return Task(
        node=int(os.environ["SLURM_NODEID"]),
        nodes=int(os.environ["SLURM_STEP_NUM_NODES"]),
        job=os.environ["SLURM_JOB_ID"],
        restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
    )


def python_path(folders: Sequence[Path]) -> str:
    """This process's PYTHONPATH with folders after it: they never shadow a library."""
    known = os.environ.get("PYTHONPATH")
    return os.pathsep.join([*([known] if known else []), *map(str, folders)])


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


_OF_RANKS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ROLE_", "GROUP_", "LOCAL_", "TORCHELASTIC_", "PYTHON", "VIRTUAL_ENV")
"""How variables begin that tell torch of this run's ranks, and Python of the trainer's modules."""


def for_servers(threads: int, bound: int, platform: str, more: Mapping[str, str]) -> dict[str, str]:
    """The environment of an engine's server, which has its own interpreter and its own ranks.

    Args:
        threads: BLAS threads of a server's process on a CPU.
        bound: on a CPU, ranks that are each given a core of this machine; 0: they may have all.
        more: further variables.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith(_OF_RANKS)}
    env |= {"PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": env.get("HF_HUB_OFFLINE", "1"), "TOKENIZERS_PARALLELISM": "false"}
    if platform == "cpu":
        env |= {"CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": str(threads)}
        if bound:
            # SGLang refuses more ranks than NUMA nodes unless each is given its cores.
            cores = sorted(os.sched_getaffinity(0))
            env["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(str(cores[rank % len(cores)]) for rank in range(bound))
    return env | dict(more)
