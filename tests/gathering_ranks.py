"""What spawned trainer ranks do in test_megatron_gathering: gather buckets of their shards, with every message counted."""

import json
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron_support import cpu_platform
from safetensors.torch import load_file
from torch import Tensor

from r1mega.config.engine_layout import EngineLayout
from r1mega.config.layout import Layout
from r1mega.config.training import Optimizer, Train
from r1mega.megatron.policy import Policy
from r1mega.pipeline.model_folder import ModelFolder
from r1mega.weights.architecture import Architecture
from r1mega.weights.blocks import SCALE, scale_box
from r1mega.weights.engine import engine_params
from r1mega.weights.moving import reader_of
from r1mega.weights.shipping import tensors
from r1mega.weights.source import Filled, Mapped
from r1mega.weights.wire import Wire

WIRES = {"bfloat16": Wire("bfloat16"), "block_fp8": Wire("bfloat16", block_fp8=True)}
ENGINES = {"bfloat16": EngineLayout(tp=2), "block_fp8": EngineLayout(tp=2, ep=2, attn_dp=2)}
LIMIT = 200_000


@contextmanager
def counted() -> Iterator[dict[str, Counter[int]]]:
    """Bytes that this rank hands to `dist.send` and takes from `dist.recv`, by the other rank."""
    found: dict[str, Counter[int]] = {"sent": Counter(), "received": Counter()}
    send, recv = dist.send, dist.recv

    def counting(call: Callable[..., Any], side: str) -> Callable[[Tensor, int], Any]:
        def wrapped(values: Tensor, other: int) -> Any:
            found[side][other] += values.nbytes
            return call(values, other)

        return wrapped

    dist.send, dist.recv = counting(send, "sent"), counting(recv, "received")
    try:
        yield found
    finally:
        dist.send, dist.recv = send, recv


def work(rank: int, world: int, port: int, folder: Path, layout: dict[str, int]) -> None:
    """Into `rank-<r>.json`: the bytes that each path moved. What arrived is held against the converter's files here."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=300))
    values = load_file(folder / "bfloat16" / "model.safetensors")
    report: dict[str, Any] = {}
    with cpu_platform():
        policy = Policy(ModelFolder(folder / "bfloat16").arch, Layout(**layout), Train(chunk_tokens=128), Optimizer(lr=1e-3))
        policy.exchange.load(reader_of(values))
        whole = Mapped(policy.arch, values)
        for name, wire in WIRES.items():
            stored = load_file(folder / name / "model.safetensors")
            with counted() as moved:
                found = _found(policy.exchange.buckets(wire, LIMIT, None, rank))
            for key, value in found.items():
                _same(value, stored[key], key)
            report[f"full {name}"] = {"moved": moved, "names": sorted(found)}
            engine = ENGINES[name]
            with counted() as moved:
                parts = [_found(policy.exchange.params(engine, r, wire, LIMIT, r, rank)) for r in range(engine.tp)]
            report[f"direct {name}"] = {"moved": moved}
            again = [[bucket for bucket, _ in policy.exchange.params(engine, 0, wire, LIMIT, 0, rank)] for _ in range(2)]
            assert len(again[0]) > 1 and all(map(operator.is_, *again)), "planned once"
            if rank < engine.tp:
                _stored_as(engine, rank, policy.arch, parts[rank], stored)
                for key, value in _found(whole.params(engine, rank, wire, LIMIT, rank, rank)).items():
                    _same(parts[rank][key], value, key)
    (folder / f"rank-{rank}.json").write_text(json.dumps(report))


def _found(filled: Filled) -> dict[str, Tensor]:
    return {name: value for bucket, flat in filled if flat is not None for name, value in tensors(bucket, flat)}


def _stored_as(engine: EngineLayout, rank: int, arch: Architecture, found: dict[str, Tensor], stored: dict[str, Tensor]) -> None:
    """Every piece of every parameter, codes and scales, against what the converter wrote of its tensor."""
    params = {param.name: param for param in engine_params(arch, engine, rank)}
    assert {name.removesuffix(SCALE) for name in found} == params.keys()
    for name, param in params.items():
        for piece in param.pieces:
            held = found[name].flatten(0, -2) if param.stacked else found[name]
            _same(held[piece.box.slices], stored[piece.tensor][piece.source.slices], name)
            if name + SCALE in found:
                scales = found[name + SCALE].flatten(0, -2) if param.stacked else found[name + SCALE]
                _same(scales[scale_box(piece.box).slices], stored[piece.tensor + SCALE][scale_box(piece.source).slices], name + SCALE)


def _same(value: Tensor, expected: Tensor, name: str) -> None:
    assert value.dtype == expected.dtype and value.shape == expected.shape, name
    assert torch.equal(value.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)), name
