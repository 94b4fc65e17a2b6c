"""Servers on the nodes of a job: which node gets what, and what becomes of parts. Servers are stand-ins, nodes folders of this machine."""

import itertools
import os
import signal
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import sglang_support as support
import torch
from megatron_support import cpu_platform

from r1mega.config.engine_layout import EngineLayout
from r1mega.config.rollout import Rollout, Sglang
from r1mega.errors import UserError
from r1mega.rollout.engine import SamplingParams
from r1mega.rollout.open import Surroundings
from r1mega.rollout.sglang import SglangEngine
from r1mega.rollout.sglang_keeper import Keeper, Ordered, forget
from r1mega.rollout.sglang_part import Order, free_port
from r1mega.rollout.sglang_places import ALONE, Allocation, Gpus, own_nodes, places, rooms
from r1mega.rollout.sglang_servers import arguments
from r1mega.rollout.sglang_shards import Way, ways
from r1mega.rollout.sglang_sync import ByTensor, Control
from r1mega.weights.sync import Bucket, Entry

MODEL = support.MODELS["llama"]
PLAIN = SamplingParams()


# ---------------------------------------------------------------- which node gets what


def settings(servers: int, tp: int, **changes: object) -> Sglang:
    return Sglang(layout=EngineLayout(servers=servers, tp=tp), **changes)


def test_small_servers_fill_one_node_after_the_other() -> None:
    found = places(EngineLayout(servers=5, tp=4), rooms(settings(5, 4), Allocation(0, 2, 3, 8), 8))
    assert found == [[Gpus(2, 0, 4)], [Gpus(2, 4, 4)], [Gpus(3, 0, 4)], [Gpus(3, 4, 4)], [Gpus(4, 0, 4)]]


def test_large_servers_have_whole_nodes_in_equal_parts() -> None:
    found = places(EngineLayout(servers=2, tp=16), rooms(settings(2, 16), Allocation(0, 1, 4, 8), 8))
    assert found == [[Gpus(1, 0, 8), Gpus(2, 0, 8)], [Gpus(3, 0, 8), Gpus(4, 0, 8)]]
    assert places(EngineLayout(tp=12), [Gpus(0, 0, 8), Gpus(1, 0, 8)]) == [[Gpus(0, 0, 6), Gpus(1, 0, 6)]]


def test_colocated_servers_are_under_the_ranks_and_others_beside_them() -> None:
    under = rooms(settings(1, 16, placement="colocated"), Allocation(0, 2, 0, 8), 8)
    assert places(EngineLayout(tp=16), under) == [[Gpus(0, 0, 8), Gpus(1, 0, 8)]]
    beside = rooms(settings(1, 8), Allocation(0, 2, 0, 8), 4)
    assert places(EngineLayout(tp=8), beside) == [[Gpus(0, 4, 4), Gpus(1, 4, 4)]]
    assert places(EngineLayout(servers=3, tp=2), rooms(settings(3, 2), ALONE, 2)) == [[Gpus(0, first, 2)] for first in (2, 4, 6)]


def test_every_gpu_is_given_once_and_a_part_fits_its_node() -> None:
    for servers, tp, gpus in itertools.product((1, 2, 3, 7), (1, 2, 3, 8, 12, 16, 32), (1, 2, 3, 4, 8)):
        wanted = settings(servers, tp)
        nodes = own_nodes(wanted, trainers=2, ranks_per_node=gpus, gpus=gpus)
        found = places(wanted.layout, rooms(wanted, Allocation(0, 2, nodes, gpus), gpus))
        given = [(piece.node, gpu) for parts in found for piece in parts for gpu in range(piece.first, piece.first + piece.count)]
        assert len(set(given)) == len(given) == servers * tp
        assert all(2 <= node < 2 + nodes and gpu < gpus for node, gpu in given)
        for parts in found:
            assert len({piece.count for piece in parts}) == 1 and len({piece.node for piece in parts}) == len(parts)
        if nodes > 1:
            with pytest.raises(
                UserError, match=rf"servers={servers} of tp={tp} take {nodes} nodes with {gpus} GPUs .* there are {nodes - 1};"
            ):
                places(wanted.layout, [Gpus(node, 0, gpus) for node in range(nodes - 1)])


