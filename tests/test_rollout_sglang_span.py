"""A real SGLang server of two ranks, one on each of two nodes: two parts that two keepers start, here on one machine over gloo."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import sglang_support as support
from megatron_support import cpu_platform

from r1mega.config.rollout import Rollout, Sglang
from r1mega.rollout.engine import SamplingParams
from r1mega.rollout.open import Surroundings
from r1mega.rollout.sglang import SglangEngine
from r1mega.rollout.sglang_checksums import on_cpu as checksum
from r1mega.rollout.sglang_network import LOADER
from r1mega.rollout.sglang_part import State
from r1mega.rollout.sglang_places import Allocation
from r1mega.weights.shipping import tensors
from r1mega.weights.wire import Wire

pytestmark = [pytest.mark.sglang, pytest.mark.slow]
MODEL = support.MODELS["deepseek"]
PLAIN = SamplingParams(stop_token_ids=(2,))
NODES = Allocation(node=0, trainers=2, gpus=2)
"""On each of two nodes a GPU for a rank of the trainer and one for servers; this process is on the first."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[SglangEngine]:
    support.require()
    told = Sglang(
        start_timeout_s=900, retries=2, request_timeout_s=300, bucket_bytes=100_000, layout={"tp": 2},
        arguments=["--custom-weight-loader", LOADER],
    )  # fmt: skip
    where = Surroundings("cpu", folder, trainer_gpus=1, allocation=NODES)
    with support.keepers(folder, (0, 1)), cpu_platform():
        opened = SglangEngine(Rollout(engine="sglang", sglang=told), MODEL, where)
        yield opened
        opened.close()


def use(engine: SglangEngine, path: str, transport: str) -> None:
    engine._transport.close()
    engine._sglang = engine._sglang.model_copy(update={"path": path, "transport": transport})
    engine._connect()


def states(engine: SglangEngine) -> list[State]:
    return [part.state() for part in engine._fleet.servers[0]._parts]


def sums(engine: SglangEngine) -> list[dict[str, str]]:
    answer = engine._pool.clients[0].post("/weights_checker", {"action": "checksum"}, 60)
    return [rank["checksums"] for rank in answer["ranks"]]


def wanted(engine: SglangEngine, seed: int) -> list[dict[str, str]]:
    source = support.source(MODEL, seed)
    walks = [source.params(engine._layout, rank, Wire("float32"), 2**28, 0, 0) for rank in range(2)]
    return [{name: checksum(value) for bucket, flat in walk for name, value in tensors(bucket, flat)} for walk in walks]


def right(engine: SglangEngine, seed: int, folder: Path) -> float:
    """The gap of what is drawn to `transformers` with these weights, which both ranks hold to the last bit."""
    assert sums(engine) == wanted(engine, seed)
    samples = engine.generate(support.requests(), PLAIN)
    assert {sample.weight_version for sample in samples} == {seed}
    folder.mkdir()
    return support.gap(support.reference(MODEL, seed, folder), samples, PLAIN)


@pytest.mark.parametrize(
    ("path", "transport"),
    [
        *(("full", "tensor"), ("full", "request"), ("full", "distributed")),
        *(("shards", "tensor"), ("shards", "request"), ("shards", "distributed")),
    ],
)
def test_weights_reach_the_ranks_of_both_nodes(engine: SglangEngine, tmp_path: Path, path: str, transport: str) -> None:
    use(engine, path, transport)
    seed = 1 + ["tensor", "request", "distributed"].index(transport) + 3 * (path == "shards")
    engine.sync(support.source(MODEL, 50), version=0)
    engine.sync(support.source(MODEL, seed), version=seed)
    gap = right(engine, seed, tmp_path / "reference")
    print(f"{path} by {transport}: log-prob gap {gap:.1e}")
    assert gap <= 1e-4


def test_the_key_is_in_no_file_and_each_part_has_its_node(engine: SglangEngine, folder: Path) -> None:
    (server,) = engine._fleet.servers
    assert server.nodes == [0, 1] and engine._here("", server.nodes) == [True, False]
    assert not [path for path in folder.rglob("*") if path.is_file() and server.client.key.encode() in path.read_bytes()]
    first, second = states(engine)
    assert first.meeting == second.meeting and first.address.rpartition(":")[0] == first.meeting.rpartition(":")[0]
    assert second.address.startswith("127.0.0.1:"), "the part that serves nobody listens to nobody else"


@pytest.mark.proof
def test_a_part_that_is_killed_takes_the_server_along_and_nothing_is_lost(engine: SglangEngine, tmp_path: Path) -> None:
    """pytest -m proof tests/test_rollout_sglang_span.py: two more starts of a server, of half a minute to two each."""
    asked = support.requests(count=24, new=200)
    use(engine, "full", "tensor")
    engine.sync(support.source(MODEL, 3), version=3)
    expected = engine.generate(asked, PLAIN)
    before = states(engine)
    threading.Timer(0.5, os.killpg, (before[1].pid, signal.SIGKILL)).start()
    assert support.same(engine.generate(asked, PLAIN), expected)
    between = states(engine)
    assert not {state.pid for state in before} & {state.pid for state in between}

    send, sent = engine._transport.send, []

    def fatal(bucket, flat) -> None:
        sent.append(bucket)
        if len(sent) == 4:
            os.killpg(between[0].pid, signal.SIGKILL)
        send(bucket, flat)

    engine._transport.send = fatal
    engine.sync(support.source(MODEL, 4), version=4)
    assert len(sent) == 4 and not {state.pid for state in between} & {state.pid for state in states(engine)}
    assert right(engine, 4, tmp_path / "reference") <= 1e-4
