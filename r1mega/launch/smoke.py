"""Two ranks that meet and time their link: `torchrun --nproc-per-node 2 -m r1mega.launch.smoke cpu`, which `r1mega doctor` starts."""

import json
import sys
import time
import warnings

from r1mega.process import die_with_parent

_BYTES = 64 * 2**20
_TIMES = 5


def main(platform_name: str) -> None:
    """Sum ranks, then time all-reduces of 64 MB; rank 0 prints `{"gb_per_s": ...}`, gigabytes of the tensor a second."""
    die_with_parent()
    warnings.simplefilter("ignore")
    import torch
    import torch.distributed as dist

    from r1mega.megatron import platform

    platform.start(platform_name, 1)
    device = platform.active().device()
    total = torch.tensor([dist.get_rank() + 1.0], device=device)
    dist.all_reduce(total)
    if total.item() != dist.get_world_size() * (dist.get_world_size() + 1) / 2:
        raise RuntimeError(f"the sum over ranks is {total.item()}")
    values = torch.ones(_BYTES // 4, device=device)
    seconds = []
    for _ in range(_TIMES):
        dist.barrier()
        begin = time.perf_counter()
        dist.all_reduce(values)
        values[0].item()  # waits for the device
        seconds.append(time.perf_counter() - begin)
    if dist.get_rank() == 0:
        print(json.dumps({"gb_per_s": _BYTES / min(seconds) / 1e9}), flush=True)
    platform.stop()


if __name__ == "__main__":
    main(sys.argv[1])
