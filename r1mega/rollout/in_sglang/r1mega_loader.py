"""A weight loader for SGLang (`--custom-weight-loader r1mega_loader.load`): a rank's own parameters, from the ranks that hold their pieces.

A request brings every rank of the server a note; the bytes follow over a process group that the servers and the trainer have joined, from
each rank of the trainer straight to the rank of the server that keeps them. See `r1mega/rollout/sglang_network.py`, which writes the note.
"""

import json
from math import prod
from typing import Any

import torch
from torch.distributed import distributed_c10d as c10d


def load(model: torch.nn.Module, named_tensors: list[tuple[str, torch.Tensor]]) -> None:
    """Put what the note in `named_tensors` says into the model's parameters.

    The note is JSON in a tensor: `group`, the name of the process group; `entries`, [name, dtype, shape] of each parameter; `messages`,
    [rank in the group, bytes, patches] of each sender, a patch being [entry, start, stop, dtype, offset, bytes]: the region of the
    parameter, leading axes folded into the rows, and where in the message its values lie. What no patch covers is padding, and zero.
    ValueError for a parameter of another shape or dtype.
    """
    ((_, note),) = named_tensors
    told: dict[str, Any] = json.loads(bytes(note.cpu().tolist()))
    group = next(group for group, name in c10d._world.pg_names.items() if name == told["group"])
    targets = _targets(model, told["entries"])
    device = next(iter(targets)).device if targets else note.device
    received = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _, nbytes, _ in told["messages"]]
    coming = [group.recv([flat], rank, 0) for flat, (rank, _, _) in zip(received, told["messages"], strict=True)]
    covered = [0] * len(targets)
    for _, _, patches in told["messages"]:
        for entry, start, stop, *_ in patches:
            covered[entry] += prod(last - first for first, last in zip(start, stop, strict=True))
    for target, size in zip(targets, covered, strict=True):
        if size < target.numel():
            target.view(torch.uint8).zero_()
    for flat, work, (_, _, patches) in zip(received, coming, told["messages"], strict=True):
        work.wait()
        for entry, start, stop, dtype, offset, nbytes in patches:
            place = tuple(slice(first, last) for first, last in zip(start, stop, strict=True))
            values = flat[offset : offset + nbytes].view(getattr(torch, dtype))
            targets[entry][place] = values.view([last - first for first, last in zip(start, stop, strict=True)])


def _targets(model: torch.nn.Module, entries: list[tuple[str, str, list[int]]]) -> list[torch.Tensor]:
    params = dict(model.named_parameters())
    found = []
    for name, dtype, shape in entries:
        param = params[name].data
        if list(param.shape) != shape or param.dtype != getattr(torch, dtype):
            raise ValueError(f"{name} is {param.dtype} {list(param.shape)} here; the trainer sends {dtype} {shape}")
        # `view`, not `reshape`: a copy would take the values and the parameter would not.
        found.append(param.view(-1, shape[-1]) if len(shape) > 2 else param)
    return found
