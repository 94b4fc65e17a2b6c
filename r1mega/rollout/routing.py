"""Which experts tokens went through, as engines record it."""

import torch
from torch import Tensor

from r1mega.errors import UserError
from r1mega.rollout.engine import SamplingParams


def compact(experts: Tensor, count: int) -> Tensor:
    """Indices of any integer dtype among `count` experts, in the smallest dtype that holds them: a token of DeepSeek-V3 has 464."""
    return experts.to(torch.uint8 if count <= 256 else torch.int16)


def check_routing(sampling: SamplingParams, sparse: bool) -> None:
    """UserError where a model without experts is asked for them."""
    if sampling.routing and not sparse:
        raise UserError("rollout.routing_replay=rollout needs a model with experts, and this one has none; use off")
