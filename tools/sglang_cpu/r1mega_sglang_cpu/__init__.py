"""A platform plugin for SGLang: its own native PyTorch operations on a CPU, where SGLang's CPU kernels are not packaged.

It is active only where torch sees no GPU. SGLang's private names are patched, so the version is pinned in `tools/install_sglang_cpu`.
"""

_BACKEND = "torch_native"


def activate() -> str | None:
    """SGLang's entry point: the platform's class, or None where there is a GPU."""
    import torch

    if torch.cuda.is_available():
        return None
    from sglang.srt.arg_groups import choices

    # The backend reads the whole context anew for every token, in one order: what a request's seed draws does not depend on a cache.
    choices.add_deterministic_attention_backend_choices([_BACKEND])
    choices.add_radix_supported_deterministic_attention_backend_choices([_BACKEND])
    return "r1mega_sglang_cpu.platform:CpuNative"
