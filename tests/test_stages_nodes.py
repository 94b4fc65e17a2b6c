"""A stage as a job of three nodes: one with ranks, two with a part of a server each. The ranks train; the server is a stand-in."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from sglang_support import standin

from r1mega.pipeline.metrics import read_metrics
from r1mega.pipeline.nodes import attempts
from r1mega.process import die_with_parent

ROOT = Path(__file__).parent.parent
SHORT = [
    *("stages.zero.updates=6", "stages.zero.evaluation=null", "stages.zero.measures={}", "stages.zero.prompts_per_rollout=2"),
    *("stages.zero.group_size=2", "stages.zero.sampling.max_new_tokens=4", "stages.zero.save_every=6"),
]
SERVERS = "rollout.engine=sglang", "rollout.sglang.checksums=none", "rollout.sglang.layout.tp=2", "rollout.sglang.request_timeout_s=60"


def start(run: Path, node: int, *overrides: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {"SLURM_STEP_NUM_NODES": "3", "SLURM_NODEID": str(node), "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "0"}
    words = [sys.executable, "-m", "r1mega.cli", "run", str(ROOT / "configs/tiny/r1_zero.yaml"), "--stage", "zero", "-o", str(run)]
    words += ["--engine-nodes", "2", "--gpus-per-node", "1", *SHORT, *SERVERS, *overrides]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, env=environment, stdout=pipe, stderr=pipe, text=True, preexec_fn=die_with_parent)


def wait_for(found: Callable[[], object], nodes: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 300
    while not found():
        assert time.monotonic() < deadline
        assert all(node.poll() is None for node in nodes), [node.communicate(timeout=60)[1] for node in nodes]
        time.sleep(0.1)


@pytest.fixture
def started() -> Iterator[Callable[..., list[subprocess.Popen[str]]]]:
    """Starts the tasks of all three nodes, the first one last."""
    made: list[subprocess.Popen[str]] = []

    def make(run: Path, *overrides: str) -> list[subprocess.Popen[str]]:
        made.extend(start(run, node, *overrides) for node in (2, 1, 0))
        return made

    yield make
    for node in made:
        node.kill()
        node.wait()


@pytest.mark.slow
def test_ranks_and_servers_on_nodes_of_one_job(started: Callable[..., list[subprocess.Popen[str]]], tmp_path: Path) -> None:
    """It completes, though a part of the server is killed on the way; nothing is left, and the key was written nowhere."""
    python, run = standin(tmp_path), tmp_path / "run"
    nodes = started(run, f"rollout.sglang.python={python}")
    logs, rows = run / "logs/zero/7-0/engine", run / "stages/01-zero/metrics.jsonl"
    wait_for(logs.is_dir, nodes)
    (logs / "behaviour").write_text("slow")  # a second a response, so that some are under way
    wait_for(lambda: rows.exists() and read_metrics(rows), nodes)
    states = [json.loads(path.read_text()) for path in sorted(logs.glob("nodes/*/*.state.json"))]
    assert len(states) == 2
    os.killpg(states[1]["pid"], signal.SIGKILL)
    ends = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0, 0], ends
    assert [row["update"] for row in read_metrics(rows)] == list(range(1, 7))
    ((_, attempt),) = attempts(run / "logs", "zero")
    assert (attempt.outcome, attempt.nodes, attempt.ranks) == ("finished", 3, 2)
    assert len(list(logs.glob("server-0-*-part0.log"))) == 2, "it was begun anew"
    assert not [state["pid"] for state in states if psutil.pid_exists(state["pid"])]
    key = (logs / "key").read_text()[::-1]
    assert len(key) > 30 and not [path for path in run.rglob("*") if path.is_file() and key.encode() in path.read_bytes()]
    assert not any(key in text for end in ends for text in end)
    assert not [path for path in (logs / "nodes").rglob("*") if path.is_file()]