def test_own_nodes_are_asked_for_where_servers_do_not_fit_beside_the_ranks() -> None:
    assert own_nodes(settings(8, 32), 64, 8, 8) == 32
    assert own_nodes(settings(2, 2), 1, 4, 8) == 0
    assert own_nodes(settings(3, 2), 1, 4, 8) == 1
    assert own_nodes(settings(16, 32, placement="colocated"), 64, 8, 8) == 0
    with pytest.raises(UserError, match="servers=17 of tp=32 take 68 nodes with 8 GPUs for servers, and there are 64"):
        own_nodes(settings(17, 32, placement="colocated"), 64, 8, 8)
    with pytest.raises(UserError, match="servers=1 of tp=8 take 2 nodes with 4 GPUs for servers, and there are 1"):
        own_nodes(settings(1, 8, first_gpu=4), 1, 4, 8)


def test_arguments_name_the_gpus_of_a_part_and_no_address() -> None:
    found = arguments(settings(1, 16), MODEL, "bfloat16", "cuda", gpu=4)
    assert found[found.index("--base-gpu-id") + 1] == "4" and found[found.index("--tp-size") + 1] == "16"
    assert not {"--host", "--port", "--nnodes", "--dist-init-addr"} & set(found)


# ---------------------------------------------------------------- how weights get to each rank


