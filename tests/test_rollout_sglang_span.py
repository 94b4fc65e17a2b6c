"""A real SGLang server of two ranks, one on each of two nodes: two parts that two keepers start, here on one machine over gloo."""

import time
from pathlib import Path

import pytest
import sglang_support as support
from megatron_support import cpu_platform

from r1mega.config.rollout import Rollout, Sglang
from r1mega.rollout.engine import SamplingParams
from r1mega.rollout.open import Surroundings
from r1mega.rollout.sglang import SglangEngine
from r1mega.rollout.sglang_keeper import Ordered
from r1mega.rollout.sglang_places import Allocation

pytestmark = [pytest.mark.sglang, pytest.mark.slow]
MODEL = support.MODELS["deepseek"]
PLAIN = SamplingParams(stop_token_ids=(2,))
ONE_GPU_A_NODE = Allocation(node=0, trainers=1, engines=2, gpus=1)


def opened(folder: Path, **changes: object) -> SglangEngine:
    told = {"start_timeout_s": 900, "retries": 2, "request_timeout_s": 300, "layout": {"tp": 2}}
    where = Surroundings("cpu", folder, allocation=ONE_GPU_A_NODE)
    return SglangEngine(Rollout(engine="sglang", sglang=Sglang(**told | changes)), MODEL, where)


def parts(engine: SglangEngine) -> list[Ordered]:
    (server,) = engine._fleet.servers
    return server._parts


def sums(engine: SglangEngine) -> list[dict[str, str]]:
    (server,) = engine._fleet.servers
    return [rank["checksums"] for rank in server.client.post("/weights_checker", {"action": "checksum"}, 60)["ranks"]]


def test_a_server_of_two_nodes(tmp_path: Path) -> None:
    support.require()
    begin = time.monotonic()

    def told(what: str) -> None:
        print(f"{time.monotonic() - begin:6.1f} s  {what}", flush=True)

    with support.keepers(tmp_path, (0, 1, 2)), cpu_platform():
        engine = opened(tmp_path)
        try:
            told("ready")
            engine.sync(support.source(MODEL, 1), version=1)
            told("synced")
            samples = engine.generate(support.requests(), PLAIN)
            (tmp_path / "reference").mkdir()
            gap = support.gap(support.reference(MODEL, 1, tmp_path / "reference"), samples, PLAIN)
            told(f"gap {gap:.1e}")
            assert gap <= 1e-4
        finally:
            engine.close()
            told("closed")
