"""Own shards over the network without a network: what a loader in SGLang makes of the messages of all ranks of a trainer."""

import json
from collections import Counter

import pytest
import torch
from test_weights_engine import sharded
from test_weights_plan import loaded, random_tensors
from test_weights_sync import BLOCKS, ENGINES, same
from test_weights_table import tiny
from torch.distributed import distributed_c10d as c10d

from r1mega.config.engine_layout import EngineLayout
from r1mega.config.layout import Layout
from r1mega.rollout.in_sglang import r1mega_loader
from r1mega.weights.architecture import Architecture
from r1mega.weights.direct import direct_plan
from r1mega.weights.placement import Spelling
from r1mega.weights.shipping import parcel, tensors, whole_parcel
from r1mega.weights.wire import Wire


class Letters:
    """A process group that delivers what lies in it."""

    def __init__(self) -> None:
        self.sent: dict[int, torch.Tensor] = {}

    def recv(self, tensors: list[torch.Tensor], rank: int, tag: int) -> "Letters":
        tensors[0].copy_(self.sent.pop(rank))
        return self

    def wait(self) -> None:
        pass


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Letters:
    letters = Letters()
    monkeypatch.setitem(c10d._world.pg_names, letters, "a-group")
    return letters


def garbage(wanted: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Parameters of these names and shapes, each with other values."""
    model = torch.nn.Module()
    model.named_parameters = lambda: params.items()
    params = {name: torch.nn.Parameter(torch.full(value.shape, 7.0).to(value.dtype), requires_grad=False) for name, value in wanted.items()}
    return model


def note(bucket, parcels, **changes) -> list[tuple[str, torch.Tensor]]:
    told = {
        "group": "a-group",
        "entries": [(entry.name, entry.dtype, entry.shape) for entry in bucket.entries],
        "messages": [(rank, found.message.numel(), found.patches) for rank, found in parcels.items()],
    }
    return [("note", torch.frombuffer(bytearray(json.dumps(told | changes).encode()), dtype=torch.uint8))]


def deliver(group, arch, layout, world, engine, wire, limit) -> None:
    values = random_tensors(arch)
    params = loaded(arch, layout, world, values)
    plan = direct_plan(arch, layout, world, Spelling(), engine, wire, first=world)
    links = Counter()
    for rank in range(engine.ranks):
        wanted = sharded(arch, engine, rank % engine.tp, values, wire, False)[0]
        model = garbage(wanted)
        for bucket in plan.buckets(world + rank, limit):
            parcels = {one: parcel(params[one], bucket, one, wire, torch.device("cpu")) for one in bucket.messages}
            for one, found in parcels.items():
                group.sent[one] = found.message
                links[one, world + rank] += found.message.numel()
            r1mega_loader.load(model, note(bucket, parcels))
            assert not group.sent
        same({name: value.data for name, value in model.named_parameters()}, wanted)
    assert links == plan.links()


@pytest.mark.parametrize("engine", ENGINES, ids=str)
@pytest.mark.parametrize(("layout", "world"), [(Layout(tp=2, pp=2, ep=2), 4), (Layout(ep=4), 8)])
def test_pieces_of_all_ranks_become_the_engines_parameters(group, layout, world, engine):
    """To the last bit, padding included, by the bytes that the plan says for each pair of ranks."""
    deliver(group, tiny(), layout, world, engine, Wire("float32"), 20_000)


def test_codes_and_scales_of_block_fp8(group):
    deliver(group, Architecture.from_hf(BLOCKS), Layout(ep=2), 2, EngineLayout(), Wire("bfloat16", block_fp8=True), 300_000)


def test_a_whole_bucket_may_come_from_one_rank(group):
    arch, engine, wire = tiny(), EngineLayout(tp=2, device="cpu"), Wire("float32")
    wanted = sharded(arch, engine, 1, random_tensors(arch), wire, False)[0]
    model = garbage(wanted)
    for bucket in direct_plan(arch, Layout(), 1, Spelling(), engine, wire).buckets(1, 50_000):
        flat = torch.zeros(bucket.nbytes, dtype=torch.uint8)
        for name, value in tensors(bucket, flat):
            value.copy_(wanted[name])
        group.sent[0] = flat
        r1mega_loader.load(model, note(bucket, {0: whole_parcel(bucket, flat)}))
    same({name: value.data for name, value in model.named_parameters()}, wanted)


def test_a_parameter_of_another_shape_or_dtype_is_named(group):
    model = garbage({"w": torch.zeros(2, 3)})
    for entry in (("w", "float32", (3, 2)), ("w", "bfloat16", (2, 3))):
        with pytest.raises(ValueError, match=r"^w is torch.float32 \[2, 3\] here; the trainer sends (float32 \[3, 2\]|bfloat16 \[2, 3\])$"):
            r1mega_loader.load(model, note(type("Bucket", (), {"entries": ()}), {}, entries=[entry]))
