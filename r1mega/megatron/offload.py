"""A trainer's tensors moved to the host and back, for engines that draw on the same GPUs meanwhile.

What is moved are storages, not tensors: parameters, Megatron-Core's flat buffers, the optimizer's views of them and whoever else refers to
one find the same bytes in the same tensors afterwards. It works alike on a CPU, where it is a move into a second buffer.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from r1mega.megatron import platform


@contextmanager
def on_host(kept: Iterable[Tensor], blank: Iterable[Tensor] = ()) -> Iterator[None]:
    """Free the device memory of tensors while the block lasts.

    Args:
        kept: their bytes wait on the host. Those that share a storage are moved together.
        blank: they are zero afterwards, like gradient buffers between two steps.
    """
    device = platform.active().device()
    found = _storages(kept, device)
    saved = [(storage, _host_copy(storage)) for storage in found.values()]
    freed = [(storage, storage.nbytes()) for place, storage in _storages(blank, device).items() if place not in found]
    for storage in (*found.values(), *(storage for storage, _ in freed)):
        storage.resize_(0)
    platform.active().release_cached()
    try:
        yield
    finally:
        for storage, copied in saved:
            storage.resize_(copied.nbytes())
            storage.copy_(copied, non_blocking=True)
        for storage, size in freed:
            storage.resize_(size)
            torch.empty(0, dtype=torch.uint8, device=device).set_(storage).zero_()


def _storages(tensors: Iterable[Tensor], device: torch.device) -> dict[int, torch.UntypedStorage]:
    """What the tensors stand in, by its address. Step counters, say, may be on the host already."""
    found = (tensor.untyped_storage() for tensor in tensors if tensor.device.type == device.type)
    return {storage.data_ptr(): storage for storage in found if storage.nbytes()}


def _host_copy(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    # Pinned, so that the way back is one asynchronous copy at the link's full speed.
    flat = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=storage.device.type == "cuda").untyped_storage()
    flat.copy_(storage, non_blocking=False)
    return flat
