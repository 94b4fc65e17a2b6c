"""Saving under one layout and going on under another: what the ranks of test_megatron_checkpoint do."""

import functools
import json
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import megatron_support as support
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies import filesystem_async
from safetensors.torch import save_file
from torch import Tensor

from r1mega.config.layout import Layout
from r1mega.config.training import Optimizer, Train
from r1mega.megatron.checkpoint import Checkpoints
from r1mega.megatron.exchange import Exchange
from r1mega.megatron.policy import Policy
from r1mega.weights.architecture import Architecture
from r1mega.weights.moving import reader_of

BEFORE, AFTER = 2, 2
"""Steps before the checkpoint and after it."""


@dataclass(frozen=True)
class Job:
    """A run of BEFORE + AFTER steps that saves in between, and the layouts that go on from what it saved."""

    model: str
    saved: dict[str, int]
    resumed: tuple[dict[str, int], ...] = ()
    train: dict[str, Any] = field(default_factory=dict)
    distributed: bool = False
    reference: bool = False
    """Keep reference weights, as GRPO does."""

    @property
    def name(self) -> str:
        parts = [self.model, _text(self.saved), *(f"{key}={value}" for key, value in self.train.items())]
        return " ".join(parts + ["distributed"] * self.distributed + ["reference"] * self.reference)

    def resumed_name(self, layout: dict[str, int]) -> str:
        return f"{self.name} to {_text(layout)}"


def _text(layout: dict[str, int]) -> str:
    return "".join(f"{key}{value}" for key, value in layout.items()) or "one"


def policy_of(job: Job, layout: dict[str, int]) -> tuple[Policy, list[Tensor] | None]:
    """A policy with the job's first weights, and its reference weights."""
    arch = Architecture.from_hf(support.CONFIGS[job.model])
    train = Train(**{"chunk_tokens": 128, "logprob_chunk": 17, **job.train})
    policy = Policy(arch, Layout(**layout), train, Optimizer(lr=1e-3, clip_grad=0.5, weight_decay=0.1, distributed=job.distributed))
    policy.exchange.load(reader_of(support.random_weights(arch)))
    return policy, policy.host_copy() if job.reference else None


def steps(policy: Policy, first: int, count: int) -> list[float]:
    """Losses of steps on batches that only their number decides."""
    batches = (policy.microbatches(support.sequences(count=8, seed=10 + step)) for step in range(first, first + count))
    return [policy.step(batch, support.objective, 1e-3).loss for batch in batches]


def run_and_save(job: Job, folder: Path) -> None:
    """Leave the checkpoint, the weights at that time, and those at the end."""
    policy, reference = policy_of(job, job.saved)
    steps(policy, 0, BEFORE)
    checkpoints = Checkpoints(policy, folder / job.name)
    if reference is not None:
        reference = policy.host_copy()
        steps(policy, BEFORE, 1)  # the reference now differs from the policy
    checkpoints.save("only", {"update": policy.steps}, reference)
    leave(policy, folder / f"{job.name}.saved.safetensors")
    losses = steps(policy, policy.steps, AFTER)
    checkpoints.wait()
    leave(policy, folder / f"{job.name}.safetensors", losses)
    if reference is not None:
        leave_reference(policy, reference, folder / f"{job.name}.reference.safetensors")


def resume(job: Job, layout: dict[str, int], folder: Path) -> None:
    """Go on from the job's checkpoint under another layout."""
    policy, reference = policy_of(job, layout)
    state = Checkpoints(policy, folder / job.name).restore(reference)
    assert state is not None and state["update"] == policy.steps == BEFORE + job.reference
    name = job.resumed_name(layout)
    leave(policy, folder / f"{name}.saved.safetensors")
    if reference is not None:
        leave_reference(policy, reference, folder / f"{name}.reference.safetensors")
    leave(policy, folder / f"{name}.safetensors", steps(policy, policy.steps, AFTER))


def leave(policy: Policy, path: Path, losses: Sequence[float] = ()) -> None:
    """Write the weights by canonical name; padding must be zero."""
    weights = policy.exchange.gather(torch.float32)
    for placed in policy.exchange.placed:
        covered = torch.zeros(placed.shape, dtype=torch.bool)
        for piece in placed.pieces:
            covered[piece.box.slices] = True
        assert not policy.weights[placed.chunk, placed.name][~covered].any(), f"{placed.name}: padding is not 0"
    _write(weights, path, losses)


def leave_reference(policy: Policy, reference: list[Tensor], path: Path) -> None:
    exchange = Exchange(policy.arch, policy.layout, dict(zip(policy.weights, reference, strict=True)))
    _write(exchange.gather(torch.float32), path)


def _write(weights: dict[str, Tensor], path: Path, losses: Sequence[float] = ()) -> None:
    if dist.get_rank() == 0:
        values = {name: value.clone() for name, value in weights.items()} | {"losses": torch.tensor(losses, dtype=torch.float64)}
        save_file(values, path)


def work(rank: int, world: int, port: int, folder: Path, saves: Sequence[Job], resumes: Sequence[tuple[Job, dict[str, int]]]) -> None:
    """One rank of all jobs; writes `folder/rank-<r>.json` with the error of each that failed."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    errors = {}
    with support.cpu_platform():
        for job in saves:
            errors[job.name] = _error(run_and_save, job, folder)
        for job, layout in resumes:
            errors[job.resumed_name(layout)] = _error(resume, job, layout, folder)
    (folder / f"rank-{rank}.json").write_text(json.dumps({name: error for name, error in errors.items() if error}))


def be_killed(folder: Path) -> None:
    """Write one checkpoint, then be in the middle of writing another for longer than anyone waits."""
    with support.cpu_platform():
        policy, _ = policy_of(KILLED, {})
        steps(policy, 0, 1)
        checkpoints = Checkpoints(policy, folder)
        checkpoints.save("first", {"update": 1}, None)
        checkpoints.wait()
        leave(policy, folder.with_name("first.safetensors"))
        steps(policy, 1, 1)
        write = filesystem_async._write_item

        @functools.wraps(write)
        def slowly(*arguments: Any, **keywords: Any) -> Any:
            time.sleep(2)
            return write(*arguments, **keywords)

        filesystem_async._write_item = slowly
        checkpoints.save("second", {"update": 2}, None)
        print("writing", flush=True)
        time.sleep(600)


KILLED = Job("qwen", {})


def _error(function: Any, *arguments: Any) -> str | None:
    try:
        function(*arguments)
        return None
    except Exception:
        return traceback.format_exc()
