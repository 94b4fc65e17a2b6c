"""Training checkpoints in Megatron-Core's distributed format: weights, optimizer and reference, sharded over all ranks."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch import Tensor

from r1mega.megatron.policy import Policy

_STATE = "state.json"


def save(policy: Policy, folder: Path, state: Mapping[str, Any], reference: list[Tensor] | None) -> None:
    """Write a checkpoint that appears at `folder` whole or not at all, and remove its older siblings.

    Args:
        state: plain JSON values, such as the number of updates done.
        reference: weights as `Policy.host_copy` gives them, saved beside the policy's own.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(_sharded(policy, reference, is_loading=False), str(partial))
    dist.barrier()
    if dist.get_rank() == 0:
        # Written last: a folder without it is not a checkpoint.
        (partial / _STATE).write_text(json.dumps(dict(state)), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
        for older in folder.parent.iterdir():
            if older != folder:
                shutil.rmtree(older)
    dist.barrier()


def newest(parent: Path) -> Path | None:
    """The checkpoint to go on from, if there is one. Only one is ever kept whole."""
    found = sorted(folder for folder in parent.glob("*") if (folder / _STATE).is_file())
    return found[-1] if found else None


def load(policy: Policy, folder: Path, reference: list[Tensor] | None) -> dict[str, Any]:
    """Fill the policy, its optimizer and, in place, the reference; returns the saved state."""
    _give_states(policy.optimizer)
    wanted = _sharded(policy, reference, is_loading=True)
    loaded = dist_checkpointing.load(wanted, str(folder))
    for index, chunk in enumerate(policy.chunks):
        chunk.load_state_dict(loaded[f"model{index}"])
    policy.optimizer.load_state_dict(loaded["optimizer"])
    for inner in _torch_optimizers(policy.optimizer):
        # Megatron-Core gives all parameters one step tensor, which AdamW would then count up once for each of them.
        for parameter_state in inner.state.values():
            parameter_state["step"] = parameter_state["step"].clone()
    if reference is not None:
        with policy.holding(reference):
            for index, chunk in enumerate(policy.chunks):
                chunk.load_state_dict({key.removeprefix("reference."): value for key, value in loaded[f"reference{index}"].items()})
            fresh = policy.host_copy()
        for old, new in zip(reference, fresh, strict=True):
            old.copy_(new)
    state: dict[str, Any] = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    return state


def _give_states(optimizer: Any) -> None:
    """Zero states for torch's AdamW, which has none before its first step; Megatron-Core describes what it finds."""
    for inner in _torch_optimizers(optimizer):
        for group in inner.param_groups:
            for parameter in group["params"]:
                if not inner.state[parameter]:
                    zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                    inner.state[parameter] = {"step": torch.tensor(0.0), **zeros}


def _torch_optimizers(optimizer: Any) -> list[torch.optim.AdamW]:
    """The torch optimizers inside; none where Transformer Engine's or Apex's do the work."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part.optimizer for part in parts if isinstance(part.optimizer, torch.optim.AdamW)]


def metadata() -> dict[str, Any]:
    """How Megatron-Core is asked to lay out states: Megatron-LM's defaults, with optimizer states that load under another layout.

    Those are saved by parameter, not by buffer, and under names that do not count the optimizers of a rank.
    """
    return {
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
    }


def _sharded(policy: Policy, reference: list[Tensor] | None, is_loading: bool) -> dict[str, Any]:
    # The optimizer's states are saved by parameter, not by buffer, so they load under another layout.
    metadata = {"distrib_optim_sharding_type": "fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient": False}
    found = {f"model{index}": chunk.sharded_state_dict(metadata=metadata) for index, chunk in enumerate(policy.chunks)}
    model = {key: value for part in found.values() for key, value in part.items()}
    found["optimizer"] = policy.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
    if reference is not None:
        with policy.holding(reference):
            for index, chunk in enumerate(policy.chunks):
                part = chunk.sharded_state_dict(prefix="reference.", metadata=metadata)
                for sharded in part.values():
                    if isinstance(getattr(sharded, "data", None), Tensor):
                        sharded.data = sharded.data.detach().clone()  # the policy's own weights come back into these parameters
                found[f"reference{index}"] = part
    return found
