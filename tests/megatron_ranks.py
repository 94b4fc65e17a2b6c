"""What the spawned ranks of test_megatron_layouts do: go through all cases of one world size in one process each."""

import json
import math
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import megatron_support as support
import torch
import torch.distributed as dist
from megatron_support import Case
from safetensors.torch import load_file
from torch import Tensor

from r1mega.config.layout import Layout
from r1mega.config.training import Optimizer, Train
from r1mega.megatron.policy import LocalBatch, NotFinite, Policy, TokenLoss
from r1mega.weights.architecture import Architecture
from r1mega.weights.moving import reader_of


def work(rank: int, world: int, port: int, folder: Path, cases: Sequence[Case]) -> None:
    """Write `folder/rank-<r>.json`: for each case its scalars, digests and differences from the reference, or the error."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=120))
    report: dict[str, Any] = {}
    with support.cpu_platform():
        with torch.device("meta"):
            # Only a process that never used such a block before can tell whether the stand-ins broke them.
            report["devices in a meta block"] = [torch.arange(3).device.type, torch.zeros(3).device.type]
        for case in cases:
            report[case.name] = _compared(case, folder)
        report["one rank is not finite"] = _one_rank_is_not_finite()
    (folder / f"rank-{rank}.json").write_text(json.dumps(report))


def _compared(case: Case, folder: Path) -> dict[str, Any]:
    try:
        outcome = support.run(case)
    except Exception:
        return {"error": traceback.format_exc()}
    reference = load_file(folder / f"{case.reference.name}.safetensors")
    return {"scalars": outcome.scalars, "digests": outcome.digests, "differences": support.differences(outcome, reference)}


def _one_rank_is_not_finite() -> list[str]:
    """One rank's loss is NaN: every rank raises, and keeps its weights."""
    arch = Architecture.from_hf(support.V3)
    train = Train(chunk_tokens=256, router_bias_rate=1e-3)
    policy = Policy(arch, Layout(ep=2), train, Optimizer(lr=1e-3))
    policy.exchange.load(reader_of(support.random_weights(arch)))
    batches = policy.microbatches(support.sequences())
    before = policy.host_copy()

    def poisoned(logprobs: Tensor, entropies: Tensor, batch: LocalBatch) -> TokenLoss:
        return TokenLoss(logprobs * (math.nan if dist.get_rank() == 1 else 1.0))

    try:
        policy.step(batches, poisoned, 1e-3)
        return ["no error"]
    except NotFinite:
        pairs = zip(policy.weights, before, policy.weights.values(), strict=True)
        return [name for (_, name), old, new in pairs if not torch.equal(old, new)]
