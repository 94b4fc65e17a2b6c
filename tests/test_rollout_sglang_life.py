"""Servers that an engine starts itself: what becomes of them, and of what was asked of them, when somebody is killed."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import sglang_support as support
from megatron_support import cpu_platform

from r1mega.config.rollout import Rollout, Sglang
from r1mega.errors import UserError
from r1mega.rollout import sglang_part, sglang_shards
from r1mega.rollout.engine import SamplingParams
from r1mega.rollout.open import Surroundings
from r1mega.rollout.sglang import SglangEngine
from r1mega.rollout.sglang_sync import Control, load

pytestmark = [pytest.mark.sglang, pytest.mark.slow]
MODEL = support.MODELS["llama"]
PLAIN = SamplingParams(stop_token_ids=(2,))
ASKED = support.requests(count=24, new=200)


def own(**changes: object) -> Rollout:
    return Rollout(engine="sglang", sglang=Sglang(**{"start_timeout_s": 900, "retries": 2, "request_timeout_s": 300, **changes}))


def test_a_server_killed_during_a_rollout_and_during_a_sync_loses_nothing(tmp_path, monkeypatch):
    support.require()
    with cpu_platform():
        engine = SglangEngine(own(bucket_bytes=20_000), MODEL, Surroundings("cpu", tmp_path))
        try:
            engine.sync(support.source(MODEL, 0), version=3)
            expected = engine.generate(ASKED, PLAIN)
            first = engine._fleet.servers[0]
            threading.Timer(0.3, os.killpg, (first.pid, signal.SIGKILL)).start()
            samples = engine.generate(ASKED, PLAIN)
            second = engine._fleet.servers[0]
            assert second.pid != first.pid
            assert support.same(samples, expected)

            send, sent = engine._transport.send, []

            def fatal(bucket, flat) -> None:
                sent.append(bucket)
                if len(sent) == 5:
                    os.killpg(second.pid, signal.SIGKILL)
                send(bucket, flat)

            monkeypatch.setattr(engine._transport, "send", fatal)
            engine.sync(support.source(MODEL, 1), version=4)
            assert engine._fleet.servers[0].pid != second.pid
            (tmp_path / "reference").mkdir()
            samples = engine.generate(support.requests(), PLAIN)
            assert {sample.weight_version for sample in samples} == {4}
            assert support.gap(support.reference(MODEL, 1, tmp_path / "reference"), samples, PLAIN) <= 1e-4
        finally:
            engine.close()
        assert not psutil.pid_exists(engine._fleet.servers[0].pid)


@pytest.mark.parametrize("transport", ["tensor", pytest.param("distributed", marks=pytest.mark.proof)])
def test_a_server_killed_amid_own_shards_is_replaced_and_given_all_of_them(tmp_path, monkeypatch, transport):
    """Half of the new parameters are in when it dies; its successor gets every one, and what is derived from them."""
    support.require()
    model = support.MODELS["deepseek"]
    told = own(path="shards", transport=transport, layout={"tp": 2}, bucket_bytes=200_000)
    with cpu_platform():
        engine = SglangEngine(told, model, Surroundings("cpu", tmp_path))
        try:
            engine.sync(support.source(model, 0), version=3)
            first, loaded = engine._fleet.servers[0], []

            def fatal(control: Control, payloads: list[list[str]], load_format: str, what: str) -> None:
                loaded.append((control.clients[0].address, what))
                if len(loaded) == 4:
                    os.killpg(first.pid, signal.SIGKILL)
                load(control, payloads, load_format, what)

            monkeypatch.setattr(sglang_shards, "load", fatal)
            engine.sync(support.source(model, 1), version=4)
            successor = engine._fleet.servers[0].client.address
            rounds = [what for address, what in loaded if address == successor]
            assert successor != first.client.address and len(loaded) == 4 + len(rounds)
            assert rounds[:4] == [what for _, what in loaded[:4]] and len(rounds) > 6
            (tmp_path / "reference").mkdir()
            samples = engine.generate(support.requests(), PLAIN)
            assert {sample.weight_version for sample in samples} == {4}
            assert support.gap(support.reference(model, 1, tmp_path / "reference"), samples, PLAIN) <= 1e-4
        finally:
            engine.close()


def test_a_server_dies_with_the_process_that_started_it(tmp_path):
    support.require()
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from r1mega.config.rollout import Sglang\n"
        "from r1mega.rollout.open import Surroundings\n"
        "from r1mega.rollout.sglang_servers import Started\n"
        "server = Started(Sglang(), Path(sys.argv[1]), 'float32', Surroundings('cpu', Path(sys.argv[2])), 0)\n"
        "print(server.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", script, str(MODEL), str(tmp_path)], stdout=subprocess.PIPE, text=True)
    server = psutil.Process(int(owner.stdout.readline()))
    deadline = time.monotonic() + 300
    # The first is the one that watches; the others are SGLang's, in the middle of their imports.
    while len(server.children(recursive=True)) < 3:
        assert time.monotonic() < deadline, "the server started no processes"
        time.sleep(0.5)
    processes = [server, *server.children(recursive=True)]
    owner.kill()
    owner.wait()
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_a_server_that_cannot_start_is_one_line_that_names_the_log(tmp_path):
    support.require()
    with (
        cpu_platform(),
        pytest.raises(UserError, match=r"ended while it started \(exit code \d+\): .*--no-such-argument.*; its log: ") as error,
    ):
        SglangEngine(own(arguments=["--no-such-argument"]), MODEL, Surroundings("cpu", tmp_path))
    assert "\n" not in str(error.value)
    assert Path(str(error.value).rpartition(": ")[2]).is_file()


def test_no_environment_with_sglang_is_one_line(monkeypatch, tmp_path):
    from r1mega.rollout import open as engines
    from r1mega.rollout import sglang_servers

    monkeypatch.setattr(sglang_servers, "__file__", str(tmp_path / "r1mega/rollout/sglang_servers.py"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"run tools/install_sglang_cpu, or name the interpreter of one as rollout.sglang.python"):
        engines.require(Rollout(engine="sglang"))


@pytest.mark.proof
def test_a_server_whose_port_is_taken_while_it_starts_ends_and_says_so(tmp_path, monkeypatch):
    """SGLang's processes serve on when its HTTP cannot; `pytest -m proof tests/test_rollout_sglang_life.py -k port`, half a minute."""
    support.require()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        monkeypatch.setattr(sglang_part, "free_port", lambda host, count=1: other.getsockname()[1])
        other.listen()
        with cpu_platform(), pytest.raises(UserError, match=r"ended while it started \(exit code 1\): .*address already in use; its log: "):
            SglangEngine(own(), MODEL, Surroundings("cpu", tmp_path))