def test_ranks_of_servers_are_served_by_a_rank_on_their_node() -> None:
    """Two trainer ranks on each of two nodes, two servers of two ranks: first each on a node, then both across them, then elsewhere."""

    def here(nodes: list[list[int]]) -> list[list[list[bool]]]:
        return [[[node == trainer // 2 for node in server] for server in nodes] for trainer in range(4)]

    assert ways(here([[0, 0], [1, 1]]), tp=2) == [
        *(Way(0, 0, True, (0,)), Way(0, 2, True, (1,))),
        *(Way(1, 1, True, (0,)), Way(1, 3, True, (1,))),
    ]
    assert ways(here([[0, 1], [0, 1]]), tp=2) == [Way(0, 0, True, (0, 1)), Way(1, 3, True, (0, 1))]
    assert ways(here([[0, 2], [2, 2]]), tp=2) == [Way(0, 0, False, (1,)), Way(0, 0, True, (0,)), Way(1, 0, False, (0, 1))]


def test_a_bucket_goes_as_memory_to_this_node_and_as_bytes_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class Named:
        room = None

        def payloads(self, content: object, receivers: int) -> list[str]:
            return [f"memory {number}" for number in range(receivers)]

        def close(self) -> None:
            pass

    told: list[list[list[str]]] = []
    monkeypatch.setattr("r1mega.rollout.sglang_sync.load", lambda control, payloads, *rest: told.append(payloads))
    bucket = Bucket(0, (Entry("a", "float32", (2,), 0, 8),), {})
    flat = torch.zeros(8, dtype=torch.uint8)
    here = [[True, False], [False, False], [True, True]]
    ByTensor(Control([], 1.0), here, Named()).send(bucket, flat)
    (mixed,) = told
    assert [[payload.startswith("memory") for payload in server] for server in mixed] == here
    assert mixed[0][0] == "memory 0" and mixed[2] == ["memory 1", "memory 2"] and len(mixed[1][0]) > 100
    ByTensor(Control([], 1.0), here, None).send(bucket, flat)
    assert not any(payload.startswith("memory") for server in told[1] for payload in server)


# ---------------------------------------------------------------- keepers


@pytest.fixture(scope="module")
def _cpu() -> Iterator[None]:
    with cpu_platform():
        yield


@pytest.fixture
def opened(tmp_path: Path, _cpu: None) -> Iterator[Callable[..., SglangEngine]]:
    """Opens an engine over a stand-in of two ranks, on the two last of three nodes with a GPU each."""
    python = support.standin(tmp_path)
    made = []

    def make(behaviour: str = "ok", engines: int = 2, **changes: object) -> SglangEngine:
        logs = tmp_path / "logs"
        logs.mkdir(exist_ok=True)
        (logs / "behaviour").write_text(behaviour)
        told = {"python": str(python), "retries": 1, "checksums": "none", "request_timeout_s": 60.0, "layout": {"tp": 2}} | changes
        where = Surroundings("cpu", logs, allocation=Allocation(0, 1, engines, 1))
        made.append(SglangEngine(Rollout(engine="sglang", sglang=Sglang(**told)), MODEL, where))
        made[-1].sync(support.source(MODEL, 0), version=4)
        return made[-1]

    with support.keepers(tmp_path / "logs", (0, 1, 2)):
        yield make
        for engine in made:
            engine.close()


def parts(engine: SglangEngine) -> list[Ordered]:
    return engine._fleet.servers[0]._parts


def holds(folder: Path, text: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


@pytest.mark.parametrize("lost", [0, 1])
def test_a_server_that_loses_a_part_is_begun_anew_with_all_of_them(opened: Callable[..., SglangEngine], tmp_path: Path, lost: int) -> None:
    engine = opened("slow")
    asked = support.requests(6)
    expected = engine.generate(asked, PLAIN)
    before = [part.state() for part in parts(engine)]
    wait = engine.start(asked, PLAIN)
    os.killpg(before[lost].pid, signal.SIGKILL)
    begin = time.monotonic()
    assert wait() == expected
    # Not the 60 s that a request may take: a server without one of its ranks is ended, and its connections break.
    assert time.monotonic() - begin < 30
    after = [part.state() for part in parts(engine)]
    assert len({state.pid for state in before + after}) == 4
    assert not any(psutil.pid_exists(state.pid) for state in before)
    assert [state.ended for state in after] == [None, None] and after[0].meeting == after[1].meeting
    assert {sample.weight_version for sample in expected} == {4}


def test_the_key_is_in_no_file_once_it_was_taken(opened: Callable[..., SglangEngine], tmp_path: Path) -> None:
    engine = opened()
    key = engine._fleet.servers[0].client.key
    assert key and not holds(tmp_path, key)
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if os.access(path, os.R_OK)]
    assert not [command for command in commands if key.encode() in command]
    engine.close()
    assert sorted(path.name for path in (tmp_path / "logs/nodes").rglob("*") if path.is_file()) == ["here.json"] * 3


def test_a_key_waits_for_its_keeper_where_nobody_else_can_read_it(tmp_path: Path) -> None:
    order = Order("server-0-abc", 0, 1, "python", [], 1, 1, "cpu")
    part = Ordered(order, "secret", tmp_path, node=3)
    (file,) = holds(tmp_path, "secret")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and file.name == "server-0-abc.key"
    part.end()
    assert not holds(tmp_path, "secret")
    Ordered(order, "secret", tmp_path, node=3)
    forget(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_node_that_begins_nothing_is_named(opened: Callable[..., SglangEngine], tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"node 3, where nobody looks after servers, began no part of an SGLang server within .*=3; its log would be (\S+)$"
    ) as error:
        opened(engines=3, layout={"tp": 3}, start_timeout_s=3.0)
    assert "\n" not in str(error.value)


def test_a_part_that_ends_while_it_starts_is_named_with_its_node(opened: Callable[..., SglangEngine]) -> None:
    with pytest.raises(
        UserError,
        match=r"server on node 2 \(\S+\) ended while it started \(exit code 1\): RuntimeError: no GPU 3 on this node; its log: \S+$",
    ) as error:
        opened("broken")
    assert Path(str(error.value).rpartition(" ")[2]).name.endswith("-part1.log")


def test_an_interpreter_that_is_not_on_a_node_is_named(tmp_path: Path) -> None:
    for node in (0, 1):
        keeper = Keeper(tmp_path, node)
    part = Ordered(Order("server-0-abc", 0, 1, "/nowhere/python", [], 1, 1, "cpu"), "secret", tmp_path, node=1)
    keeper.look()
    state = part.state()
    assert state is not None and state.ended == "not begun" and "/nowhere/python" in state.said
    part.end()
    keeper.look()
    assert part.gone_within(0.0) and not holds(tmp_path, "secret")


def test_what_a_lost_rank_has_ordered_ends_when_the_next_one_begins(opened: Callable[..., SglangEngine], tmp_path: Path) -> None:
    engine = opened()
    lost = [part.state().pid for part in parts(engine)]
    forget(tmp_path / "logs")
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(pid) for pid in lost):
        assert time.monotonic() < deadline, "a server outlived the rank that had ordered it"
        time.sleep(0.1)


def test_parts_end_with_their_keeper(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 600\n")
    python.chmod(0o755)
    with support.keepers(tmp_path, (0, 1)) as found:
        part = Ordered(Order("server-0-abc", 0, 1, str(python), [], 1, 1, "cpu"), "secret", tmp_path, node=1)
        deadline = time.monotonic() + 30
        while part.state() is None:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process = psutil.Process(part.state().pid)
        found[1].kill()
        found[1].wait()
        psutil.wait_procs([process], timeout=30)
        assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_ports_in_a_row_are_not_those_that_linux_deals_out() -> None:
    dealt = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    found = {free_port("127.0.0.1", 7) for _ in range(20)}
    assert len(found) > 10 and all(1024 <= port <= max(dealt, 1024) - 7 or dealt <= 1038 for port in found)
