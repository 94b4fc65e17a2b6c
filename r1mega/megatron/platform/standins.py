"""What Megatron-Core takes for granted about CUDA, answered on a machine without it.

Megatron-Core asks torch for a current device, for streams and for tensors on "cuda" by name. `install` answers each of
these for the CPU, once per process and only when the CPU platform is started; nothing is patched by an import.
Every entry says who asks. No entry changes what is computed.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._device import _device_constructors

_CPU = torch.device("cpu")


class _Inert:
    """A stream or an event on a device that runs everything in order: every method is a no-op."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: self


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (isinstance(device, torch.device) and device.type == "cuda")


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """A tensor factory that reads device="cuda" as the CPU and drops pinning (schedules, clip_grads, optimizers, grad buffers)."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


def _to(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        args = tuple(_CPU if _is_cuda(a) else a for a in args)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return original(self, *args, **kwargs)

    return to


def _tensor_type(original: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's optimizers sort parameters by the type name 'torch.cuda.FloatTensor'."""

    @functools.wraps(original)
    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return original(self, dtype, *args, **kwargs)
        return original(self).replace("torch.", "torch.cuda.", 1)

    return type_


def _list_splits(original: Callable[..., Any]) -> Callable[..., Any]:
    """gloo wants lists where the token dispatcher hands tensors or arrays as split sizes."""

    def as_list(splits: Sequence[int] | torch.Tensor | None) -> list[int] | None:
        if splits is None or isinstance(splits, list):
            return splits
        return splits.tolist() if hasattr(splits, "tolist") else list(splits)

    @functools.wraps(original)
    def all_to_all_single(
        output: torch.Tensor, input: torch.Tensor, output_split_sizes: Any = None, input_split_sizes: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        return original(output, input, as_list(output_split_sizes), as_list(input_split_sizes), *args, **kwargs)

    return all_to_all_single


def _gather_uneven(original: Callable[..., Any]) -> Callable[..., Any]:
    """gloo wants equal sizes where expert tensor parallelism gathers as many rows as each rank was sent."""

    @functools.wraps(original)
    def all_gather(outputs: list[torch.Tensor], mine: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if all(output.shape == outputs[0].shape for output in outputs):
            return original(outputs, mine, *args, **kwargs)
        rows = max(len(output) for output in outputs)
        padded = [output.new_empty(rows, *output.shape[1:]) for output in outputs]
        original(padded, _grown(mine, rows), *args, **kwargs)
        for output, values in zip(outputs, padded, strict=True):
            output.copy_(values[: len(output)])
        return None

    return all_gather


def _scatter_uneven(original: Callable[..., Any]) -> Callable[..., Any]:
    """The backward of the uneven gather."""

    @functools.wraps(original)
    def reduce_scatter(output: torch.Tensor, inputs: list[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        if all(part.shape == inputs[0].shape for part in inputs):
            return original(output, inputs, *args, **kwargs)
        rows = max(len(part) for part in inputs)
        padded = output.new_empty(rows, *output.shape[1:])
        original(padded, [_grown(part, rows) for part in inputs], *args, **kwargs)
        output.copy_(padded[: len(output)])
        return None

    return reduce_scatter


def _grown(x: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])


def _rope_by_position(t: torch.Tensor, cu_seqlens: torch.Tensor, freqs: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """RoPE on packed tokens by one gather of the angle table, where Megatron-Core slices it once per sequence in Python.

    Args:
        t: [tokens, heads, dim], this context-parallel rank's share of the packed tokens.
        cu_seqlens: [sequences + 1], boundaries over all context-parallel ranks.
        freqs: [max_length, 1, 1, dim], angles by position within a sequence.
    """
    from megatron.core.models.common.embeddings import rope_utils

    cp_group = kwargs.pop("cp_group")
    positions = packed_positions(cu_seqlens, cp_group.size(), cp_group.rank())
    return rope_utils._apply_rotary_pos_emb_bshd(t.unsqueeze(1), freqs[positions].view(-1, 1, 1, freqs.shape[-1]), **kwargs).squeeze(1)


def packed_positions(cu_seqlens: torch.Tensor, cp: int, cp_rank: int) -> torch.Tensor:
    """Position within its sequence of every packed token that a context-parallel rank holds.

    A rank holds chunks r and 2 cp - 1 - r of each sequence. Returns int64 [tokens / cp].
    """
    key = (cu_seqlens.data_ptr(), cp, cp_rank)
    cached = _positions_cache.get(key)
    if cached is not None and cached[0] is cu_seqlens:
        return cached[1]
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    local = lengths // cp
    starts = torch.cumsum(local, 0) - local
    offset = torch.arange(int(local.sum())) - torch.repeat_interleave(starts, local)
    if cp == 1:
        positions = offset
    else:
        half = torch.repeat_interleave(local // 2, local)
        front = offset + cp_rank * half
        back = offset - half + (2 * cp - 1 - cp_rank) * half
        positions = torch.where(offset < half, front, back)
    _positions_cache.clear()
    _positions_cache[key] = (cu_seqlens, positions)
    return positions


# Every layer of a micro-batch asks for the same positions; the last answer is kept with the tensor it was made from.
_positions_cache: dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor]] = {}


def install() -> None:
    """Put the stand-ins in place. Calling it again changes nothing."""
    if getattr(torch.cuda, "_r1mega_standins", False):
        return
    cuda: Any = torch.cuda
    cuda._r1mega_standins = True

    # A `with torch.device(..)` block recognises factories by identity and lists them on first use. Let it list torch's own:
    # transformers loads models inside one, and their rotary tables were left uninitialised.
    _device_constructors()
    for name in (
        "empty",
        "zeros",
        "ones",
        "full",
        "tensor",
        "arange",
        "rand",
        "randn",
        "empty_like",
        "zeros_like",
        "ones_like",
        "as_tensor",
    ):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.to = _to(torch.Tensor.to)  # type: ignore[method-assign]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]
    torch.Tensor.type = _tensor_type(torch.Tensor.type)  # type: ignore[method-assign]
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign,assignment]

    cuda.current_device = lambda: _CPU
    cuda.device_count = lambda: 1
    for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats", "_lazy_init"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    for name in ("max_memory_allocated", "memory_allocated", "memory_reserved"):
        setattr(cuda, name, lambda *args, **kwargs: 0)
    cuda.Stream = cuda.Event = _Inert
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: _Inert()
    cuda.stream = cuda.device = lambda *args, **kwargs: contextlib.nullcontext()
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.random.get_rng_state = cuda.get_rng_state
    cuda.manual_seed = torch.manual_seed

    dist.all_to_all_single = _list_splits(dist.all_to_all_single)
    dist.all_gather = _gather_uneven(dist.all_gather)
    dist.reduce_scatter = _scatter_uneven(dist.reduce_scatter)
    _install_in_megatron()


def _install_in_megatron() -> None:
    """Answers that live in Megatron-Core's own modules."""
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.tensor_parallel import random as tp_random
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    from r1mega.megatron.platform.kernels import WholeLinear

    modules: Any = (tp_random, multi_latent_attention, moe_utils, rope_utils)
    tp_random_, mla_, moe_, rope_ = modules
    tp_random_._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    tp_random_._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # Selective recomputation leaves fp8=False, reads it as "is not None" and then asks Transformer Engine.
    checkpoint = tp_random_.CheckpointWithoutOutput
    checkpoint.__init__ = functools.partialmethod(checkpoint.__init__, fp8=None)
    # MLA hands its down projections Transformer Engine's "duplicated" mode when they are of this class.
    mla_.TELinear = WholeLinear
    if not hasattr(moe_, "te_general_gemm"):
        moe_.te_general_gemm = None  # 0.16.1 reads the name without defining it when Transformer Engine is absent
    rope_._apply_rotary_pos_emb_thd = _rope_by_position
    DistributedOptimizer._set_main_param_and_optimizer_states = _keeping_step(DistributedOptimizer._set_main_param_and_optimizer_states)


def _keeping_step(original: Callable[..., Any]) -> Callable[..., Any]:
    """A checkpoint holds torch AdamW's step once for all parameters; loading asks for it per parameter all the same."""

    @functools.wraps(original)
    def set_states(self: Any, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> Any:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        return original(self, model_param, {"step": state["step"], **tensors} if "step" in state else tensors)

    return set_states
