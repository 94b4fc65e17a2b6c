"""The CPU platform's layers without values: tensors on the meta device, in a world of which this process is the only rank there is."""

import torch

from r1mega.megatron.platform.cpu import SPELLING, config_overrides, kernels, layer_spec
from r1mega.megatron.platform.cpu import stand_in as prepare

__all__ = ["BACKEND", "SPELLING", "config_overrides", "device", "kernels", "layer_spec", "prepare"]

BACKEND = "fake"


def device() -> torch.device:
    return torch.device("meta")
