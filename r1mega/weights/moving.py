"""Moving the bytes that a plan names: parameters to flat buffers, flat buffers to Hugging Face tensors, files to parameters."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from r1mega.weights.boxes import Box
from r1mega.weights.placement import LocalParam
from r1mega.weights.plan import ExportPlan, Send

Read = Callable[[str, Box], Tensor]
"""A region of a canonical tensor, by the tensor's Hugging Face name."""

Params = Mapping[tuple[int, str], Tensor]
"""Parameters and persistent buffers of a rank by (model chunk, name)."""


def gather_local(params: Params, plan: ExportPlan, rank: int, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """This rank's send buffer.

    Args:
        params: parameters and buffers of this rank.
        dtype: dtype of the exported weights; tensors that are float32 in every checkpoint stay float32.
        out: uint8 [plan.nbytes(dtype.itemsize)] to fill; made when left out.

    Returns:
        uint8 [plan.nbytes(dtype.itemsize)]
    """
    sends = plan.sends[rank]
    if out is None:
        device = params[sends[0].piece.chunk, sends[0].piece.param].device if sends else None
        out = torch.empty(plan.nbytes(dtype.itemsize), dtype=torch.uint8, device=device)
    for section, part in zip(_sections(out, plan, dtype), _by_section(sends), strict=True):
        values = [_region(params[send.piece.chunk, send.piece.param].detach(), send) for send in part]
        if values:
            torch.cat(values, out=section[: sum(send.size for send in part)])
    return out


def assemble(buffers: Tensor, plan: ExportPlan, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every canonical tensor, from the send buffers of all ranks.

    A tensor that one rank sent whole is a view of `buffers`, not a copy: it is valid until `buffers` is written again.

    Args:
        buffers: uint8 [world_size, plan.nbytes(dtype.itemsize)], as an all-gather leaves them.
    """
    shapes = {tensor.name: tensor.shape for tensor in plan.tensors}
    result: dict[str, Tensor] = {}
    for buffer, sends in zip(buffers, plan.sends, strict=True):
        for section, part in zip(_sections(buffer, plan, dtype), _by_section(sends), strict=True):
            sizes = [send.size for send in part]
            for send, values in zip(part, torch.split(section[: sum(sizes)], sizes), strict=True):
                name = send.piece.tensor
                if send.shape == shapes[name]:
                    result[name] = values.view(send.shape)
                    continue
                if name not in result:
                    result[name] = torch.empty(shapes[name], dtype=values.dtype, device=values.device)
                result[name][send.piece.source.slices] = values.view(send.shape)
    return {name: result[name] for name in shapes}


def _by_section(sends: Sequence[Send]) -> tuple[list[Send], list[Send]]:
    return [send for send in sends if send.float32], [send for send in sends if not send.float32]


def _region(value: Tensor, send: Send) -> Tensor:
    return (value if value.shape == send.shape else value[send.piece.box.slices]).reshape(-1)


def _sections(buffer: Tensor, plan: ExportPlan, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    start = plan.weight_offset
    floats = buffer[: 4 * plan.float32_elements].view(torch.float32)
    return floats, buffer[start : start + dtype.itemsize * plan.weight_elements].view(dtype)


def load_local(params: Params, placed: Sequence[LocalParam], read: Read) -> None:
    """Fill this rank's parameters from `read(tensor name, box)`; padding becomes zero.

    Values are converted to the dtype of each parameter.
    """
    with torch.no_grad():
        for local in placed:
            param = params[local.chunk, local.name]
            assert tuple(param.shape) == local.shape, f"{local.name}: shape {tuple(param.shape)}, placed as {local.shape}"
            if sum(piece.box.size for piece in local.pieces) < param.numel():
                param.zero_()
            for piece in local.pieces:
                param[piece.box.slices].copy_(read(piece.tensor, piece.source))


def reader_of(tensors: Mapping[str, Tensor]) -> Read:
    """`read` over tensors in memory."""
    return lambda name, box: tensors[name][box.slices]
