"""Transformer Engine's modules by name, parameters and shapes alone, so that Megatron-Core builds its own spec of them without a GPU.

Megatron-Core's classes for Transformer Engine, their `sharded_state_dict` included, are the real ones: they subclass these.
Install before anything of Megatron-Core is imported, in a process of its own.
"""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn


class _Module(nn.Module):
    """What all modules of Transformer Engine have: an extra state, empty where nothing is FP8."""

    fp8 = fp8_calibration = save_original_input = False
    fp8_meta: dict[str, Any] = {"fp8_checkpoint": False}

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        raise AssertionError("extra states are not loaded")


def _parameter(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    return nn.Parameter(torch.full(shape, torch.nan, dtype=dtype))


class Linear(_Module):
    """weight [out, in], and the bias [out]; `parallel_mode` says which of the two is cut."""

    def __init__(self, in_features: int, out_features: int, *, parallel_mode: str | None = None, tp_size: int = 1, bias: bool = True,
                 params_dtype: torch.dtype | None = None, **_: Any) -> None:  # fmt: skip
        super().__init__()
        rows = out_features // tp_size if parallel_mode == "column" else out_features
        columns = in_features // tp_size if parallel_mode == "row" else in_features
        self.use_bias, self.parallel_mode = bias, parallel_mode
        self.weight = _parameter(rows, columns, dtype=params_dtype)
        if bias:
            self.bias = _parameter(rows, dtype=params_dtype)


class LayerNormLinear(Linear):
    """A norm's layer_norm_weight [in] before the linear."""

    def __init__(self, in_features: int, out_features: int, *, eps: float = 1e-5, normalization: str = "LayerNorm",
                 params_dtype: torch.dtype | None = None, **rest: Any) -> None:  # fmt: skip
        super().__init__(in_features, out_features, params_dtype=params_dtype, **rest)
        assert normalization == "RMSNorm"
        self.eps = eps
        self.layer_norm_weight = _parameter(in_features, dtype=params_dtype)


class GroupedLinear(_Module):
    """weight<i> [out, in] for each of the experts that a rank holds."""

    def __init__(self, num_gemms: int, in_features: int, out_features: int, *, parallel_mode: str | None = None, tp_size: int = 1,
                 bias: bool = True, params_dtype: torch.dtype | None = None, **_: Any) -> None:  # fmt: skip
        super().__init__()
        rows = out_features // tp_size if parallel_mode == "column" else out_features
        columns = in_features // tp_size if parallel_mode == "row" else in_features
        self.num_gemms, self.use_bias, self.parallel_mode = num_gemms, bias, parallel_mode
        for index in range(num_gemms):
            setattr(self, f"weight{index}", _parameter(rows, columns, dtype=params_dtype))


class RMSNorm(_Module):
    def __init__(self, hidden_size: int = 0, *, normalized_shape: int = 0, **_: Any) -> None:
        super().__init__()
        self.weight = _parameter(hidden_size or normalized_shape)  # megatron-core 0.16 and 0.19


class DotProductAttention(_Module):
    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()


def install() -> None:
    """Make `import transformer_engine` find the modules above. Everything else of it is absent, or inert."""
    names = ("", ".pytorch", ".pytorch.fp8", ".pytorch.tensor", ".common")
    package, pytorch, fp8, tensor, common = (ModuleType(f"transformer_engine{name}") for name in names)
    package.__version__ = "2.2.0"  # later ones have more that Megatron-Core imports without asking
    package.pytorch, package.common, package.__path__, pytorch.__path__ = pytorch, common, [], []
    tensor.__path__ = []
    for kind in (Linear, LayerNormLinear, GroupedLinear, RMSNorm, DotProductAttention):
        setattr(pytorch, kind.__name__, kind)
    pytorch.LayerNorm, pytorch.ops, pytorch.fp8 = type("LayerNorm", (_Module,), {}), MagicMock(), fp8
    pytorch.distributed = MagicMock(CudaRNGStatesTracker=object)
    common.recipe = MagicMock(DelayedScaling=object)
    fp8.FP8GlobalStateManager, fp8.fp8_autocast, fp8.fp8_model_init = MagicMock(), MagicMock(), MagicMock()
    tensor.QuantizedTensor = type("QuantizedTensor", (), {})
    sys.modules.update({module.__name__: module for module in (package, pytorch, fp8, tensor, common)})


def main(config: Path, checkpoint: Path, out: Path) -> None:
    """Build the CUDA platform's model of `config`, load the checkpoint as a resumed run does, and leave its weights by canonical name."""
    install()
    import torch.distributed as dist
    from megatron.core.transformer import multi_latent_attention
    from safetensors.torch import save_file

    from r1mega.config.layout import Layout
    from r1mega.config.training import Optimizer, Train
    from r1mega.megatron import platform
    from r1mega.megatron.checkpoint import Checkpoints
    from r1mega.megatron.platform import cuda
    from r1mega.megatron.policy import Policy
    from r1mega.weights.architecture import Architecture

    real = multi_latent_attention.TELinear
    platform.start("cpu", 1)
    multi_latent_attention.TELinear = real  # the CPU platform puts its own in its place
    chosen: Any = platform.active()
    # Layers, names and configuration are CUDA's; tensors stay where there is no GPU to put them on.
    chosen.layer_spec, chosen.kernels, chosen.SPELLING = cuda.layer_spec, cuda.kernels, cuda.SPELLING
    cuda.fuse_gradients()
    chosen.config_overrides = lambda *asked: cuda.config_overrides(*asked) | {"use_cpu_initialization": True, "moe_permute_fusion": False}
    arch = Architecture.from_hf(json.loads(config.read_text()))
    policy = Policy(arch, Layout(), Train(mtp_loss=0.3 if arch.mtp_layers else 0.0), Optimizer(lr=1e-3))
    fused = {name: module.eps for name, module in policy.chunks[0].named_modules() if isinstance(module, LayerNormLinear)}
    # The norms of latents have an epsilon of their own.
    assert fused and all(eps == (1e-6 if name.endswith("up_proj") else arch.norm_eps) for name, eps in fused.items()), fused
    names = {param.name for param in policy.exchange.placed}
    assert names == {name for _, name in policy.weights}, names ^ {name for _, name in policy.weights}
    assert Checkpoints(policy, checkpoint).restore(None) is not None
    optimizers = [part.optimizer for part in getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])]
    assert all(state["exp_avg_sq"].any() for optimizer in optimizers for state in optimizer.state.values())
    save_file({name: value.clone() for name, value in policy.exchange.gather(torch.float32).items()}, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
