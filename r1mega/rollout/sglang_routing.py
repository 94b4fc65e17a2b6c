"""Experts as SGLang's servers report them."""

import base64
import math
from typing import Any

import torch
from torch import Tensor

from r1mega.errors import UserError
from r1mega.rollout.routing import compact
from r1mega.rollout.sglang_client import Client, Unanswered
from r1mega.weights.architecture import Architecture

FLAG = "--enable-return-routed-experts"
"""Of `sglang.launch_server`."""

FIELD = "return_routed_experts"
"""Of a request to `/generate`."""


def read(client: Client, meta: dict[str, Any], fed: int, arch: Architecture) -> Tensor:
    """`Sample.routing` from an answer's `meta_info`, for `fed` tokens that were given to the model.

    It comes as base64 of int32 [fed, layers, top_k], dense layers included, which nobody writes and which read 0. Columns of shared
    experts, where these are fused with the routed ones, and the places of redundant experts are no part of it.
    """
    if "routed_experts" not in meta:
        raise UserError(f"{client.address} does not tell which experts it takes: start it with {FLAG}, or set rollout.routing_replay=off")
    assert arch.moe is not None
    shape = (fed, arch.layers, arch.moe.top_k)
    flat = torch.frombuffer(bytearray(base64.b64decode(meta["routed_experts"])), dtype=torch.int32)
    if flat.numel() != math.prod(shape):
        raise Unanswered(f"{client.address}: tells {flat.numel()} experts, which are not {shape} of tokens, layers and choices")
    experts = flat.view(shape)[:, arch.moe.first_dense_layers :]
    ordered = experts.sort(-1).values
    if ((ordered[..., 1:] == ordered[..., :-1]).any() or ordered.min() < 0 or ordered.max() >= arch.moe.experts).item():
        raise Unanswered(f"{client.address}: a token went through an expert twice, or through none of {arch.moe.experts}")
    return compact(experts, arch.moe.experts)
