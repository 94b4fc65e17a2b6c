"""Own shards over the network without a network: what a loader in SGLang makes of the messages of all ranks of a trainer."""

import json
import os
import subprocess
import sys
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
from r1mega.rollout import sglang_group
from r1mega.rollout.in_sglang import r1mega_loader
from r1mega.rollout.sglang_client import Client
from r1mega.rollout.sglang_group import Meeting, leave
from r1mega.rollout.sglang_sync import Control
from r1mega.weights.architecture import Architecture
from r1mega.weights.direct import direct_plan
from r1mega.weights.placement import Spelling
from r1mega.weights.shipping import parcel, tensors, whole_parcel
from r1mega.weights.wire import Wire

SERVER = """
import sys
from datetime import timedelta
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
address, port, name = sys.argv[1:]
store, rank, world = next(iter(dist.rendezvous(f"tcp://{address}:{port}", 1, 2)))
group, _ = c10d._new_process_group_helper(world, rank, [], c10d.Backend("gloo"), dist.PrefixStore(name, store), group_name=name,
                                         timeout=timedelta(seconds=60))
flat = torch.empty(3)
group.recv([flat], 0, 0).wait()
print(flat.tolist())
"""


def test_a_group_forms_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose ranks' `dist.rendezvous` would wait for a store that nobody opens. The other side is as in SGLang's processes."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setattr(sglang_group, "_JOIN_S", 60.0)
    meeting = Meeting.with_servers(Control([Client("http://127.0.0.1:9", None)], 1.0), 1, "gloo", trainers=1)
    environment = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_USE_AGENT_STORE"}
    words = [sys.executable, "-c", SERVER, meeting.address, str(meeting.port), meeting.name]
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) as server:
        try:
            group = meeting.joined(0)
            group.send([torch.tensor([1.0, 2.0, 3.0])], 1, 0).wait()
            assert server.communicate(timeout=60)[0] == "[1.0, 2.0, 3.0]\n"
        finally:
            server.kill()
    leave(None, meeting.name, group)


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
