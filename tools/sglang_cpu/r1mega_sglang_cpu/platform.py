"""The platform, and what SGLang takes for granted on a CPU that a machine without its CPU kernels does not have."""

from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

from r1mega_sglang_cpu.murmur import murmur_hash32


class CpuNative(CpuDeviceMixin, SRTPlatform):
    """Every fused operation takes its `forward_native`; attention is PyTorch's."""

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        return "native"

    def is_pin_memory_available(self, device: Any = None) -> bool:
        return False

    def get_compile_backend(self, mode: str | None = None) -> str:
        return "eager"

    def init_backend(self) -> None:
        """Called once in every scheduler process, before the model is built."""
        _rotary()
        _latent_attention()
        _seeded_sampling()
        _routed_experts()


def _rotary() -> None:
    """Latent attention asks for the rotary embedding of SGLang's CPU kernels, which know YaRN alone."""
    from sglang.srt.layers.rotary_embedding import factory

    def get_rope(*args: Any, device: Any = None, **kwargs: Any) -> Any:
        return factory.get_rope(*args[:8], **kwargs)

    factory.get_rope_cpu = get_rope


def _latent_attention() -> None:
    """The fallback for a backend without an entry reads the latent cache as if it held all heads."""
    from sglang.srt.models.deepseek_common import attention_backend_handler as handlers

    handlers.AttentionBackendRegistry.register("torch_native", handlers._dispatch_mla_subtype)


def _seeded_sampling() -> None:
    """Requests' seeds count in SGLang's deterministic mode alone, which replaces matrix products by Triton kernels and hashes in one."""
    from sglang.srt import batch_invariant_ops
    from sglang.srt.layers import sampler

    batch_invariant_ops.enable_batch_invariant_mode = lambda *_args, **_kwargs: None
    sampler.murmur_hash32 = murmur_hash32


def _routed_experts() -> None:
    """Host buffers of returned experts are registered with CUDA."""
    from sglang.srt.mem_cache.pool_host import common

    def alloc(dims: tuple[int, ...], dtype: torch.dtype, device: str, pin_memory: bool, allocator: Any, *_: Any) -> torch.Tensor:
        return torch.empty(dims, dtype=dtype, device=device)

    common.ALLOC_MEMORY_FUNCS["cpu"] = alloc
