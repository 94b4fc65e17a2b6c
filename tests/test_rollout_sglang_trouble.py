"""What an engine makes of servers that die, lie or sleep; the servers are stand-ins, so it takes no environment with SGLang."""

import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sglang_support as support
from megatron_support import cpu_platform

from r1mega import heartbeat
from r1mega.config.deadlines import Deadlines
from r1mega.config.rollout import Rollout, Sglang
from r1mega.errors import UserError
from r1mega.pipeline.hangs import Verdict, Watch
from r1mega.rollout.engine import SamplingParams
from r1mega.rollout.open import Surroundings
from r1mega.rollout.sglang import SglangEngine

MODEL = support.MODELS["llama"]
PLAIN = SamplingParams()


@pytest.fixture(autouse=True, scope="module")
def _cpu() -> Iterator[None]:
    with cpu_platform():
        yield


@pytest.fixture
def opened(tmp_path: Path) -> Iterator:
    """Opens an engine over stand-ins with the given settings."""
    python = support.standin(tmp_path)
    engines, told = [], list[str]()

    def make(behaviour: str = "ok", **changes: object) -> SglangEngine:
        (tmp_path / "behaviour").write_text(behaviour)
        settings = {"python": str(python), "retries": 1, "checksums": "none", "request_timeout_s": 60.0} | changes
        engines.append(
            SglangEngine(Rollout(engine="sglang", sglang=Sglang(**settings)), MODEL, Surroundings("cpu", tmp_path, note=told.append))
        )
        engines[-1].sync(support.source(MODEL, 0), version=4)
        return engines[-1]

    make.told = told
    yield make
    for engine in engines:
        engine.close()


def test_a_server_out_of_memory_is_named_with_the_last_word_of_its_log(opened, tmp_path: Path) -> None:
    engine = opened("memory")
    with pytest.raises(
        UserError,
        match=r"do not answer all requests of a rollout, tried 2 times; .* ended \(exit code 1\): torch.OutOfMemoryError: .*; its log: ",
    ) as error:
        engine.generate(support.requests(2), PLAIN)
    assert "\n" not in str(error.value)
    # No third one is started for an attempt that does not follow.
    assert len(list(tmp_path.glob("server-0-*.log"))) == 2 and len(opened.told) == 1


def test_what_older_weights_drew_is_not_accepted(opened) -> None:
    engine = opened("stale", retries=0)
    with pytest.raises(UserError, match=r"drew 16 tokens from weight version 1 instead of 4"):
        engine.generate(support.requests(1), PLAIN)


def test_a_server_that_accepts_and_never_answers_is_named_within_the_deadline(
    opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = opened(retries=0, request_timeout_s=6.0)
    (tmp_path / "behaviour").write_text("silent")
    monkeypatch.setattr(heartbeat, "_heart", None)
    watch = Watch(tmp_path, Deadlines(generate=3.0), ranks=1)
    monkeypatch.setattr(watch, "_end", lambda beats, culprit: None)  # it would end this process
    heartbeat.start(tmp_path / "beats/0/0", tmp_path / "rank0.stacks")
    with ThreadPoolExecutor(1) as thread, heartbeat.phase("generate"):
        seen = thread.submit(watched, watch, 6.0)
        # Nor does a run wait for it for ever where its deadlines are longer.
        with pytest.raises(UserError, match=r"a rollout, tried once: http://127.*/generate: no answer within 6 s"):
            engine.generate(support.requests(3), PLAIN)
        address = engine._pool.clients[0].address
        told = rf"rank 0 has been in generate for \d s \(run.deadlines.generate is 3\): it waits for 3 answers, the oldest of {address};"
        assert re.search(told, seen.result().line)


def watched(watch: Watch, seconds: float) -> Verdict:
    """What the watch says within so many seconds."""
    end = time.monotonic() + seconds
    while (verdict := watch.look()) is None:
        assert time.monotonic() < end
        time.sleep(0.1)
    return verdict


def test_a_server_lost_while_the_trainer_does_something_else_is_replaced_with_the_same_weights(opened, tmp_path: Path) -> None:
    engine = opened("slow")
    asked = support.requests(6)
    expected = engine.generate(asked, PLAIN)
    wait = engine.start(asked, PLAIN)
    lost = engine._fleet.servers[0]
    os.killpg(lost.pid, signal.SIGKILL)
    synced = (tmp_path / "calls").read_text().count("/update_weight_version")
    assert wait() == expected
    assert {sample.weight_version for sample in expected} == {4}
    assert engine._fleet.servers[0].pid != lost.pid
    assert opened.told == [f"lost an SGLang server: {lost.trouble()}"]
    assert "ended (killed by SIGKILL): from outside, or for want of memory; its log: " in opened.told[0]
    assert (tmp_path / "calls").read_text().count("/update_weight_version") == synced + 1


def test_colocated_servers_sleep_and_wake_part_by_part(opened, tmp_path: Path) -> None:
    engine = opened(placement="colocated")
    asked = support.requests(3)
    expected = engine.generate(asked, PLAIN)
    (tmp_path / "calls").unlink()
    engine.sleep()
    engine.sleep()
    with pytest.raises(UserError, match="has no weights"):
        engine.generate(asked, PLAIN)
    engine.sync(support.source(MODEL, 0), version=4)
    assert engine.generate(asked, PLAIN) == expected
    memory = [line for line in (tmp_path / "calls").read_text().splitlines() if "memory" in line or "begin" in line or "generate" in line]
    assert memory == [
        "/release_memory_occupation kv_cache weights",
        "/resume_memory_occupation weights",
        "/begin_weight_update",
        "/resume_memory_occupation kv_cache",
        *["/generate"] * 3,
    ]


def test_a_sleeping_server_that_is_lost_is_replaced_by_one_that_is_awake(opened) -> None:
    engine = opened(placement="colocated")
    expected = engine.generate(support.requests(3), PLAIN)
    engine.sleep()
    os.killpg(engine._fleet.servers[0].pid, signal.SIGKILL)
    engine.sync(support.source(MODEL, 0), version=4)
    assert engine.generate(support.requests(3), PLAIN) == expected


def test_found_servers_are_not_put_to_sleep() -> None:
    with pytest.raises(ValueError, match="nobody would wake those at `addresses`"):
        Sglang(addresses=["http://127.0.0.1:1"], placement="colocated")
