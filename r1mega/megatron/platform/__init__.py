"""The two platforms: a CPU with gloo and a CUDA machine with NCCL. Chosen once, by `start`; nothing else asks which it is.

A third, `meta`, has shapes only: `imagined` builds any rank of any world on it. A fourth, `cuda_local`, is for comparing layers on a GPU.

A platform answers: where tensors live, which collectives carry them, which kernels a layer is made of, how FP8 is configured.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import ModuleType
from typing import Any, Literal

from r1mega import env

Spelling = Literal["local", "te"]

_active: ModuleType | None = None
_patience = timedelta(minutes=30)


def start(name: str, threads: int, patience_s: float = 1800.0) -> None:
    """Choose the platform and join the process group that torchrun describes.

    Args:
        name: "cpu", "cuda" or "cuda_local".
        threads: BLAS threads of this process; used on the CPU.
        patience_s: seconds after which a collective gives up. It can only say that it did; who made it wait is found out before that
            (`pipeline/hangs`).

    Raises:
        UserError: the platform cannot run here; names what is missing.
    """
    global _active, _patience
    import torch.distributed as dist

    _patience = timedelta(seconds=patience_s)
    if name == "cpu":
        from r1mega.megatron.platform import cpu as chosen
    elif name == "cuda":
        from r1mega.megatron.platform import cuda as chosen  # type: ignore[no-redef]
    else:
        from r1mega.megatron.platform import cuda_local as chosen  # type: ignore[no-redef]
    chosen.prepare(threads)
    _active = chosen
    if not dist.is_initialized():
        ranks = env.ranks()
        if ranks.world_size == 1:
            # One process needs no launcher: a store of its own makes `python -c` and notebooks work.
            dist.init_process_group(chosen.BACKEND, store=dist.HashStore(), rank=0, world_size=1)
        else:
            dist.init_process_group(chosen.BACKEND, timeout=_patience)


def stop() -> None:
    """Leave the process group and forget the platform."""
    global _active
    import torch.distributed as dist

    if dist.is_initialized():
        # Megatron-Core keeps its groups in module globals, where they would outlive the backend.
        from r1mega.megatron import topology

        topology.disconnect()
        dist.destroy_process_group()
    _active = None


@contextmanager
def imagined(rank: int, world_size: int) -> Iterator[None]:
    """Be one rank of a world that is not there: groups have no peers and tensors no values.

    For building models of any size and counting them. The process must be in no process group; it is in none afterwards.
    """
    global _active
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from r1mega.megatron.platform import meta

    meta.prepare(1)
    dist.init_process_group(meta.BACKEND, store=FakeStore(), rank=rank, world_size=world_size)
    _active = meta
    try:
        yield
    finally:
        stop()


def patience() -> timedelta:
    """How long a collective waits for its peers. Groups beside the world's must be told: torch gives them a default of its own."""
    return _patience


def active() -> Any:
    """The started platform: module `cpu` or `cuda`, which offer the same names."""
    if _active is None:
        raise RuntimeError("no platform: call r1mega.megatron.platform.start first")
    return _active
