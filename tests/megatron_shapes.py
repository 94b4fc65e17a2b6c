"""Build Megatron's own GPTModel for chosen ranks of a world that does not exist, and print its parameters as JSON.

Run as a program with a JSON list of cases on standard input: {"config": .., "layout": .., "world": .., "ranks": [..]}.
Prints one list per case, with one {"<chunk> <name>": shape} per rank, or the text of the error that Megatron raised.
A process of its own, because the CPU platform's stand-ins change torch for the rest of the process.
"""

import json
import sys

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from r1mega.config.layout import Layout
from r1mega.config.schema import Train
from r1mega.megatron import model, platform, topology
from r1mega.megatron.architecture import transformer_config
from r1mega.weights.architecture import Architecture


def shapes(arch: Architecture, layout: Layout, world: int, rank: int) -> dict[str, list[int]]:
    """Parameters and persistent buffers of one rank, built on the meta device."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        platform.start("cpu", 1)
        platform.active().device = lambda: torch.device("meta")
        topology.connect(layout)
        config = transformer_config(arch, layout, Train(mtp_loss=0.3 if arch.mtp_layers else 0.0))
        with torch.device("meta"):
            chunks = model.build(arch, layout, config)
        return {f"{chunk} {name}": list(value.shape) for (chunk, name), value in model.named_weights(chunks).items()}
    finally:
        topology.disconnect()
        dist.destroy_process_group()


def main() -> None:
    results: list[list[dict[str, list[int]]] | str] = []
    for case in json.load(sys.stdin):
        arch, layout = Architecture.from_hf(case["config"]), Layout(**case["layout"])
        try:
            results.append([shapes(arch, layout, case["world"], rank) for rank in case["ranks"]])
        except Exception as error:  # one case's failure must not hide the others' results
            results.append(repr(error))
    json.dump({"mtp_layer": model.mtp_layer_name(), "cases": results}, sys.stdout)


if __name__ == "__main__":
    main()
